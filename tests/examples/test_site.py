"""The guide as a site: MkDocs builds it without a warning, every page is in the navigation and the search, and every link leads somewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

import dorafx
import dorafx.extension

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "examples" / "guide"
REPOSITORY = "https://github.com/dorafx/dorafx"
SHOWN = {"ul", "ol", "li", "tr", "h1", "h2", "h3", "h4", "pre"}
"""What a page has on the site as where one reads it in the repository."""
BUILT_BY_PLUGINS = {"api", "extension"}
"""Pages that only the site has whole."""


class Document(HTMLParser):
    """What a page refers to, what may be referred to in it, and what it shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.navigation: set[str] = set()
        self.shown: Counter[str] = Counter()
        self.words: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in ("article", "nav"):
            self._inside.append(tag)
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
            if "nav" in self._inside:
                self.navigation.add(values["href"])
        loaded = {"img": "src", "script": "src", "link": "href"}.get(tag)
        if loaded and loaded in values and values.get("rel") not in ("canonical", "edit", "next", "prev"):
            self.loaded.append(values[loaded])
        if "article" in self._inside and tag in SHOWN:
            self.shown[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag in ("article", "nav") and tag in self._inside:
            self._inside.remove(tag)

    def handle_data(self, data: str) -> None:
        if "article" in self._inside:
            self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "examples/mkdocs.yml", "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not re.search(r"^(WARNING|ERROR)", said, re.MULTILINE), said
    return folder


@pytest.fixture(scope="module")
def documents(site: Path) -> dict[Path, Document]:
    return {
        page: Document(page.read_text(encoding="utf-8")) for page in site.rglob("*.html") if page.name != "404.html"
    }


def _page(site: Path, name: str) -> Path:
    return site / "index.html" if name == "index" else site / name / "index.html"


def test_every_page_is_in_the_navigation(site: Path, documents: dict[Path, Document]) -> None:
    """On every page of the site."""
    names = {page.stem for page in GUIDE.glob("*.md")} | ({"changelog"} if (ROOT / "CHANGELOG.md").exists() else set())
    assert {_page(site, name) for name in names} == set(documents)
    for page, document in documents.items():
        listed = {(page.parent / urlsplit(link).path / "index.html").resolve() for link in document.navigation}
        assert listed >= {other.resolve() for other in documents}, page


def _leads_somewhere(link: str, page: Path, documents: dict[Path, Document]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        file = re.fullmatch(rf"{re.escape(REPOSITORY)}/(?:blob|tree)/main/([^#?]+)(?:#.*)?", link)
        return file is None or (ROOT / unquote(file[1])).exists()
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    target = target / "index.html" if target.is_dir() else target
    if target not in documents:
        return target.is_file()
    return not parts.fragment or parts.fragment.startswith("__") or unquote(parts.fragment) in documents[target].ids


def test_every_link_leads_somewhere(documents: dict[Path, Document]) -> None:
    """Those to the repository to a file that there is, those within the site to a page or a heading of one."""
    links = [(page, link) for page, document in documents.items() for link in {*document.links, *document.loaded}]
    assert len(links) > 500
    broken = [f"{page.parent.name}: {link}" for page, link in links if not _leads_somewhere(link, page, documents)]
    assert not broken


@pytest.mark.parametrize(
    ("link", "leads_to"),
    [
        ("options.md#norm", "options.md#norm"),
        ("../quickstart.py", f"{REPOSITORY}/blob/main/examples/quickstart.py"),
        ("../benchmarks/", f"{REPOSITORY}/tree/main/examples/benchmarks"),
        ("../../README.md", f"{REPOSITORY}/blob/main/README.md"),
        ("../../CHANGELOG.md", "changelog.md"),
        ("https://pytorch.org/x.md", "https://pytorch.org/x.md"),
        ("../nowhere.py", None),
        ("../../README.md#no-such-heading", None),
        ("../../../elsewhere.md", None),
    ],
)
def test_links_that_leave_the_guide(link: str, leads_to: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """To the repository; one to what is not there is a warning, which fails a strict build."""
    spec = importlib.util.spec_from_file_location("guide_hooks", ROOT / "examples" / "site" / "hooks.py")
    assert spec is not None and spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    links = hooks.LinksThatLeave(REPOSITORY)
    links.page = "control.md"
    turned = links.turned(link, False)
    if leads_to is None:
        assert "control.md" in caplog.text and link in caplog.text
    else:
        assert turned == leads_to and not caplog.text


def test_links_of_the_readme_lead_somewhere(site: Path, documents: dict[Path, Document]) -> None:
    """To files, and to headings of the guide's pages."""
    tokens = MarkdownIt("commonmark").enable("table").parse((ROOT / "README.md").read_text(encoding="utf-8"))
    inline = [child for token in tokens for child in token.children or []]
    links = [str(child.attrs.get("href") or child.attrs.get("src") or "") for child in inline]
    assert any(links)
    broken = []
    for link in filter(None, links):
        parts = urlsplit(link)
        path = ROOT / parts.path
        if parts.scheme or not parts.path:
            continue
        known = documents[_page(site, path.stem)].ids if path.parent == GUIDE and path.exists() else {parts.fragment}
        if not path.exists() or (parts.fragment and parts.fragment not in known):
            broken.append(link)
    assert not broken


def test_nothing_is_loaded_from_elsewhere(documents: dict[Path, Document]) -> None:
    """But what draws a diagram, which the theme fetches where a page has one."""
    assert not {link for document in documents.values() for link in document.loaded if urlsplit(link).netloc}


def test_the_search_knows_every_page(site: Path, documents: dict[Path, Document]) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    found = {entry["location"].split("#")[0] for entry in entries}
    assert found == {
        page.parent.relative_to(site).as_posix().removeprefix(".") + "/" * (page.parent != site) for page in documents
    }
    everything = " ".join(f"{entry['title']} {entry['text']}" for entry in entries)
    for term in ("zero_rows", "FSDP2", "bitsandbytes", "dorafx.optimize", "RewriteLog", "quantised"):
        assert term in everything, term


def test_every_public_name_is_on_the_site(site: Path, documents: dict[Path, Document]) -> None:
    """With its signature's annotations and its docstring's sections."""
    api, extension = (documents[_page(site, name)] for name in ("api", "extension"))
    names = [f"dorafx.{name}" for name in (*dorafx.__all__, "TrainerCallback")]
    assert not [name for name in names if name not in api.ids]
    assert not [name for name in dorafx.extension.__all__ if f"dorafx.extension.{name}" not in extension.ids]
    assert not [i for i in (*api.ids, *extension.ids) if re.search(r"\._[a-z]", i)], "private names"
    text = " ".join(" ".join(api.words).split())
    for part in ("strict : bool = False", "Parameters:", "Returns:", "Raises:", "Examples:", "Attributes:"):
        assert part in text, part
    assert ":func:" not in text and ">>> " in text


def _rendered(text: str) -> Counter[str]:
    html = (
        MarkdownIt("commonmark", {"html": True})
        .enable("table")
        .render(re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL))
    )
    return Document(f"<article>{html}</article>").shown


@pytest.mark.parametrize("name", sorted({page.stem for page in GUIDE.glob("*.md")} - BUILT_BY_PLUGINS))
def test_the_site_shows_what_the_repository_shows(name: str, site: Path, documents: dict[Path, Document]) -> None:
    """MkDocs reads lists and tables otherwise than the rest of the world where no empty line is before them."""
    wanted = _rendered((GUIDE / f"{name}.md").read_text(encoding="utf-8"))
    assert documents[_page(site, name)].shown == wanted
