"""The row norms' kernels compile ahead of time for every architecture and configuration that ships, without spills."""

from __future__ import annotations

import dataclasses
import itertools
import re
import types
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dorafx.bench import ahead  # noqa: E402
from dorafx.bench.ahead import CARDS, compiled, quantized_source, row_norm_source  # noqa: E402
from dorafx.ops.triton import checksums, configs  # noqa: E402
from dorafx.ops.triton.tiles import finish_kernel, precision_of  # noqa: E402

pytestmark = [pytest.mark.triton, pytest.mark.timeout(600)]

slow = pytest.mark.slow
NAMED = {2: "bf16", 4: "fp32"}
RANKS = (1, 16, 17, 32, 33, 64, 65, 128, 129, 256, 384, 385, 512, 513, 4096)
PROBLEMS = [
    configs.Problem(rank, operand, factor, weight, scattered)
    for rank, weight, scattered in itertools.product(RANKS, (2, 4), (False, True))
    for operand, factor in ((2, 2), (2, 4), (4, 4), (4, 2))
    # Above that rank they are converted before the launch.
    if operand != 2 or factor == 2 or rank <= configs.WIDEST_CONVERTED_RANK
]


def _shipped() -> list[Any]:
    """Every configuration that a card is given, at the largest rank of each that it is given for."""
    found: dict[tuple[int, configs.RowNormConfig], int] = {}
    for architecture, card in CARDS.items():
        for problem in PROBLEMS:
            key = architecture, configs.row_norm_config(problem, card.gpu)
            found[key] = max(problem.rank, found.get(key, 0))
    # The default run compiles each configuration for one card: for Hopper, if it is Hopper's.
    first: dict[configs.RowNormConfig, int] = {}
    for architecture, config in sorted(found, key=lambda key: (key[0] != 90, key[0])):
        first.setdefault(config, architecture)
    return [
        pytest.param(
            architecture,
            config,
            rank,
            id=f"sm{architecture}-{8 * config.factor_bytes}bit-rank{config.max_rank}-{config.rows}x{config.columns}",
            marks=() if first[config] == architecture else slow,
        )
        for (architecture, config), rank in found.items()
    ]


SHIPPED = _shipped()


def _fits(architecture: int, config: configs.RowNormConfig, source: ASTSource, bound: int = 0) -> None:
    found = compiled(architecture, source, config.num_warps, config.num_stages)
    assert found.spilled == 0
    assert found.registers <= 255
    assert found.shared <= (bound or CARDS[architecture].gpu.block_bytes)


def _serves(architecture: int, config: configs.RowNormConfig, rank: int, problem: configs.Problem) -> bool:
    problem = dataclasses.replace(problem, rank=rank)
    return configs.row_norm_config(problem, CARDS[architecture].gpu) == config


def _compile(
    architecture: int,
    config: configs.RowNormConfig,
    rank: int,
    weight: str,
    factor: str,
    operand: str,
    layout: str = "rows",
    guarded: bool = False,
) -> None:
    """Where the configuration is what the card is given for these dtypes, it takes no more than it was given for."""
    size = {"bf16": 2, "fp16": 2, "fp32": 4}
    problem = configs.Problem(rank, size[operand], size[factor], size[weight], layout == "scattered")
    if size[operand] != config.factor_bytes or not _serves(architecture, config, rank, problem):
        pytest.skip("the card has another configuration for it")
    if size[operand] < size[factor] and rank > configs.WIDEST_CONVERTED_RANK:
        pytest.skip("factors of such a rank are converted before the launch")
    source = row_norm_source(config, rank, weight, factor, operand, layout=layout, guarded=guarded)
    _fits(architecture, config, source, config.shared_bytes(problem, architecture))


@pytest.mark.parametrize(("architecture", "config", "rank"), SHIPPED)
def test_row_norm(architecture: int, config: configs.RowNormConfig, rank: int) -> None:
    """Of what serves a narrow weight, with that; with a wide one else."""
    factor = NAMED[config.factor_bytes]
    for weight, layout in (("bf16", "rows"), ("fp32", "rows"), ("bf16", "scattered"), ("fp32", "scattered")):
        problem = configs.Problem(
            rank, config.factor_bytes, config.factor_bytes, 2 if weight == "bf16" else 4, layout == "scattered"
        )
        if _serves(architecture, config, rank, problem):
            _compile(architecture, config, rank, weight, factor, factor, layout)
            return
    # A smaller row, which cards of less shared memory take for some factors only.
    _compile(architecture, config, rank, "fp32", "fp32", factor)


@pytest.mark.parametrize(
    ("architecture", "config", "rank"),
    [pytest.param(*case.values, id=case.id, marks=() if case.values[0] == 90 else slow) for case in SHIPPED],
)
def test_row_norm_where_flags_say_so(architecture: int, config: configs.RowNormConfig, rank: int) -> None:
    """The same with the flags of norms by content, in no more registers than there are."""
    factor = NAMED[config.factor_bytes]
    _compile(architecture, config, rank, factor, factor, factor, guarded=True)


