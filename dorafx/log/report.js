"use strict";
const body = document.querySelector("#log tbody");
const rows = [...body.rows];
const headers = [...document.querySelectorAll("#log th")];
const names = headers.map((th) => th.textContent.trim());
for (const row of rows) {
  [...row.cells].forEach((cell, i) => {
    cell.dataset.name = names[i];
    cell.classList.toggle("vain", !cell.textContent.trim());
  });
}
// Names may be broken behind their dots and slashes, formulas behind their products, a pattern's name behind its words.
const breakable = (element, text) => {
  const parts = text.split(element.className === "plain" ? /(?<=_)/ : /(?<=[./·])/);
  element.replaceChildren(...parts.flatMap((part) => [part, document.createElement("wbr")]));
};
for (const element of document.querySelectorAll("code:not(:has(*)), .path")) breakable(element, element.textContent);

// A path is shown in short; a tap shows all of it.
for (const path of document.querySelectorAll(".path")) {
  const short = path.textContent;
  const turn = () => breakable(path, path.textContent === short ? path.title : short);
  path.addEventListener("click", turn);
  path.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    turn();
  });
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
const contents = new Map(rows.map((row) => [
  row, [row.textContent, ...[...row.querySelectorAll("[title]")].map((e) => e.title)].join("\n").toLowerCase(),
]));
const apply = () => {
  const text = filter.value.toLowerCase();
  for (const row of rows) {
    const fits = contents.get(row).includes(text);
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
  const svgs = [...layer.querySelectorAll("svg")];
  const nodesOf = new Map(svgs.map((svg) => [svg, [...svg.querySelectorAll(".node")]]));
  const clear = () => {
    svgs.forEach((svg) => svg.classList.remove("pointed"));
    layer.querySelectorAll(".at, .near, .lit, .shown").forEach((e) => e.classList.remove("at", "near", "lit", "shown"));
  };
  const ofTheOtherSide = (svg, name) =>
    svgs.find((other) => other.classList.contains(name) && other.parentElement.className === svg.parentElement.className);
  const mark = (node) => {
    clear();
    const svg = node.ownerSVGElement;
    const nodes = nodesOf.get(svg);
    const i = nodes.indexOf(node);
    svg.classList.add("pointed");
    node.classList.add("at");
    for (const edge of svg.querySelectorAll(".edge")) {
      const from = Number(edge.dataset.from), to = Number(edge.dataset.to);
      if (from !== i && to !== i) continue;
      edge.classList.add("lit");
      nodes[from === i ? to : from].classList.add("near");
    }
    if (svg.classList.contains("after")) {
      const before = nodesOf.get(ofTheOtherSide(svg, "before"));
      for (const k of (node.dataset.replaces || "").split(" ").filter(Boolean)) before[k].classList.add("shown");
    } else {
      const after = nodesOf.get(ofTheOtherSide(svg, "after")) || [];
      after.filter((n) => (n.dataset.replaces || "").split(" ").includes(String(i))).forEach((n) => n.classList.add("shown"));
    }
  };
  const show = (node) => {
    mark(node);
    details.textContent = node.querySelector("title").textContent;
    details.hidden = false;
  };
  const follow = (node, up) => {
    const svg = node.ownerSVGElement;
    const nodes = nodesOf.get(svg);
    const i = String(nodes.indexOf(node));
    const edge = [...svg.querySelectorAll(".edge")].find((e) => (up ? e.dataset.to : e.dataset.from) === i);
    if (edge) nodes[up ? edge.dataset.from : edge.dataset.to].focus();
  };
  // Where a graph is wider than its place, what it ends in is what one looks for: it comes last.
  layer.addEventListener("toggle", () => svgs.forEach((svg) => {
    const end = nodesOf.get(svg).at(-1).transform.baseVal[0].matrix.e;
    svg.parentElement.scrollLeft = end - svg.parentElement.clientWidth / 2 + 72;
  }));
  for (const node of layer.querySelectorAll(".node")) {
    node.addEventListener("pointerenter", () => mark(node));
    node.addEventListener("pointerleave", () => {
      const focused = layer.querySelector(".node:focus");
      if (focused) mark(focused); else clear();
    });
    node.addEventListener("focus", () => show(node));
    node.addEventListener("click", () => show(node));
    node.addEventListener("blur", clear);
    node.addEventListener("keydown", (event) => {
      if (event.key !== "ArrowUp" && event.key !== "ArrowDown") return;
      event.preventDefault();
      follow(node, event.key === "ArrowUp");
    });
  }
}
