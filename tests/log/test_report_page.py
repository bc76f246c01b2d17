"""The report in a real browser: clicked, filtered, sorted, on a laptop and a phone, light and dark, with hostile names."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from colours import closest, contrast, luminance, of_css

from dorafx import Record, RewriteLog, explain
from dorafx.log import Drawing, DrawnNode
from dorafx.log.html import shortened
from dorafx.log.summary import in_words

pytest.importorskip("selenium")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver is installed")

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync"
)
HOSTILE = "</title></script></svg><script>window.hit = 1</script><img src=x onerror='window.hit=2'>{{ 7*7 }}\"'`${window.hit=3}"


def good(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    norm = (w + b @ a).norm(dim=1).detach()
    return m / norm * (F.linear(x, w) + F.linear(F.linear(x, a), b))


def squashed(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    norm = (w + torch.tanh(b @ a)).norm(dim=1).detach()
    return m / norm * (F.linear(x, w) + F.linear(F.linear(x, a), b))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with a layer that is rewritten, one that is missed, 32 folded ones, and hostile names wherever a name can be."""
    operands = [torch.randn(s) for s in ((12, 64), (96, 64), (4, 64), (96, 4), (96,))]
    log = RewriteLog()
    for program in (good, squashed):
        found = explain(program, *operands).log
        log.extend(found.records, found.drawings)
    (key,) = {r.drawing for r in found.records}
    for i in range(32):
        site, shape = f"model.layers.{i}.mlp.down_proj", {"d_out": 8192, "d_in": 28672, "rank": 384}
        log.add(
            Record("rewritten", site, "linear", dtype="bfloat16", dense_bytes_avoided=3 << 30, drawing=key, **shape)
        )
    node = DrawnNode(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, "new", replaces=(HOSTILE,))
    hostile = Drawing((node,), (node,))
    words = ("site", "pattern", "reason", "kind", "decision", "source", "dtype", "norm_algorithm")
    values = dict.fromkeys(words, HOSTILE)
    log.extend([Record("missed", codegen=HOSTILE, drawing=hostile.key, **values)], {hostile.key: hostile})
    log.add_note(HOSTILE)
    return log.to_html(tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def peft_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with stock PEFT's DoRA: seven distinct layers of the ordinary kind."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=96
    )  # fmt: skip
    adapter = peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapter)
    log = explain(model, input_ids=torch.zeros(2, 8, dtype=torch.long)).log
    return log.to_html(tmp_path_factory.mktemp("peft") / "report.html")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        yield driver
        driver.quit()


def show(browser: Any, page: Path, width: int = 1366, height: int = 900, scheme: str = "light") -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())


def visible(browser: Any) -> list[str]:
    return [row.get_attribute("class") for row in all_of(browser, "#log tbody tr") if row.is_displayed()]


