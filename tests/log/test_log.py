"""The log as data, text and HTML, and what it says to files that are no logs."""

from __future__ import annotations

import json
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dorafx import DorafxWarning, Record, RewriteLog, rewrite_log
from dorafx.log import Drawing, DrawnNode, DrawnTerms
from dorafx.log.table import fold, human_bytes, human_flops

HOSTILE = "</code><script>alert(1)</script>{{ 7*7 }}"


def record(i: int = 0, status: str = "rewritten", **changes: object) -> Record:
    values = {
        "status": status,
        "site": f"model.layers.{i}.q_proj",
        "pattern": "linear",
        "d_out": 64,
        "d_in": 32,
        "rank": 4,
    }
    return Record.from_dict({**values, "dtype": "bfloat16", "dense_bytes_avoided": 4096, "graph": 1, **changes})


def full_log() -> RewriteLog:
    log = RewriteLog()
    log.extend(record(i) for i in range(32))
    log.add(record(3, "missed", reason="operator tanh at model.py:7 stands in between", source="model.py:7"))
    log.add_note("polyfill installed: peft.f")
    return log


def test_views() -> None:
    log = full_log()
    assert (len(log.rewrites), len(log.misses), len(log.records)) == (32, 1, 33)
    assert log.to_records()[0]["site"] == "model.layers.0.q_proj"
    log.clear()
    assert log.records == []
    assert log.notes == []


def test_records_make_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(full_log().to_records())
    assert frame.groupby(["status", "pattern"]).dense_bytes_avoided.sum().to_dict() == {
        ("missed", "linear"): 4096,
        ("rewritten", "linear"): 32 * 4096,
    }
    assert {str(t) for t in frame.dtypes} <= {"int64", "object", "str"}
    assert not frame.isna().any().any()


def test_json_round_trip() -> None:
    log = full_log()
    again = RewriteLog.from_json(log.to_json())
    assert again.records == log.records
    assert again.notes == log.notes


