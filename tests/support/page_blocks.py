"""The code blocks of a Markdown page, run as a reader would who pastes one after the other, and how long its blocks of text are.

Python and Bash blocks run in order, in one folder; the Python ones in one namespace. What surrounds them decides about the rest:

- ``<!-- run`` on a line, Python code, ``-->``: runs, and is not shown. ``<!-- run bash`` does the same for Bash.
- ``<!-- run instead``, code in the block's language, ``-->`` right before a block: runs in its place.
- ``<!-- not run: REASON -->`` right before a block: nothing runs.

Every other block (``text``, ``json``, ``mermaid``) is shown only. In a Bash block ``git clone``, ``python3 -m venv`` and ``pip install`` are
left out, and what is in ``.venv/bin/`` is the command of this environment. ``python tests/support/page_blocks.py PAGE…`` runs pages and says what is wrong.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
import tokenize
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

__all__ = ["MOST_WORDS", "Block", "blocks_of", "complaints", "long_texts", "run_page", "texts_of"]

MOST_WORDS = 80
"""In a paragraph, a list item or a table's cell."""
RUNS = ("python", "bash")
_INSTALLS = re.compile(
    r"python3? -m venv \S+|(?:\S*/)?pip install .+|(?:source|\.) .venv/bin/activate|git clone .+|cd dorafx"
)
_EXTRA = re.compile(r"dorafx\[([\w,]+)\]|\.\[([\w,]+)\]")


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        language: ``"python"``, ``"bash"`` or another.
        line: of its first line of code in the page, from 0.
        shown: the code that a reader sees; empty for a hidden one.
        code: the code that runs; empty where none does.
        reason: why none does, if the page says so.
    """

    language: str
    line: int
    shown: str
    code: str
    reason: str = ""


def _tokens(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def blocks_of(text: str) -> list[Block]:
    """The code blocks of a page, hidden ones too.

    Raises:
        ValueError: a comment that begins with ``run`` or ``not run`` is not one of those above, or stands before no block.
    """
    found: list[Block] = []
    before: tuple[str, str, int] | None = None  # of a comment about the next block: its kind, its text, its line
    for token in _tokens(text):
        if token.type == "html_block" and token.map is not None:
            comment = re.match(r"\s*<!--\s*(not run|run)\b(.*)", token.content, re.DOTALL)
            if comment is None:
                continue
            line = token.map[0]
            if before is not None:
                raise ValueError(f"line {before[2] + 1}: stands before no block")
            kind, rest = comment[1], comment[2]
            if kind == "not run":
                reason = re.fullmatch(r":(.+?)-->\s*", rest, re.DOTALL)
                if reason is None or len(reason[1].split()) < 3:
                    raise ValueError(f"line {line + 1}: wants <!-- not run: REASON -->")
                before = kind, reason[1].strip(), line
                continue
            hidden = re.fullmatch(r"( instead| bash)?[ \t]*\n(.*?)^\s*-->\s*", rest, re.DOTALL | re.MULTILINE)
            if hidden is None:
                raise ValueError(
                    f"line {line + 1}: wants <!-- run, <!-- run bash or <!-- run instead, code, and --> on lines"
                )
            if hidden[1] == " instead":
                before = "instead", hidden[2], line + 1
            else:
                found.append(Block("bash" if hidden[1] else "python", line + 1, "", hidden[2]))
        elif token.type == "fence" and token.map is not None:
            language = (token.info.split() or [""])[0].lower()
            line, code = token.map[0] + 1, token.content
            if before is not None and language not in RUNS:
                raise ValueError(f"line {before[2] + 1}: stands right before no Python or Bash block")
            if before is None:
                found.append(Block(language, line, code, code if language in RUNS else ""))
            elif before[0] == "instead":
                found.append(Block(language, before[2], code, before[1]))
            else:
                found.append(Block(language, line, code, "", before[1]))
            before = None
        elif before is not None and token.type in ("inline", "code_block"):
            raise ValueError(f"line {before[2] + 1}: stands right before no Python or Bash block")
    if before is not None:
        raise ValueError(f"line {before[2] + 1}: stands before no block")
    return found


def complaints(text: str, extras: frozenset[str]) -> list[str]:
    """What is wrong with a page's blocks, before they run: code that runs instead of something else, and extras that there are not."""
    found = []
    for block in blocks_of(text):
        if block.code and block.shown and block.code != block.shown:
            absent = _names(block.shown, block.language) - _names(block.code, block.language)
            if absent:
                found.append(f"line {block.line + 1}: what runs instead lacks {', '.join(sorted(absent))}")
        if block.language == "bash":
            named = {
                extra for pair in _EXTRA.findall(block.shown) for part in pair for extra in part.split(",") if extra
            }
            if named - extras:
                found.append(f"line {block.line + 1}: no extra {', '.join(sorted(named - extras))}")
    return found


def _names(code: str, language: str) -> set[str]:
    """What must be the same in code that is shown and code that runs: names in Python; in Bash options, and commands with theirs."""
    if language == "bash":
        found: set[str] = set()
        for command in re.split(r"\n|&&|\|\|?|;", "\n".join(_commands(code))):
            words = [word for word in command.split() if not re.match(r"\w+=", word)]
            found |= {word.partition("=")[0] for word in words if word.startswith("--")}
            found |= {
                word for word in itertools.takewhile(lambda word: not word.startswith("-"), words) if word.isalpha()
            }
        return found
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError):
        return set(re.findall(r"\b[A-Za-z_]\w*", re.sub(r"#.*|\"[^\"\n]*\"|'[^'\n]*'", "", code)))
    return {token.string for token in tokens if token.type == tokenize.NAME}


