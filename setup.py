"""The page at the index of packages: the README, with addresses in place of the paths that lead nowhere there. The rest is in
``pyproject.toml``."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def described(readme: str, source: str, revision: str) -> str:
    """A README whose links and pictures lead to a revision of the repository. Code stays as it is."""
    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", readme, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if number % 2 else _linked(part, source, revision) for number, part in enumerate(parts))


def _linked(text: str, source: str, revision: str) -> str:
    relative = r"(?!#|[a-z]+:)(?:\./)?"
    for target, folder in ((r"!\[[^]]*\]\(|\b(?:src|srcset)=[\"']", "raw"), (r"(?<=\])\(|\bhref=[\"']", "blob")):
        text = re.sub(f"({target}){relative}", rf"\g<1>{source}/{folder}/{revision}/", text)
    return text


def found(pattern: str, path: str) -> str:
    (text,) = re.findall(pattern, (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    return str(text)


if __name__ == "__main__":
    setup(
        long_description=described(
            (ROOT / "README.md").read_text(encoding="utf-8"),
            source=found(r'^Source = "(.+)"$', "pyproject.toml"),
            revision="v" + found(r'^__version__ = "(.+)"$', "dorafx/__init__.py"),
        ),
        long_description_content_type="text/markdown",
    )
