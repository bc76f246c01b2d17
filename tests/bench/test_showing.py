"""Tables and plots, made from the JSON of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from colours import closest, of_css
from test_bench_results import sample

from dorafx.bench.plot import STYLES
from dorafx.bench.results import Results
from dorafx.bench.table import human
from dorafx.cli import main


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.json"
    path.write_text(sample().to_json(), encoding="utf-8")
    return path


def test_table(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--table", str(file)]) == 0
    text = capsys.readouterr().out
    assert "norm: 8x8 r2" in text
    ours, stock = (
        next(line for line in text.splitlines() if f" {name}  " in line and "ms" in line) for name in ("dorafx", "peft")
    )
    assert ours.split() == ["time", "dorafx", "2", "ms", "1.5", "..", "2.5", "ms", "1.00x", "50%"]
    assert stock.split() == ["peft", "4", "ms", "2.00x", "25%"]
    assert "dense failed: OutOfMemoryError: of memory" in text
    assert "copy 2 MB/s, matmul 4 GFLOP/s" in text
    assert max(len(line) for line in text.splitlines()[4:]) <= 80


def test_table_as_markdown(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--table", str(file), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| 8x8 r2 | time | dorafx | 2 ms | 1.5 .. 2.5 ms | 1.00x | 50% |" in lines
    assert "| 8x8 r2 | failed: OutOfMemoryError: of memory | dense | | | | |" in lines
    assert lines.count("### norm") == 1


def test_what_is_to_be_said_of_a_row_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = sample()
    results.rows[0].note = "without a kernel"
    results.rows[1].metrics, results.rows[1].left_out = {}, "no time"
    path = tmp_path / "run.json"
    results.write(path)
    assert Results.read(path) == results
    assert main(["bench", "--table", str(path), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| 8x8 r2 | note: without a kernel | dorafx | | | | |" in lines
    assert "| 8x8 r2 | left out: no time | peft | | | | |" in lines
    assert main(["bench", "--table", str(path)]) == 0
    assert "dorafx note: without a kernel" in capsys.readouterr().out


def test_table_as_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--table", str(file), "--json"]) == 0
    assert Results.from_json(capsys.readouterr().out) == sample()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "s", "0 us"),
        (2.5e-7, "s", "0.25 us"),
        (1.234, "s", "1.23 s"),
        (2048, "B", "2 KiB"),
        (3.0, "count", "3"),
        (0.0123, "share", "1.2%"),
        (4.3e12, "B/s", "4.3 TB/s"),
        (12.0, "FLOP/s", "12 FLOP/s"),
    ],
)
def test_figures_for_people(value: float, unit: str, text: str) -> None:
    assert human(value, unit) == text


def test_plot(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    assert main(["bench", "--plot", str(file), "-o", str(picture)]) == 0
    assert capsys.readouterr().out.strip() == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    vector = tmp_path / "out.svg"
    assert main(["bench", "--plot", str(file), "-o", str(vector)]) == 0
    assert "<svg" in vector.read_text(encoding="utf-8")
    assert main(["bench", "--plot", str(file)]) == 0
    assert file.with_suffix(".png").exists()


def test_bars_that_everybody_can_tell_apart(file: Path, tmp_path: Path) -> None:
    """By colour, also who lacks one kind of cones; by a hatch; and by name."""
    pytest.importorskip("matplotlib")
    colours, hatches = zip(*STYLES.values())
    assert closest(map(of_css, colours)) > 15
    assert len(set(hatches)) == len(STYLES)
    picture = tmp_path / "out.svg"
    assert main(["bench", "--plot", str(file), "-o", str(picture)]) == 0
    text = picture.read_text(encoding="utf-8")
    assert all(STYLES[name][0] in text and f"ms, {name}" in text for name in ("dorafx", "peft"))


def test_plots_that_cannot_be(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--plot", str(file), "-o", "out.gif"]) == 2
    assert "must end in .png, .svg, .pdf, not 'out.gif'" in capsys.readouterr().err
    empty = tmp_path / "empty.json"
    empty.write_text(Results().to_json(), encoding="utf-8")
    assert main(["bench", "--plot", str(empty)]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    empty.write_text("{}", encoding="utf-8")
    assert main(["bench", "--plot", str(empty)]) == 2
    assert f"{empty}: not the JSON of a bench run" in capsys.readouterr().err


def test_plot_without_matplotlib(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["bench", "--plot", str(file)]) == 2
    assert capsys.readouterr().err.strip() == "dorafx: bench --plot needs matplotlib: pip install 'dorafx[bench]'"
