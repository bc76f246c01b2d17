"""``dorafx bench --kernels``; what it compiles, ``tests/ops/test_triton_compile.py`` checks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from dorafx.bench import ahead
from dorafx.cli import main
from dorafx.ops.triton import configs

pytestmark = pytest.mark.triton


def _row(**resources: int) -> ahead.Row:
    card = ahead.CARDS[90]
    launch = ahead.dense_launch(configs.Problem(384, 2, 2, 2), card, *ahead.SHAPE)
    taken = dataclasses.replace(ahead.Resources(178, 0, 147456), **resources)
    seconds = launch.seconds(card, 1, 2)
    return ahead.Row("dense", "bf16 weight, bf16 factors", 384, card, launch, taken, 1, seconds)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[ahead.Row]:
    found = [_row()]
    asked: list[Any] = []

    def compile_all(architectures: Any = tuple(ahead.CARDS), ranks: Any = ahead.RANKS, report: Any = print) -> Any:
        asked.append((architectures, ranks))
        report("sm_90: 1 kernels so far")
        return found

    monkeypatch.setattr(ahead, "rows", compile_all)
    return found


def test_the_page_is_written(rows: list[ahead.Row], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "KERNELS.md"
    assert main(["bench", "--kernels", "-o", str(page)]) == 0
    assert page.read_text() == ahead.markdown(rows)
    out, err = capsys.readouterr()
    assert out == "" and "sm_90: 1 kernels so far" in err
    assert main(["bench", "--kernels"]) == 0
    assert capsys.readouterr().out == page.read_text()


def test_what_is_not_within_its_limits_is_an_exit_code(rows: list[ahead.Row]) -> None:
    rows.append(_row(spilled=4))
    assert main(["bench", "--kernels"]) == 1


def test_it_measures_no_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "norm", "--kernels"]) == 2
    assert "leave suites and --json out" in capsys.readouterr().err


def test_the_prediction_is_the_largest_of_three_times() -> None:
    """Each alone, in a launch that fills the card's multiprocessors exactly once, and in one that half fills a second time."""
    card = ahead.CARDS[90]
    whole = ahead.Launch(configs.HOPPER[0], 132, 1, l2=0.0, memory=0.0, flops=0.0)
    launch = whole.seconds(card, 1, 2)
    for field, rate in (("memory", card.memory), ("l2", card.l2), ("flops", card.half)):
        only = dataclasses.replace(whole, **{field: rate * 1e-3})
        assert only.seconds(card, 1, 2) - launch == pytest.approx(1e-3)
    products = dataclasses.replace(whole, flops=card.half * 1e-3)
    assert products.seconds(card, 1, 4) - launch == pytest.approx(2e-3)
    assert dataclasses.replace(products, programs=198).seconds(card, 1, 2) - launch == pytest.approx(4e-3 / 3)


def test_programs_that_a_multiprocessor_has() -> None:
    card = ahead.CARDS[90]
    for registers, shared, warps, programs in (
        (128, 0, 8, 2),
        (129, 0, 8, 1),
        (32, 0, 8, 8),
        (32, 113 << 10, 8, 2),
        (32, 114 << 10, 8, 1),
        (255, 228 << 10, 8, 0),
    ):
        assert ahead.resident_programs(card, ahead.Resources(registers, 0, shared), warps) == programs