@slow
@pytest.mark.parametrize("layout", ahead.LAYOUTS)
@pytest.mark.parametrize(
    ("weight", "factor", "operand"),
    [
        ("bf16", "bf16", "bf16"),
        ("fp32", "bf16", "bf16"),
        ("fp16", "fp16", "fp16"),
        ("bf16", "fp32", "bf16"),
        ("fp32", "fp32", "bf16"),
        ("bf16", "fp32", "fp32"),
        ("fp32", "fp32", "fp32"),
        ("bf16", "bf16", "fp32"),
    ],
)
@pytest.mark.parametrize(("architecture", "config", "rank"), SHIPPED)
def test_row_norm_of_any_dtypes_and_layout(
    architecture: int, config: configs.RowNormConfig, rank: int, weight: str, factor: str, operand: str, layout: str
) -> None:
    _compile(architecture, config, rank, weight, factor, operand, layout)


def test_what_it_takes_on_hopper() -> None:
    """Exact counts: the loop that is bound by reading L2 moves what it must, and each program is given what it takes."""
    card = CARDS[90]
    launch = ahead.dense_launch(configs.Problem(384, 2, 2, 2), card, 8192, 8192)
    assert launch.parts == 2
    assert launch.l2 == 2 * 8192**2 + 64 * 384 * 8192 * 2 + 2 * 8192 * 384 * 2 + 2 * 8 * 8192
    assert launch.l2 <= ahead.L2_LIMIT
    for rank, programs in ((16, 4), (64, 2), (128, 2), (384, 1)):
        problem = configs.Problem(rank, 2, 2, 2)
        config = configs.row_norm_config(problem, card.gpu)
        found = compiled(90, row_norm_source(config, rank), config.num_warps, config.num_stages)
        assert (
            ahead.resident_programs(card, found, config.num_warps) == config.programs_on(card.gpu, problem) == programs
        )


def test_the_report_says_what_is_wrong() -> None:
    row = ahead.dense_row(CARDS[90], 384, "bf16", "bf16", "bf16")
    assert row.dtypes == "bf16 weight, bf16 factors"
    assert ahead.violations([row]) == []
    worse = dataclasses.replace(
        row,
        resources=ahead.Resources(255, 8, 228 << 10),
        launch=dataclasses.replace(row.launch, l2=551e6),
    )
    assert [text.partition(": ")[2] for text in ahead.violations([worse])] == [
        "8 bytes of registers spilled",
        "233472 bytes of shared memory, of 232448",
        "551 MB through L2, of 550",
    ]
    page = ahead.markdown([row])
    assert "| bf16 weight, bf16 factors | 384 | 128x64x64 | resident, 6 | next | 8 | 2 |" in page
    assert "Everything is within its limits." in page
    assert "8 bytes of registers spilled" in ahead.markdown([worse])


def test_addresses_are_loaded_from_as_wide_as_pointers() -> None:
    """Addresses are integers, of which the compiler knows no alignment but what it is told."""
    config = configs.HOPPER[0]
    wide = []
    for aligned in (True, False):
        kernel = triton.compile(
            row_norm_source(config, 16, aligned=aligned),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        )
        wide.append(len(re.findall(r"cp\.async\.cg\.shared\.global [^;]*, 0x10,", kernel.asm["ptx"])))
    assert wide[0] > wide[1] == 0


@pytest.mark.parametrize("operand", ["bf16", "fp32"])
@pytest.mark.parametrize("rank", [16, 384, *(pytest.param(rank, marks=slow) for rank in (64, 128, 1024))])
@pytest.mark.parametrize("format", ["nf4", *(pytest.param(f, marks=slow) for f in ("fp4", "bnb8", "affine"))])
@pytest.mark.parametrize("architecture", [a if a == 90 else pytest.param(a, marks=slow) for a in CARDS])
def test_row_norm_of_a_quantized_weight(architecture: int, format: str, rank: int, operand: str) -> None:
    problem = ahead.quantized_problem(format, 2 if operand == "bf16" else 4, rank)
    config = configs.row_norm_config(problem, CARDS[architecture].gpu)
    _fits(architecture, config, quantized_source(config, rank, format), config.shared_bytes(problem, architecture))


@pytest.mark.parametrize("architecture", CARDS)
def test_finish(architecture: int) -> None:
    sizes = {"d_out": "i32", "parts": "i32", "ROWS": "constexpr"}
    for flags in ("*i32", "constexpr"):
        constants = {(5,): 256} if flags == "*i32" else {(2,): None, (5,): 256}
        source = ASTSource(finish_kernel, {"partial": "*fp32", "out": "*fp32", "changed": flags, **sizes}, constants)
        assert compiled(architecture, source, 4, 3).spilled == 0