def _commands(code: str) -> list[str]:
    """The lines of a Bash block as the tests run them: nothing is installed, and the commands are those of this environment."""
    lines = []
    for line in re.sub(r"\\\n\s*", "", code).split("\n"):
        line = re.sub(r"(^|\s)#.*", "", line)
        parts = [part.strip() for part in line.split(" && ")]
        lines.append(" && ".join(part.replace(".venv/bin/", "", 1) for part in parts if not _INSTALLS.fullmatch(part)))
    return lines


def run_page(page: Path, folder: Path, quiet: bool = False) -> types.ModuleType:
    """Run a page's blocks in a folder, which becomes the current one, and return the Python ones' namespace.

    The Python code lies in the folder as a module whose lines are those of the page, so that tracebacks and logs name them. The working
    folder, the environment and ``sys.modules`` are as before afterwards.

    Raises:
        RuntimeError: a Bash block fails; the message has what it printed.
        Exception: what a Python block raises.
    """
    text = page.read_text(encoding="utf-8")
    blocks = blocks_of(text)
    name = "page_" + re.sub(r"\W", "_", page.stem)
    module = types.ModuleType(name)
    lines = [""] * (text.count("\n") + 2)
    for block in blocks:
        if block.code and block.language == "python":
            code = block.code.rstrip("\n").split("\n")
            lines[block.line : block.line + len(code)] = code
    program = folder / f"{name}.py"
    program.write_text("\n".join(lines), encoding="utf-8")
    module.__file__ = str(program)
    environment, here = dict(os.environ), Path.cwd()
    sys.modules[name] = module
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(folder)
    try:
        for block in blocks:
            if not block.code:
                continue
            if block.language == "bash":
                _run_bash("\n".join(_commands(block.code)), folder, quiet)
            else:
                # The lines before are those of the page.
                exec(compile("\n" * block.line + block.code, str(program), "exec"), vars(module))
    finally:
        os.chdir(here)
        os.environ.clear()
        os.environ.update(environment)
        del sys.modules[name]
    return module


def _run_bash(code: str, folder: Path, quiet: bool) -> None:
    commands = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", code],
        cwd=folder,
        env={**os.environ, "PATH": os.pathsep.join(commands)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
        timeout=540,
    )
    if not quiet:
        print(done.stdout, end="")
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode} of:\n{code}\n{done.stdout[-3000:]}")


def texts_of(text: str) -> Iterator[tuple[int, str]]:
    """The line, from 0, and the words of each paragraph, heading, list item, quotation and table cell of a page, without links' targets.

    A list item's and a quotation's paragraphs are one text, and the items of a list inside of an item are texts of their own. What is
    indented, as the text of an admonition, is read as a page of its own.
    """
    open_texts: list[tuple[int, list[str]]] = []
    for token in _tokens(text):
        if token.type in ("list_item_open", "blockquote_open"):
            open_texts.append((token.map[0] if token.map else 0, []))
        elif token.type in ("list_item_close", "blockquote_close"):
            line, parts = open_texts.pop()
            yield line, " ".join(parts)
        elif token.type == "inline":
            words = "".join(_shown(child) for child in token.children or [])
            if open_texts:
                open_texts[-1][1].append(words)
            else:
                yield (token.map[0] if token.map else 0), words
        elif token.type == "code_block" and token.map is not None:
            for line, words in texts_of(token.content):
                yield token.map[0] + line, words


def _shown(token: Token) -> str:
    if token.type in ("softbreak", "hardbreak"):
        return " "
    if token.type == "html_inline":
        return " " if token.content.startswith("<br") else ""
    if token.type == "image":
        return token.content
    return token.content if token.type in ("text", "code_inline") else ""


def long_texts(text: str, most: int = MOST_WORDS) -> list[str]:
    """What is longer than so many words in a page, each with its line and length."""
    long = [(line, words.split()) for line, words in texts_of(text)]
    return [
        f"line {line + 1}: {len(words)} words: {' '.join(words[:8])} …" for line, words in long if len(words) > most
    ]


def _main(pages: list[str]) -> int:
    failed = False
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / "tests" / "support")]
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    optional = project.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = frozenset(re.findall(r"^(\w+) = \[", optional, re.MULTILINE))
    for page in map(Path, pages):
        text = page.read_text(encoding="utf-8")
        wrong = [*long_texts(text), *complaints(text, extras)]
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                run_page(page.resolve(), Path(folder))
            except Exception as error:
                import traceback

                traceback.print_exc()
                wrong.append(f"{type(error).__name__}: {error}")
        blocks = blocks_of(text)
        shown = [block for block in blocks if block.shown]
        print(
            f"\n{page.name}: {len(text.split())} words; {sum(bool(b.code) for b in shown)} of {len(shown)} blocks run, "
            f"{sum(bool(b.reason) for b in shown)} not run, {time.perf_counter() - begun:.1f} s"
        )
        for line in wrong:
            print(f"  {page.name} {line}")
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