def all_of(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _no_complaints(browser: Any) -> Iterator[None]:
    """Whatever a test did, the console stayed empty and nothing of the log was executed."""
    browser.get_log("browser")
    yield
    assert browser.get_log("browser") == []
    assert browser.execute_script("return window.hit") is None


def test_misses_come_first_and_the_table_filters(browser: Any, page: Path) -> None:
    show(browser, page)
    assert visible(browser) == ["missed", "missed", "rewritten", "rewritten"]
    assert browser.find_element("id", "shown").text == "4 of 4 rows"
    field = browser.find_element("id", "filter")
    field.send_keys("DOWN_proj")
    assert visible(browser) == ["rewritten"]
    assert browser.find_element("id", "shown").text == "1 of 4 rows"
    assert "model.layers.*.mlp.down_proj" in all_of(browser, "#log tbody tr:not([hidden]) code")[0].text
    field.clear()
    field.send_keys("tanh")
    assert visible(browser) == ["missed"]
    assert "What to do: The delta inside the norm" in all_of(browser, "#log tbody tr:not([hidden])")[0].text
    field.clear()
    field.send_keys("\ue003 ")  # clear() sends no event
    field.send_keys("\ue003")
    all_of(browser, "#status option[value=rewritten]")[0].click()
    assert visible(browser) == ["rewritten", "rewritten"]


def test_the_table_filters_by_kind(browser: Any, page: Path) -> None:
    show(browser, page)
    kinds = all_of(browser, "#kind option")
    assert [kind.text for kind in kinds] == ["all", HOSTILE, "hidden-delta"]
    for kind in kinds[1:]:
        kind.click()
        assert visible(browser) == ["missed"]
        assert kind.text in all_of(browser, "#log tbody tr:not([hidden])")[0].text
    all_of(browser, "#status option[value=rewritten]")[0].click()
    assert visible(browser) == []
    kinds[0].click()
    assert visible(browser) == ["rewritten", "rewritten"]


def test_columns_sort_both_ways(browser: Any, page: Path) -> None:
    show(browser, page)

    def cells(column: int) -> list[str]:
        return [row.text for row in all_of(browser, f"#log tbody td:nth-child({column})")]

    (button,) = [b for b in all_of(browser, "#log th button") if b.text == "dense avoided"]
    header = button.find_element("xpath", "..")
    button.click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert cells(7)[-1] == "96 GiB"
    button.click()
    assert header.get_attribute("aria-sort") == "descending"
    assert cells(7)[0] == "96 GiB"
    assert cells(3)[0] == "32"
    module = all_of(browser, "#log th button")[1]
    module.click()
    assert cells(2) == sorted(cells(2))


def test_a_layer_opens_and_its_nodes_explain_themselves(browser: Any, page: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    show(browser, page)
    row = next(r for r in all_of(browser, "#log tbody tr") if "down_proj" not in r.text and "rewritten" in r.text)
    link = row.find_element("css selector", "a")
    layer = browser.find_element("id", link.get_attribute("href").rpartition("#")[2])
    assert not layer.get_attribute("open")
    link.click()
    browser.execute_async_script("setTimeout(arguments[0], 100)")
    assert layer.get_attribute("open")
    new = layer.find_elements("css selector", ".broad svg.after .node.new")
    assert len(new) > 3
    assert layer.find_elements("css selector", "svg.before .node.removed")
    assert layer.find_elements("css selector", "svg.before .node.kept")
    compose = next(n for n in new if "compose" in n.text)
    ActionChains(browser).move_to_element(compose).perform()
    assert layer.find_elements("css selector", "svg.before .node.shown")
    compose.click()
    details = layer.find_element("css selector", ".details").text
    for text in ("compose.default", "[12, 96] float32", "test_report_page.py:", "new", "in place of 5 nodes"):
        assert text in details
    fills = {
        fate: layer.find_element("css selector", f".node.{fate} rect").value_of_css_property("fill")
        for fate in ("kept", "removed", "new")
    }
    assert len(set(fills.values())) == 3


def test_the_cause_of_a_miss_is_marked(browser: Any, page: Path) -> None:
    show(browser, page)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert [n.text.split("\n")[0] for n in all_of(browser, ".broad .node.cause")] == ["tanh"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_readable_everywhere(browser: Any, page: Path, width: int, scheme: str, tmp_path: Path) -> None:
    """Every text has the contrast that WCAG asks for; a screenshot is not of one colour; a phone has a list for sorting."""
    show(browser, page, width, 900, scheme)
    open_all(browser)
    texts = browser.execute_script(TEXTS)
    assert len(texts) > 100
    for text, colour, behind in texts:
        assert contrast(of_css(colour), of_css(behind)) >= 4.5, (text, colour, behind)
    background = of_css(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert (luminance(background) > 0.5) == (scheme == "light")
    shot = tmp_path / "shot.png"
    browser.save_screenshot(str(shot))
    assert shot.stat().st_size > 10_000
    if width == 390:
        assert all_of(browser, "#sort")[0].is_displayed()
        assert not all_of(browser, "#log thead")[0].is_displayed()
        all_of(browser, "#sort option")[6].click()
        assert "96 GiB" in all_of(browser, "#log tbody tr")[0].text


# Each visible text with its colour, and the colour that lies behind it.
TEXTS = """
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = getComputedStyle(e).backgroundColor;
    if (colour !== "rgba(0, 0, 0, 0)") return colour;
  }
};
const found = [];
for (const element of document.querySelectorAll("body *:not(script)")) {
  const own = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join("").trim();
  if (!own || !element.checkVisibility() || element.localName === "title") continue;
  if (element.localName === "text") {
    const shape = element.parentElement.querySelector(element.classList.contains("mark") ? "circle" : "rect");
    found.push([own, getComputedStyle(element).fill, getComputedStyle(shape).fill]);
  } else {
    found.push([own, getComputedStyle(element).color, behind(element)]);
  }
}
return found;
"""


def open_all(browser: Any) -> None:
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")


def box(browser: Any, element: Any) -> dict[str, float]:
    return browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", element)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_that_everybody_can_tell_apart(browser: Any, page: Path, scheme: str) -> None:
    """Also who lacks one kind of cones; and what a colour says is said by a sign, too."""
    show(browser, page, 1280, 900, scheme)
    open_all(browser)
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    fates = ("kept", "removed", "new", "cause")
    strokes = [browser.execute_script(style, f".broad .node.{fate} rect", "stroke") for fate in fates]
    assert closest(map(of_css, strokes)) > 20
    for stroke in strokes:
        fill = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert contrast(of_css(stroke), of_css(fill)) >= 3  # of graphics
    states = [browser.execute_script(style, f"tr.{status} td", "color") for status in ("missed", "rewritten")]
    assert closest(map(of_css, states)) > 20
    dashes = [browser.execute_script(style, f".broad .node.{fate} rect", "strokeDasharray") for fate in fates]
    assert [dash != "none" for dash in dashes] == [False, True, False, False]
    signs = [{n.text for n in all_of(browser, f".broad .node.{fate} .mark")} for fate in fates]
    assert signs == [set(), {"−"}, {"+"}, {"!"}]
    assert [b.text for b in all_of(browser, ".key b")] == ["−", "+", "!"]
    assert all_of(browser, "tr.missed td")[0].text == "✕ left alone"
    assert all_of(browser, "tr.rewritten td")[0].text == "✓ rewritten"


@pytest.mark.parametrize("width", [1280, 1000, 390])
@pytest.mark.parametrize("which", ["page", "peft_page"])
def test_nothing_is_wider_than_its_place(browser: Any, which: str, width: int, request: pytest.FixtureRequest) -> None:
    show(browser, request.getfixturevalue(which), width)
    open_all(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    wide = """
    return [...document.querySelectorAll("table, tr, td, th, .layer, .sides, figure, .scroll, .terms, header, .controls")]
      .filter((e) => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1).map((e) => e.outerHTML.slice(0, 300));
    """
    assert browser.execute_script(wide) == []


def test_before_and_after_of_a_layer_of_peft_stand_side_by_side(browser: Any, peft_page: Path) -> None:
    show(browser, peft_page, 1280)
    open_all(browser)
    layers = all_of(browser, ".layer")
    assert len(layers) == 7
    for layer in layers:
        before, after = layer.find_elements("css selector", ".broad.scroll")
        left, right = box(browser, before), box(browser, after)
        assert left["top"] == right["top"] and left["right"] <= right["left"]
        for side in (before, after):
            assert browser.execute_script("return arguments[0].scrollWidth <= arguments[0].clientWidth", side)
            svg = side.find_element("css selector", "svg")
            assert box(browser, svg)["width"] == pytest.approx(int(svg.get_attribute("width")), abs=1)  # not shrunk


def test_a_phone_has_drawings_of_its_own(browser: Any, peft_page: Path) -> None:
    """Narrow enough for letters of a size that can be read."""
    show(browser, peft_page, 390)
    open_all(browser)
    assert not any(side.is_displayed() for side in all_of(browser, ".broad"))
    for svg in all_of(browser, ".narrow svg"):
        assert box(browser, svg)["width"] >= 0.9 * int(svg.get_attribute("width"))


def test_a_link_stands_apart_from_the_name(browser: Any, peft_page: Path) -> None:
    show(browser, peft_page, 1280)
    for row in all_of(browser, "#log tbody tr"):
        name, link = row.find_element("css selector", ".name"), row.find_element("css selector", "a")
        assert name.text.endswith("_proj") and link.text == "graph"
        assert row.find_element("css selector", ".module").text.split()[:2] == [name.text, "graph"]
        one, other = box(browser, name), box(browser, link)
        assert other["top"] >= one["bottom"] - 1 or other["left"] >= one["right"] + 4


def test_one_layer_has_its_own_number(browser: Any, page: Path, peft_page: Path) -> None:
    show(browser, peft_page)
    names = [e.text for e in all_of(browser, ".name") if e.is_displayed()]
    assert len(names) == 14 and all(name.startswith("base_model.model.model.layers.0.") for name in names)
    show(browser, page)
    assert "model.layers.*.mlp.down_proj" in [e.text for e in all_of(browser, "td .name")]


def test_the_terms_of_both_sides_stand_under_the_drawing(browser: Any, peft_page: Path, page: Path) -> None:
    show(browser, peft_page, 1280)
    (layer,) = [e for e in all_of(browser, ".layer") if e.get_attribute("open")]
    texts = []
    for figure in layer.find_elements("css selector", "figure"):
        drawing, terms = (figure.find_element("css selector", name) for name in (".broad svg", ".terms"))
        assert box(browser, terms)["top"] >= box(browser, drawing)["bottom"]
        texts.append([code.text for code in terms.find_elements("css selector", "code")])
    given = "x = hidden_states_1·D(input_layernorm)"
    assert texts == [
        [
            "y = x·base_layerᵀ·D(lora_magnitude_vector·n⁻¹) + 2·x·lora_Aᵀ·lora_Bᵀ·D(lora_magnitude_vector·n⁻¹)",
            "n = ‖detach(base_layer + 2·lora_B·lora_A)‖",
            given,
        ],
        [
            "y = (x·base_layerᵀ + 2·x·lora_Aᵀ·lora_Bᵀ)·D(lora_magnitude_vector·n⁻¹)",
            "n = ‖detach(base_layer + 2·lora_B·lora_A)‖, block by block: the sum is never whole in memory",
            given,
        ],
    ]
    show(browser, page)
    open_all(browser)
    near_miss = next(e for e in all_of(browser, ".layer") if e.find_elements("css selector", ".broad .cause"))
    found, form = (terms.text for terms in near_miss.find_elements("css selector", ".terms"))
    assert "n = ‖w + tanh(b·a)‖" in found
    assert "the closest form, linear" in form and "n = detach(‖W + s·B·A‖)" in form


def test_the_summary_in_words_comes_first(browser: Any, page: Path, peft_page: Path) -> None:
    show(browser, peft_page)
    first = browser.find_element("css selector", "body").text.split("\n")[:2]
    assert first == ["dorafx rewrite log", "7 of 7 DoRA layers rewritten; a forward forms 725 KiB less."]
    show(browser, page)
    assert browser.find_element("css selector", ".verdict").text == (
        "33 of 35 DoRA layers rewritten; 2 left alone; a forward forms 96 GiB less."
    )


def rewritten(site: str, size: int = 193 << 20, **fields: Any) -> Record:
    return Record("rewritten", site, "linear", dense_bytes_avoided=size, **fields)


@pytest.mark.parametrize(
    ("records", "sentence"),
    [
        ([], "Nothing was compiled that looks like DoRA."),
        ([rewritten("a")], "1 of 1 DoRA layer rewritten; a forward forms 193 MiB less."),
        ([rewritten("a", 0)], "1 of 1 DoRA layer rewritten."),
        ([rewritten("a"), rewritten("b")], "2 of 2 DoRA layers rewritten; a forward forms 386 MiB less."),
        ([rewritten("a"), rewritten("a", graph=1)], "1 of 1 DoRA layer rewritten; a forward forms 193 MiB less."),
        ([rewritten("a", reason="r")], "1 of 1 DoRA layer rewritten, in part; a forward forms 193 MiB less."),
        (
            [rewritten("a"), rewritten("b", reason="r")],
            "2 of 2 DoRA layers rewritten, 1 of them in part; a forward forms 386 MiB less.",
        ),
        (
            [rewritten("a"), Record("missed", "b")],
            "1 of 2 DoRA layers rewritten; 1 left alone; a forward forms 193 MiB less.",
        ),
        ([Record("missed", "b")], "0 of 1 DoRA layer rewritten; 1 left alone."),
        (
            [rewritten("a", 0), Record("missed", "a", graph=1)],
            "1 of 1 DoRA layer rewritten; 1 left alone in another place.",
        ),
    ],
)
def test_the_sentence(records: list[Record], sentence: str) -> None:
    assert in_words(records) == sentence


def test_an_edge_is_an_arrow_that_can_be_followed(browser: Any, peft_page: Path) -> None:
    """By pointing, by a tap, and by the keyboard."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    show(browser, peft_page, 1280)
    svg = browser.find_element("css selector", ".layer[open] .broad svg.before")
    edges = svg.find_elements("css selector", ".edge")
    assert edges and all(e.get_attribute("d").endswith("m-4 -7l4 7l4 -7") for e in edges)  # the arrow's head
    nodes = svg.find_elements("css selector", ".node")

    def lit() -> set[tuple[int, int]]:
        return {
            (int(e.get_attribute("data-from")), int(e.get_attribute("data-to")))
            for e in svg.find_elements("css selector", ".edge.lit")
        }

    def of(i: int) -> set[tuple[int, int]]:
        ends = {(int(e.get_attribute("data-from")), int(e.get_attribute("data-to"))) for e in edges}
        return {edge for edge in ends if i in edge}

    norm = next(i for i, n in enumerate(nodes) if n.text.startswith("linalg_norm"))
    assert lit() == set()
    ActionChains(browser).move_to_element(nodes[norm]).perform()
    assert lit() == of(norm) and len(lit()) == 2
    dimmed = next(e for e in edges if "lit" not in e.get_attribute("class"))
    bright = svg.find_element("css selector", ".edge.lit")
    assert float(dimmed.value_of_css_property("opacity")) < float(bright.value_of_css_property("opacity"))
    near = svg.find_elements("css selector", ".node.near")
    assert {nodes.index(n) for n in near} == {i for edge in of(norm) for i in edge} - {norm}
    after = browser.find_elements("css selector", ".layer[open] .broad svg.after .node.shown")
    assert "row_norm" in [n.text.split("\n")[0] for n in after]  # what it became
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    assert lit() == set()
    nodes[norm].click()
    assert lit() == of(norm)
    (source,) = [a for a, b in of(norm) if b == norm]
    ActionChains(browser).send_keys(Keys.ARROW_UP).perform()
    assert browser.switch_to.active_element == nodes[source] and lit() == of(source)
    ActionChains(browser).send_keys(Keys.ARROW_DOWN).perform()
    assert browser.switch_to.active_element == nodes[norm]
    assert "linalg_norm" in browser.find_element("css selector", ".layer[open] .details").text


LONG = "/home/somebody/a-long-name/python3.11/site-packages/transformers/models/llama/modeling_llama.py:412"
SHORT = "/home/…/models/llama/modeling_llama.py:412"


def test_long_paths_are_shortened_in_the_middle(browser: Any, tmp_path: Path) -> None:
    """The whole path is in the title; a tap shows it, and the filter finds it."""
    log = RewriteLog()
    log.add(Record("missed", "a", reason=f"operator tanh at {LONG} stands there", source=LONG))
    log.add(rewritten("b", source="model.py:12"))
    show(browser, log.to_html(tmp_path / "paths.html"), 1280)
    in_reason, in_source = all_of(browser, ".path")
    assert in_source.text == in_reason.text == SHORT
    assert in_source.get_attribute("title") == in_reason.get_attribute("title") == LONG
    assert all_of(browser, ".reason")[0].text == f"operator tanh at {SHORT} stands there"
    assert box(browser, in_source)["height"] < 30  # one line
    in_source.click()
    assert in_source.text == LONG
    in_source.click()
    assert in_source.text == SHORT
    for key in ("\ue007", " "):  # a button without a mouse: Enter, the space bar
        in_source.send_keys(key)
        assert in_source.text == LONG
        in_source.send_keys(key)
        assert in_source.text == SHORT
    assert in_source.get_attribute("role") == "button"
    browser.find_element("id", "filter").send_keys("site-packages")
    assert visible(browser) == ["missed"]
    assert [e.text for e in all_of(browser, ".source")][1:] == [""]  # the other row is hidden


@pytest.mark.parametrize(
    ("path", "short"),
    [
        ("model.py:3", "model.py:3"),
        (LONG, SHORT),
        (
            "C:\\Users\\somebody\\projects\\a-long-name\\models\\llama.py:3",
            "C:\\…\\projects\\a-long-name\\models\\llama.py:3",
        ),
        ("/" + "x" * 80 + ".py:3", "/xxxxxxxxxx…" + "x" * 27 + ".py:3"),
        ("src/" + "long-folder/" * 6 + "model.py:3", "src/…/long-folder/long-folder/model.py:3"),
    ],
)
def test_shortened(path: str, short: str) -> None:
    assert shortened(path) == short and len(short) <= 44


def test_a_script_that_got_in_would_not_run(browser: Any, page: Path, tmp_path: Path) -> None:
    """The page's policy allows its own script only, by digest, and no network."""
    tampered = tmp_path / "tampered.html"
    text = page.read_text(encoding="utf-8")
    tampered.write_text(text.replace("</body>", "<script>window.hit = 4</script></body>"), encoding="utf-8")
    show(browser, tampered)
    assert browser.execute_script("return window.hit") is None
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_an_empty_log_is_a_page_too(browser: Any, tmp_path: Path) -> None:
    show(browser, RewriteLog().to_html(tmp_path / "empty.html"))
    assert "Nothing was compiled that looks like DoRA" in browser.find_element("css selector", "body").text