def _pointers(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> ASTSource:
    """A kernel of pointers, each aligned, and constants."""
    names = kernel.arg_names
    types = {**pointers, **dict.fromkeys(constants, "constexpr")}
    return ASTSource(
        kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("unit", [tl.uint32, tl.uint16, tl.uint8], ids=str)
@pytest.mark.parametrize("architecture", CARDS)
def test_checksums(architecture: int, unit: tl.dtype, sampled: bool) -> None:
    """With room for several programs on each multiprocessor: it is bound by memory."""
    integers = dict.fromkeys(("memories", "kept", "fresh", "phase"), "*i64")
    constants = {"UNIT": unit, "WORDS": checksums.WORDS, "EVERY": checksums.EVERY, "COMPARED": True, "SAMPLED": sampled}
    source = _pointers(checksums.checksum_kernel, {**integers, "changed": "*i32"}, constants)
    found = compiled(architecture, source, 8, 3)
    assert found.spilled == 0
    assert found.registers <= 64
    assert found.shared <= 1024


@pytest.mark.parametrize(
    ("weight", "factor", "operand"),
    [
        ("bf16", "bf16", "bf16"),
        ("bf16", "fp32", "bf16"),
        ("fp32", "fp32", "fp32"),
        pytest.param("fp32", "bf16", "bf16", marks=slow),
        pytest.param("bf16", "fp32", "fp32", marks=slow),
        pytest.param("fp16", "fp16", "fp16", marks=slow),
    ],
)
@pytest.mark.parametrize("architecture", CARDS)
def test_guarded_norms(architecture: int, weight: str, factor: str, operand: str) -> None:
    """One kernel for every shape, rank and layout, on every card."""
    pointers = {
        "norms": "*i64",
        "phase": "*i64",
        "changed": "*i32",
        **dict.fromkeys(("scales", "kept", "out"), "*fp32"),
    }
    types = {"WEIGHT": weight, "LEFT": factor, "RIGHT": factor, "OPERAND": operand}
    constants = {name: ahead.DTYPES[dtype] for name, dtype in types.items()}
    constants |= {"PRECISION": precision_of(constants["OPERAND"]), **checksums.GUARDED_BLOCKS}
    found = compiled(architecture, _pointers(checksums.guarded_norm_kernel, pointers, constants), 4, 3)
    assert found.spilled == 0
    assert found.shared <= CARDS[architecture].gpu.block_bytes


@pytest.mark.parametrize("architecture", CARDS)
def test_every_problem_has_a_configuration_that_fits(architecture: int) -> None:
    gpu = CARDS[architecture].gpu
    for problem in PROBLEMS:
        config = configs.row_norm_config(problem, gpu)
        assert config.factor_bytes == problem.operand_bytes
        assert config.max_rank is None or config.chunks(problem.rank) * config.depth >= problem.rank
        assert config.shared_bytes(problem, architecture) <= gpu.block_bytes
        assert config.weight_bytes >= problem.weight_bytes
        assert config.scattered or not problem.scattered


def test_a_card_of_less_shared_memory_takes_a_smaller_row() -> None:
    """The fp32 weight with half factors: three tiles of it in flight are twice as large."""
    for rank in (64, 128, 384):
        narrow, wide = (configs.Problem(rank, 2, 2, weight) for weight in (2, 4))
        large, small = (configs.row_norm_config(wide, CARDS[a].gpu) for a in (80, 86))
        assert large.shared_bytes(wide, 80) <= 163 << 10
        assert small.shared_bytes(wide, 86) <= 99 << 10
        assert configs.row_norm_config(narrow, CARDS[80].gpu).shared_bytes(narrow, 80) <= 163 << 10
    chosen = [configs.row_norm_config(configs.Problem(128, 2, 2, 4), CARDS[a].gpu) for a in (80, 86)]
    assert chosen[0] != chosen[1]


def test_what_a_card_has_is_what_its_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(
        major=8,
        minor=9,
        multi_processor_count=76,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=99 << 10,
        shared_memory_per_multiprocessor=100 << 10,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    asked = configs.gpu.__wrapped__
    assert asked(torch.device("cuda", 7)) == configs.Gpu(89, 76, 99 << 10, 100 << 10)
    del properties.shared_memory_per_block_optin
    small = asked(torch.device("cuda", 7))
    assert small == configs.Gpu(89, 76, 48 << 10, 100 << 10)
    # Less than any row for this needs: the least is tried.
    problem = configs.Problem(64, 2, 4, 4)
    found = configs.row_norm_config(problem, small)
    assert (found.rows, found.columns, found.depth, found.num_stages) == (64, 64, 32, 3)
    assert found.shared_bytes(problem, 89) > small.block_bytes


def test_splits_fill_the_device() -> None:
    assert configs.splits(row_blocks=8 * 132, column_blocks=64, residents=132) == 1
    assert configs.splits(row_blocks=1, column_blocks=64, residents=132) > 32
    for blocks in (1, 7, 32, 64, 131, 500):
        parts = configs.splits(blocks, 64, 132)
        assert 1 <= parts <= 64
    # Twice the programs a multiprocessor take twice the parts.
    assert configs.splits(64, 128, 132) == 2
    assert configs.splits(64, 128, 2 * 132) == 4
    # Nine parts of 64 tiles would be eight of eight tiles: the ninth has none.
    assert 64 % configs.splits(15, 64, 132) == 0
