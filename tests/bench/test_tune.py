"""The search for launch configurations, with a timer of ours in the device's place."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dorafx.bench import tune
from dorafx.bench.shapes import Shape
from dorafx.cli import main
from dorafx.errors import DorafxError
from dorafx.ops.triton import configs
from dorafx.ops.triton.configs import RowNormConfig

PROBLEMS = [tune.Problem(256, 256, 16, 2), tune.Problem(512, 256, 16, 2)]
GPU = configs.gpu(torch.device("cpu"))
PRESENT = configs.HOPPER[0]


def test_the_fastest_over_all_problems_is_found() -> None:
    wanted = replace(PRESENT, rows=128, num_warps=4)

    def timer(config: RowNormConfig, problem: tune.Problem) -> float:
        base = 1e-6 * problem.d_out
        if config == wanted:
            return base / 2
        # Faster on one problem by three, slower on the other by six: not the best.
        one_sided = config == replace(PRESENT, rows=256)
        return base * (1 / 3 if problem.d_out == 256 else 6) if one_sided else base

    tried = [replace(PRESENT, rows=256), wanted, PRESENT, replace(PRESENT, columns=32)]
    choice = tune.search(PRESENT, tried, PROBLEMS, timer)
    assert choice.config == wanted
    assert math.isclose(choice.gain, 2.0)
    assert (choice.tried, choice.failed) == (4, 0)


def test_the_present_one_stays_where_nothing_is_faster() -> None:
    choice = tune.search(PRESENT, tune.candidates(PRESENT, GPU), PROBLEMS, lambda config, problem: 1e-5)
    assert choice.config == PRESENT and choice.gain == 1.0


def test_what_does_not_run_is_left_out() -> None:
    def timer(config: RowNormConfig, problem: tune.Problem) -> float:
        if config.num_stages == 4 and config != PRESENT:
            raise RuntimeError("out of resources: shared memory")
        return 1.0 if config == PRESENT else 0.5

    tried = [replace(PRESENT, columns=32, num_stages=4), replace(PRESENT, columns=32, num_stages=2)]
    choice = tune.search(PRESENT, tried, PROBLEMS, timer)
    assert choice.config.num_stages == 2 and (choice.tried, choice.failed) == (2, 1)


def test_the_present_one_must_run() -> None:
    def timer(config: RowNormConfig, problem: tune.Problem) -> float:
        raise RuntimeError("no kernel image is available\nmore lines")

    with pytest.raises(DorafxError, match=r"RowNormConfig\(.*failed: RuntimeError: no kernel image is available$"):
        tune.search(PRESENT, [], PROBLEMS, timer)


def test_every_row_of_the_table_is_searched_at_its_ranks() -> None:
    seen: dict[tuple[int, int | None], set[tuple[int, int, int]]] = {}

    def timer(config: RowNormConfig, problem: tune.Problem) -> float:
        assert config.factor_bytes == problem.factor_bytes
        assert config.max_rank is None or problem.rank <= config.max_rank <= 8 * config.depth
        key = (config.factor_bytes, config.max_rank)
        seen.setdefault(key, set()).add((problem.d_out, problem.d_in, problem.rank))
        return 1e-3 / config.num_stages

    lines: list[str] = []
    choices = tune.tune(configs.HOPPER, GPU, [Shape(100, 200, 7)], timer, lines.append)
    assert len(choices) == len(lines) == len(configs.HOPPER)
    for choice, present in zip(choices, configs.HOPPER, strict=True):
        assert (choice.config.factor_bytes, choice.config.max_rank) == (present.factor_bytes, present.max_rank)
        assert choice.config.num_stages == 4
    assert seen[(2, 16)] == {(100, 200, 16)}
    assert seen[(4, None)] == {(100, 200, 256), (100, 200, 384)}


def test_rows_that_the_card_has_no_memory_for_stay_as_they_are() -> None:
    small = replace(GPU, block_bytes=99 << 10)
    lines: list[str] = []
    choices = tune.tune(configs.HOPPER, small, [Shape(100, 200, 7)], lambda config, problem: 1e-3, lines.append)
    left = [c for c in choices if not c.tried]
    assert [(c.config.factor_bytes, c.config.max_rank) for c in left] == [(2, 128), (2, 384), (2, 512), (4, 64)]
    assert sum("does not fit this card" in line for line in lines) == len(left)


def test_the_table_is_python_to_paste() -> None:
    choices = [tune.Choice(config, 1.0, 1, 0) for config in configs.HOPPER]
    namespace = {"RowNormConfig": RowNormConfig}
    exec(tune.paste("ROW_NORM_90", choices), namespace)
    assert namespace["ROW_NORM_90"] == configs.HOPPER


@pytest.mark.parametrize("architecture", sorted(configs.TABLES))
def test_candidates_fit_a_processor(architecture: int) -> None:
    gpu = replace(GPU, architecture=architecture, block_bytes=227 << 10)
    for present in configs.TABLES[architecture]:
        found = tune.candidates(present, gpu)
        assert len(found) == len(set(found)) > 5
        assert any(replace(c, programs=present.programs) == present for c in found)
        narrow = configs.Problem(present.max_rank or 0, present.factor_bytes, present.factor_bytes, 2)
        for config in found:
            assert (config.max_rank, config.weight_bytes) == (present.max_rank, present.weight_bytes)
            assert config.rows * config.columns <= 64 * 32 * config.num_warps
            assert config.shared_bytes(narrow, architecture) <= gpu.block_bytes


def test_architectures_have_tables() -> None:
    assert configs.table_of(80) is configs.TABLES[80]
    assert configs.table_of(89) is configs.TABLES[80]
    assert configs.table_of(103) is configs.TABLES[100]
    assert configs.table_of(90) is configs.TABLES[90]
    assert configs.table_of(120) is configs.TABLES[120]
    assert configs.table_of(75) is configs.TABLES[80]
    assert configs.architecture(torch.device("cpu")) == 90


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["bench", "--tune"], ["bench", "--tune", "--device", "cpu"]):
        assert main(arguments) == 2
        assert "--tune times launch configurations on a CUDA device, and there is none here" in capsys.readouterr().err


def test_it_measures_no_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "norm", "--tune"]) == 2
    assert "leave suites and -o out" in capsys.readouterr().err
