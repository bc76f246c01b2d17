"use strict";
const body = document.querySelector("#log tbody");
const rows = [...body.rows];
const headers = [...document.querySelectorAll("#log th")];
const names = headers.map((th) => th.textContent.trim());
for (const row of rows) [...row.cells].forEach((cell, i) => { cell.dataset.name = names[i]; });
// Names may be broken behind their dots and slashes.
for (const code of document.querySelectorAll("code")) {
  const parts = code.textContent.split(/(?<=[./])/);
  code.replaceChildren(...parts.flatMap((part) => [part, document.createElement("wbr")]));
}

const value = (row, i) => {
  const cell = row.cells[i];
  return cell.dataset.value !== undefined ? Number(cell.dataset.value) : cell.textContent.trim();
};
const sortBy = (i, ascending) => {
  headers.forEach((th) => th.removeAttribute("aria-sort"));
  headers[i].setAttribute("aria-sort", ascending ? "ascending" : "descending");
  rows.sort((a, b) => {
    const x = value(a, i), y = value(b, i);
    return (x < y ? -1 : x > y ? 1 : 0) * (ascending ? 1 : -1);
  });
  body.append(...rows);
};
const sort = document.getElementById("sort");
headers.forEach((th, i) => {
  th.firstElementChild.addEventListener("click", () => sortBy(i, th.getAttribute("aria-sort") !== "ascending"));
  sort.append(new Option(names[i], i));
});
sort.addEventListener("change", () => sortBy(Number(sort.value), !headers[sort.value].classList.contains("number")));

const filter = document.getElementById("filter");
const status = document.getElementById("status");
const kind = document.getElementById("kind");  // null where no record has one
const apply = () => {
  const text = filter.value.toLowerCase();
  for (const row of rows) {
    const fits = row.textContent.toLowerCase().includes(text);
    const ofKind = !kind || kind.value === "" || row.dataset.kind === kind.value;
    row.hidden = !fits || !ofKind || (status.value !== "" && !row.classList.contains(status.value));
  }
  document.getElementById("shown").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
};
filter.addEventListener("input", apply);
status.addEventListener("change", apply);
if (kind) kind.addEventListener("change", apply);
apply();

const openTarget = () => {
  const target = location.hash.startsWith("#d-") && document.getElementById(location.hash.slice(1));
  if (target) {
    target.open = true;
    target.scrollIntoView();
  }
};
addEventListener("hashchange", openTarget);
for (const link of document.querySelectorAll("#log a")) link.addEventListener("click", () => setTimeout(openTarget));
openTarget();

for (const layer of document.querySelectorAll(".layer")) {
  const details = layer.querySelector(".details");
  const before = layer.querySelectorAll("svg.before .node");
  const mark = (node) => {
    layer.querySelectorAll(".shown").forEach((other) => other.classList.remove("shown"));
    for (const i of (node.dataset.replaces || "").split(" ").filter(Boolean)) before[i].classList.add("shown");
  };
  const show = (node) => {
    mark(node);
    details.textContent = node.querySelector("title").textContent;
    details.hidden = false;
  };
  // What the region ends in is what one looks for: it comes last.
  layer.addEventListener("toggle", () => layer.querySelectorAll("svg").forEach((svg) => {
    const end = svg.querySelector(".node:last-of-type").transform.baseVal[0].matrix.e;
    svg.parentElement.scrollLeft = end - svg.parentElement.clientWidth / 2 + 72;
  }));
  for (const node of layer.querySelectorAll(".node")) {
    node.addEventListener("pointerenter", () => mark(node));
    node.addEventListener("focus", () => show(node));
    node.addEventListener("click", () => show(node));
  }
}
