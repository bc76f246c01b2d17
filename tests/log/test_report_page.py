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

from dorafx import Record, RewriteLog, explain
from dorafx.log import Drawing, DrawnNode

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
    assert cells(8)[-1] == "96 GiB"
    button.click()
    assert header.get_attribute("aria-sort") == "descending"
    assert cells(8)[0] == "96 GiB"
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
    new = layer.find_elements("css selector", "svg.after .node.new")
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
    assert [n.text.split("\n")[0] for n in all_of(browser, ".node.cause")] == ["tanh"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1366, 390])
def test_readable_everywhere(browser: Any, page: Path, width: int, scheme: str, tmp_path: Path) -> None:
    """Nothing is wider than the window; text has the contrast that WCAG asks for; a screenshot is not of one colour."""
    show(browser, page, width, 900, scheme)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for selector in ("h1", "#log code", ".advice", ".reason", ".what", ".hint", "tr.missed td", "tr.rewritten td"):
        assert contrast(browser, selector) >= 4.5, selector
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(background) > 0.5) == (scheme == "light")
    shot = tmp_path / "shot.png"
    browser.save_screenshot(str(shot))
    assert shot.stat().st_size > 10_000
    if width == 390:
        assert all_of(browser, "#sort")[0].is_displayed()
        assert not all_of(browser, "#log thead")[0].is_displayed()
        all_of(browser, "#sort option")[7].click()
        assert "96 GiB" in all_of(browser, "#log tbody tr")[0].text


def contrast(browser: Any, selector: str) -> float:
    script = "return getComputedStyle(document.querySelector(arguments[0])).color"
    colours = (
        luminance(browser.execute_script(script, selector)),
        luminance(browser.execute_script("return getComputedStyle(document.body).backgroundColor")),
    )
    return (max(colours) + 0.05) / (min(colours) + 0.05)


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of ``rgb(…)``."""
    channels = [int(c) / 255 for c in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


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
