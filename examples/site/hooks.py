"""What MkDocs does beside its plugins: links that leave the guide, and the changelog as a page of it.

A page links to another page, and to files of the repository, by relative paths, as it must where one reads it there. On the site a link
to a file outside of the guide leads to the repository, a picture from there is copied, and a link to a file that does not exist fails a
strict build. A path of the repository in backquotes, as in docstrings, becomes a link.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.extensions.toc import slugify
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "examples" / "guide"
PAGES = {ROOT / "CHANGELOG.md": "changelog.md"}
"""Files outside of the guide that are pages of the site."""
_PATH = re.compile(r"(?:dorafx|examples|patterns|tests)/[\w./-]+|CHANGELOG\.md")
MKDOCS = "relpath"
"""The name under which MkDocs looks at links; it does not where mkdocstrings renders a docstring."""
STYLE = Path(__file__).with_name("site.css")
PICTURES = "repository"
"""The folder of the site that pictures from outside of the guide are copied to."""

log = get_plugin_logger("guide")


class _Links(Treeprocessor):
    """Turns links of one page that leave the guide."""

    def __init__(self, md: Markdown, extension: LinksThatLeave) -> None:
        super().__init__(md)
        self.extension = extension

    def run(self, root: Element) -> None:
        for element in list(root.iter()):  # without the links that this makes
            attribute = {"a": "href", "img": "src"}.get(element.tag)
            target = element.get(attribute) if attribute else None
            if attribute and target:
                element.set(attribute, self.extension.turned(target, element.tag == "img"))
            if element.tag in ("a", "pre"):
                continue
            for number, child in enumerate(element):
                path = _PATH.fullmatch(str(child.text)) if child.tag == "code" and not len(child) else None
                if path and (ROOT / path[0]).exists():
                    link = Element("a", href=self.extension.of_file(ROOT / path[0], MKDOCS in self.md.treeprocessors))
                    link.tail, child.tail = child.tail, None
                    link.append(child)
                    element[number] = link


class LinksThatLeave(Extension):
    """Knows the page that is rendered, and which pictures the site needs."""

    def __init__(self, repository: str) -> None:
        super().__init__()
        self.repository = repository.rstrip("/")
        self.page = ""
        self.files: Files | None = None
        self.pictures: set[Path] = set()

    def extendMarkdown(self, md: Markdown) -> None:
        # Before MkDocs looks at the links, after all that makes some.
        md.treeprocessors.register(_Links(md, self), "links_that_leave", 1)

    def turned(self, target: str, is_picture: bool) -> str:
        """The link as the site has it."""
        link = urlsplit(target)
        if link.scheme or link.netloc or not link.path or link.path.startswith("/"):
            return target
        source = next((path for path, name in PAGES.items() if name == self.page), GUIDE / self.page)
        path = Path(os.path.normpath(source.parent / link.path))
        fragment = f"#{link.fragment}" if link.fragment else ""
        if _is_page(path):
            return self.of_file(path, True) + fragment
        if not path.is_relative_to(ROOT) or not path.exists():
            log.warning(
                f"Doc file '{self.page}' contains a link '{target}', but there is no such file in the repository."
            )
            return target
        if link.fragment and path.suffix == ".md" and link.fragment not in _anchors(path):
            log.warning(f"Doc file '{self.page}' contains a link '{target}', but the file has no such heading.")
        if is_picture:
            self.pictures.add(path)
            up = 0 if self.page == "index.md" else len(Path(self.page).parts)
            return "../" * up + f"{PICTURES}/{path.relative_to(ROOT).as_posix()}"
        return self.of_file(path, True) + fragment

    def of_file(self, path: Path, is_source: bool) -> str:
        """The link to a file of the repository; to a page as its source has it, or as the site has it."""
        if not _is_page(path):
            return f"{self.repository}/{'tree' if path.is_dir() else 'blob'}/main/{path.relative_to(ROOT).as_posix()}"
        name = PAGES.get(path) or path.relative_to(GUIDE).as_posix()
        found, here = (self.files.get_file_from_path(n) if self.files else None for n in (name, self.page))
        if is_source or found is None or here is None:
            return os.path.relpath(name, os.path.dirname(self.page) or ".")
        return found.url_relative_to(here)


def _is_page(path: Path) -> bool:
    return path in PAGES or path.is_relative_to(GUIDE)


def _anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {slugify(re.sub(r"[`*]", "", title), "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


_links: LinksThatLeave | None = None


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    global _links
    _links = LinksThatLeave(config.repo_url or "")
    config.markdown_extensions.append(_links)  # type: ignore[arg-type]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, name in PAGES.items():
        if path.exists():
            files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    files.append(File.generated(config, STYLE.name, abs_src_path=str(STYLE)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    assert _links is not None
    _links.page, _links.files = page.file.src_uri, files
    # In a table's cell code is HTML, where indices look like links to a heading.
    return re.sub(r"<code>.*?</code>", lambda code: code[0].replace("[", "&#91;"), markdown)


def on_post_build(config: MkDocsConfig) -> None:
    assert _links is not None
    for path in _links.pictures:
        copy = Path(config.site_dir) / PICTURES / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