def test_text_folds_layers_and_gives_reasons() -> None:
    text = str(full_log())
    assert "model.layers.*.q_proj" in text
    assert " 32 " in text
    assert "operator tanh at model.py:7" in text
    assert "32 modules rewritten, 1 missed, 128 KiB" in text
    assert fold([record(0), record(0), record(1)])[0].count == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("hello", "not JSON"),
        ("[1, 2]", "'dorafx_log' is absent"),
        ('{"a": 1}', "'dorafx_log' is absent"),
        ('{"dorafx_log": 99, "records": []}', "version 99; this dorafx reads versions 1 and 2"),
        ('{"dorafx_log": 1, "records": [{"status": "eaten"}]}', "record 0.*'eaten'"),
        ('{"dorafx_log": 1, "records": [{"site": "x"}]}', "'status' is absent"),
        ('{"dorafx_log": 1, "records": [{"status": "missed", "rank": "four"}]}', "'rank' is 'four', not int"),
        ('{"dorafx_log": 1, "records": [{"status": "missed", "colour": 1}]}', "unknown field 'colour'"),
        ('{"status": "missed", "rank": -1}', "'rank' is not between"),
        ('{"status": "missed", "d_out": 1' + "0" * 400 + "}", "'d_out' is not between"),
        ("[" * 100_000, "nested too deeply"),
        ('{"dorafx_log": 1, "records": {}}', "must be lists"),
        ('{"status": "missed"}\n{"status": "mis\n', "line 2: not JSON"),
        ('{"status": "mis', "not JSON"),
        ('{"status": "missed", "d_out": 1' + "0" * 5000 + "}", "not a dorafx log: a number of too many digits"),
        ('{"status": "missed"}\n{"rank": 1' + "0" * 5000 + "}\n", "line 2: a number of too many digits"),
    ],
)
def test_what_is_no_log_is_said(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewriteLog.from_json(text)


def test_a_last_line_that_a_kill_cut_off_is_left_out() -> None:
    log = RewriteLog.from_json('{"status": "missed", "site": "a"}\n{"status": "missed", "site": "b"}\n{"status": "mis')
    assert [r.site for r in log.misses] == ["a", "b"]
    assert log.notes == ["line 3 of the log was cut off, and is left out"]


def test_html_is_escaped_and_self_contained(tmp_path: Path) -> None:
    log = full_log()
    log.add(record(site=HOSTILE, reason=HOSTILE, source=HOSTILE, pattern=HOSTILE))
    log.add_note(HOSTILE)
    page = log.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "{{ 7*7 }}" in page
    assert "http://" not in page
    assert "https://" not in page
    assert page.index('class="missed"') < page.index('class="rewritten"')


class Page(HTMLParser):
    """What a browser would see of a page: elements with their attributes, and what stands inside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.code: list[str] = []
        self.text: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        (self.code if self._inside in ("script", "style") else self.text).append(data)


@pytest.mark.parametrize(
    "hostile",
    [
        HOSTILE,
        "</script><script>alert(1)</script>",
        "</style><img src=x onerror=alert(1)>",
        '" onmouseover="alert(1)" x="',
        "' onfocus='alert(1)' autofocus='",
        "--><svg onload=alert(1)>",
        "]]><iframe srcdoc='<script>alert(1)</script>'>",
        '<a href="javascript:alert(1)">x</a>',
        "{% include '/etc/passwd' %}{{ self.__init__.__globals__ }}",
        "\u2028</ScRiPt\t><SCRIPT>alert(1)</SCRIPT>",
    ],
)
def test_no_text_of_a_log_becomes_part_of_the_page(hostile: str, tmp_path: Path) -> None:
    """In every field that holds text, also by way of a file: the page has the elements of a page of plain words, and hands
    no more to its scripts."""

    def page(text: str) -> Page:
        log = RewriteLog()
        words = (
            "site",
            "pattern",
            "reason",
            "kind",
            "decision",
            "source",
            "dtype",
            "norm_algorithm",
            "norm_placement",
            "codegen",
        )
        for status in ("rewritten", "missed"):
            log.add(record(0, status, **dict.fromkeys(words, text)))
        nodes = (DrawnNode("x", "input"), DrawnNode(*[text] * 6, inputs=(0,), replaces=(text,)))
        drawing = Drawing(nodes, nodes, DrawnTerms(*[(text,)] * 3, text))
        log.extend([record(0, "missed", drawing=text)], {text: drawing})
        log.add_note(text)
        log.norms.count_invalidated(text)
        again = RewriteLog.from_json(log.to_json())
        return Page(again.to_html(tmp_path / "report.html").read_text(encoding="utf-8"))

    def known(found: Page) -> set[tuple[str, str]]:
        return {(tag, name) for tag, attributes in found.elements for name, _ in attributes}

    plain, found = page("plain"), page(hostile)
    assert [tag for tag, _ in found.elements] == [tag for tag, _ in plain.elements]
    assert known(found) == known(plain), "an attribute came from the log"

    def leading_out(found: Page) -> set[tuple[str, str]]:
        pairs = ((n, v) for _, attributes in found.elements for n, v in attributes)
        return {(n, v) for n, v in pairs if n.startswith("on") or (n in ("href", "src") and not v.startswith("#d-"))}

    assert leading_out(found) == leading_out(plain), "an event or an address came from the log"
    if all("plain" not in code for code in plain.code):
        assert found.code == plain.code
    else:  # data for the page's own script: it must not end the element, which the elements above show
        assert len(found.code) == len(plain.code)
    assert hostile.replace("\t", " ").split("{{")[0] in "".join(found.text).replace("\t", " ")


def test_a_page_of_text_that_is_no_text(tmp_path: Path) -> None:
    """Half of a surrogate pair, which JSON can hold and a file cannot."""
    log = RewriteLog.from_json(json.dumps({"dorafx_log": 2, "records": [{"status": "missed", "site": "a\ud800"}]}))
    assert "a\\ud800" in log.to_html(tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_page_of_long_words(tmp_path: Path) -> None:
    log = RewriteLog()
    log.add(record(0, "missed", reason="x" * 300_000))
    started = time.process_time()
    log.to_html(tmp_path / "report.html")
    assert time.process_time() - started < 10  # minutes, if each letter is looked at as the beginning of a path


def test_notes_and_counts_are_bounded() -> None:
    log = RewriteLog(max_records=5)
    for i in range(3000):
        log.add_note(str(i))
    assert log.notes == [str(i) for i in range(2000, 3000)]
    again = RewriteLog.from_json(log.to_json())
    assert again.notes == log.notes
    lines = "\n".join(json.dumps(record(i).to_dict()) for i in range(50))
    assert len(RewriteLog.from_json(lines).records) == 50


def test_a_byte_order_mark_is_no_obstacle() -> None:
    assert RewriteLog.from_json("\ufeff" + full_log().to_json()).records == full_log().records


def test_text_takes_names_literally() -> None:
    log = RewriteLog()
    log.add(record(site="a[/b].blocks[0]\x1b[31m", pattern="[bold]p"))
    log.add(record(status="missed", site="c[/d]", reason="\x1b[2J"))
    text = str(log)
    assert "a[/b].blocks[0]" in text
    assert "[bold]p" in text
    assert "c[/d]" in text
    assert "\x1b" not in text


def test_threads_lose_nothing() -> None:
    log = RewriteLog(max_records=1000)
    threads = [threading.Thread(target=lambda: [log.add(record(i)) for i in range(300)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log.records) == 1000
    assert log.dropped == 200


def test_bounded() -> None:
    log = RewriteLog(max_records=10)
    log.extend(record(i) for i in range(25))
    assert len(log.records) == 10
    assert log.dropped == 15
    assert "15 oldest records dropped" in str(log)


def test_stream_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    monkeypatch.setenv("DORAFX_LOG", str(path))
    rewrite_log().extend([record(0), record(1)])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["site"] for line in lines] == ["model.layers.0.q_proj", "model.layers.1.q_proj"]
    assert RewriteLog.from_json(path.read_text(encoding="utf-8")).records == rewrite_log().records


def test_an_unwritable_stream_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DORAFX_LOG", str(tmp_path / "no" / "such" / "folder.jsonl"))
    log = rewrite_log()
    monkeypatch.setattr(log, "_stream_failed", False)
    with pytest.warns(DorafxWarning, match="DORAFX_LOG: cannot write") as warned:
        log.add(record(0))
        log.add(record(1))
    assert len(warned) == 1
    assert len(log.records) == 2


def test_units() -> None:
    assert (human_bytes(0), human_bytes(65536), human_bytes(3 << 30)) == ("0 B", "64 KiB", "3 GiB")
    assert (human_flops(131072), human_flops(2.5e12)) == ("131 k", "2.5 T")


def test_text_is_text_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """There rich displays what it prints, and the text that it should have written would be empty."""
    log = full_log()
    before = str(log)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert str(log) == before != ""
