"""The pictures of the report that the guide and the README show: a Llama with PEFT's DoRA, explained, and its page in Chromium.

    python examples/site/screenshots.py

Needs Chromium with its driver, selenium and Pillow. Writes PNG files into ``examples/guide/images``, or the folder that ``--out`` names.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dorafx
from dorafx.log.html import render

IMAGES = Path(__file__).resolve().parents[1] / "guide" / "images"
NEEDED = "needs Chromium with its driver, selenium and Pillow: apt-get install chromium chromium-driver; pip install selenium pillow"
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars --disable-sync"
CUT = 1040  # pixels that the README's picture is wide


class Squashed(nn.Module):
    """A layer that is no DoRA: its delta passes through tanh before the norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / width**0.5, requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(8, width) / 8)
        self.lora_B = nn.Parameter(torch.randn(width, 8) / 8)
        self.magnitude = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = torch.tanh(self.lora_B @ self.lora_A)
        scale = self.magnitude / (self.weight + delta).norm(dim=1).detach()
        return scale * (x @ self.weight.T + x @ self.lora_A.T @ self.lora_B.T)


class WithHead(nn.Module):
    """A model and such a layer after it."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model, self.head = model, Squashed(width)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.model.model.model(input_ids=input_ids).last_hidden_state)


def logs() -> Iterator[tuple[str, dorafx.RewriteLog]]:
    """The log of a model whose layers are all rewritten, and of one with a layer that is left alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
    adapter = LoraConfig(r=16, lora_alpha=32, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=512, **shape)), adapter)
    ids = torch.randint(0, 512, (2, 64))
    yield "whole", dorafx.explain(model, input_ids=ids).log
    yield "missed", dorafx.explain(WithHead(model, 1024), ids).log


def without_folders(log: dorafx.RewriteLog) -> dorafx.RewriteLog:
    """The log with paths as they would be in a project of one's own: without the folders of this machine."""
    text = log.to_json()
    for folder in (Path(torch.__file__).resolve().parents[1], Path(torch.__file__).parents[1]):
        text = text.replace(f"{folder}/", "site-packages/")
    return dorafx.RewriteLog.from_json(text.replace(f"{Path(__file__).resolve().parent}/", ""))


class Browser:
    """Chromium, without a window.

    Args:
        driver: selenium's.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path, width: int, scheme: str = "light", height: int = 900) -> None:
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(page.as_uri())

    def edges(self, selector: str) -> dict[str, float]:
        """Left, top, right and bottom of the first element of a selector, from the page's corner."""
        script = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
        return self.driver.execute_script(script, selector)  # type: ignore[no-any-return]

    def shot(self, left: float, top: float, right: float, bottom: float) -> Any:
        """A part of the page as an image."""
        from PIL import Image

        clip = {"x": left, "y": top, "width": right - left, "height": bottom - top, "scale": 1}
        parameters = {"clip": clip, "captureBeyondViewport": True}
        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", parameters)
        return Image.open(io.BytesIO(base64.b64decode(found["data"]))).convert("RGB")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser.

    Raises:
        SystemExit: there is none.
    """
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver_program = shutil.which("chromedriver")
    try:
        import PIL  # noqa: F401
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        program = None
    if program is None or driver_program is None:
        raise SystemExit(f"examples/site/screenshots.py {NEEDED}")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS.split(), f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(driver_program))
        try:
            yield Browser(driver)
        finally:
            driver.quit()


def stacked(parts: list[Any], gap: int, background: tuple[int, int, int], beside: bool = False) -> Any:
    """Images below each other, or beside each other, as one."""
    from PIL import Image

    along, across = (0, 1) if beside else (1, 0)
    size = [0, 0]
    size[along] = sum(part.size[along] for part in parts) + gap * (len(parts) - 1)
    size[across] = max(part.size[across] for part in parts)
    whole = Image.new("RGB", (size[0], size[1]), background)
    place = [0, 0]
    for part in parts:
        whole.paste(part, (place[0], place[1]))
        place[along] += part.size[along] + gap
    return whole


def saved(image: Any, path: Path) -> None:
    """As PNG with 128 colours, which a page of text needs no more than."""
    image.quantize(128, dither=0).save(path, optimize=True)
    print(f"{path.name}: {image.width} x {image.height}, {path.stat().st_size / 1000:.0f} kB")


def pictures(browser: Browser, folder: Path, log: dorafx.RewriteLog, missed: dorafx.RewriteLog, out: Path) -> None:
    """Take all pictures."""
    page = log.to_html(folder / "report.html")
    for name, scheme in (("report.png", "light"), ("report-dark.png", "dark")):
        browser.open(page, 1280, scheme)
        saved(browser.shot(0, 0, 1280, browser.edges(".layer[open]")["bottom"] + 12), out / name)
    browser.open(page, 390, "light", 844)
    first = browser.shot(0, 0, 390, 844)
    top = browser.edges(".layer[open]")["top"] - 8
    saved(
        stacked([first, browser.shot(0, top, 390, top + 844)], 24, (118, 129, 141), beside=True),
        out / "report-phone.png",
    )
    narrow = folder / "cut.html"
    narrow.write_text(render(log, CUT - 90), encoding="utf-8")
    browser.open(narrow, CUT)
    verdict = browser.edges(".facts")["top"]
    layer = browser.edges(".layer[open]")
    saved(
        stacked(
            [browser.shot(0, 0, CUT, verdict), browser.shot(0, layer["top"] - 2, CUT, layer["bottom"] + 12)],
            0,
            (255, 255, 255),
        ),
        out / "report-cut.png",
    )
    browser.open(missed.to_html(folder / "missed.html"), 1280)
    browser.driver.execute_script("document.querySelectorAll('.layer').forEach((d, i) => { d.open = i === 0; })")
    row, layer = browser.edges("tr.missed"), browser.edges(".layer[open]")
    parts = [
        browser.shot(0, 0, 1280, row["bottom"] + 8),
        browser.shot(0, layer["top"] - 4, 1280, layer["bottom"] + 12),
    ]
    saved(stacked(parts, 0, (255, 255, 255)), out / "report-missed.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=IMAGES, help="the folder (default examples/guide/images)")
    options = parser.parse_args()
    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        options.out.mkdir(parents=True, exist_ok=True)
        found = {name: without_folders(log) for name, log in logs()}
        pictures(browser, Path(folder), found["whole"], found["missed"], options.out)


if __name__ == "__main__":
    main()
