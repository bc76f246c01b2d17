"""``dorafx bench --kernels``: the row norms' kernels, compiled ahead of time for every architecture, without a GPU: what the
compiler reports, and estimates from it.

**Traffic.** Through L2 go the weight, once; ``right``, once for each block of rows; ``left``, once for each part of d_in if it is
resident, else once for each tile along d_in; and the partial sums::

    bytes = d_out·d_in·w + ceil(d_out / rows)·rank·d_in·f + reads·d_out·rank·f + 8·parts·d_out

**Predicted time.** The launch, plus the largest of three times: bytes from memory (each operand once) at the card's bandwidth; bytes
through L2 at ``L2_BYTES_A_CLOCK`` for each multiprocessor; and the products of whole tiles at the tensor cores' rate. The last two
are increased by the idle share of the last wave of programs. The three are assumed to overlap perfectly; nothing has been measured.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dorafx.ops.triton import configs
from dorafx.ops.triton.quantized import quantized_row_norm_kernel
from dorafx.ops.triton.row_norm import GROUP, row_norm_kernel
from dorafx.ops.triton.tiles import block_constants

DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

L2_BYTES_A_CLOCK = 26
"""The most bytes that a multiprocessor reads from L2 in a clock cycle: assumed; 6 TB/s on an H200."""
_LAUNCH_SECONDS = 3e-6
L2_LIMIT = 550e6
"""The most bytes that the norm of 8192x8192, r384, bf16 may move through L2 on a Hopper GPU."""


@dataclass(frozen=True)
class Card:
    """A GPU, by its data sheet.

    Attributes:
        gpu: the properties that determine block sizes.
        threads: resident threads of a multiprocessor.
        clock: of the multiprocessors, in Hz.
        half: rate of dense products of fp16 and bf16 with fp32 sums, in FLOP/s; that of tf32 is half of it.
        memory: bandwidth in bytes/s.
    """

    name: str
    gpu: configs.Gpu
    threads: int
    clock: float
    half: float
    memory: float

    @property
    def l2(self) -> float:
        """Bytes/s from L2."""
        return L2_BYTES_A_CLOCK * self.clock * self.gpu.processors


def _card(
    name: str, architecture: int, processors: int, kib: int, threads: int, clock: float, half: float, memory: float
) -> Card:
    shared = configs.Gpu(architecture, processors, (kib - 1) << 10, kib << 10)
    return Card(name, shared, threads, clock * 1e9, half * 1e12, memory * 1e12)


CARDS = {
    card.gpu.architecture: card
    for card in (
        _card("A100", 80, 108, 164, 2048, 1.41, 312, 2.0),
        _card("RTX 3090", 86, 82, 100, 1536, 1.70, 71, 0.94),
        _card("RTX 4090", 89, 128, 100, 1536, 2.52, 165, 1.01),
        _card("H200", 90, 132, 228, 2048, 1.755, 989, 4.8),
        _card("B200", 100, 148, 228, 2048, 1.85, 2250, 8.0),
        _card("RTX 5090", 120, 170, 100, 1536, 2.41, 209, 1.79),
    )
}
"""A card for each architecture that the tables are checked on, by ten times its compute capability."""


@dataclass(frozen=True)
class Resources:
    """What the compiler reports of a kernel: registers for each thread, bytes spilled, bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


def ptxas(architecture: int) -> str:
    """Triton's assembler for an architecture; since Blackwell there is a newer one under a name of its own."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    newer = folder / "ptxas-blackwell"
    return str(newer if architecture >= 90 and newer.exists() else folder / "ptxas")


def compiled(architecture: int, source: ASTSource, warps: int, stages: int) -> Resources:
    """Compile for an architecture, with no GPU.

    Raises:
        RuntimeError: the assembler rejects it; and whatever Triton raises.
    """
    kernel = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps, "num_stages": stages}
    )
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(kernel.asm["ptx"])
        file.flush()
        target = re.search(r"\.target (\w+)", kernel.asm["ptx"])
        assert target is not None
        command = [ptxas(architecture), "-v", f"--gpu-name={target.group(1)}", file.name, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stderr}")
    return Resources(
        int(re.findall(r"Used (\d+) registers", done.stderr)[0]),
        sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr))),
        int(kernel.metadata.shared),
    )


def resident_programs(card: Card, resources: Resources, warps: int) -> int:
    """Resident programs of a multiprocessor: registers are allocated to a warp in units of 256, and each program takes 1 KiB of
    additional shared memory."""
    of_warp = -(-resources.registers * 32 // 256) * 256
    return min(
        card.threads // (32 * warps),
        65536 // of_warp // warps,
        card.gpu.processor_bytes // (resources.shared + 1024),
        32,
    )


_ALONG_ROWS = ("stride_wi", "stride_lr", "stride_ri")
_DOWN_COLUMNS = ("stride_wo", "stride_lo", "stride_rr")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "rows": _ALONG_ROWS,
    "columns": _DOWN_COLUMNS,
    "scattered": _ALONG_ROWS[1:],
}
"""The strides that are one: those along the rows of all operands, or down their columns, or (scattered) none of W's."""


def row_norm_source(
    config: configs.RowNormConfig,
    rank: int,
    weight: str = "bf16",
    factor: str = "bf16",
    operand: str = "",
    layout: str = "rows",
    left: str = "",
    aligned: bool = True,
    guarded: bool = False,
) -> ASTSource:
    """The dense kernel as the launcher specialises it.

    Args:
        weight, factor, operand: names in :data:`DTYPES`; the product's operands have the factors' dtype by default.
        layout: a name in :data:`LAYOUTS`.
        left: the left factor's dtype, if it differs from the right one's.
        aligned: whether addresses are multiples of 16.
        guarded: whether flags say which norms are computed.
    """
    constants = {
        **dict.fromkeys(LAYOUTS[layout], 1),  # the launcher specialises strides of one
        "GROUP": GROUP,
        "WEIGHT": DTYPES[weight],
        "LEFT": DTYPES[left or factor],
        "RIGHT": DTYPES[factor],
        "ALIGNED": aligned,
        **block_constants(config, rank, DTYPES[operand or factor]),
        **({} if guarded else {"changed": None}),
    }
    flags = {"changed": "*i32"} if guarded else {}
    types: dict[str, Any] = {**flags, "addresses": ("i64",) * (3 * GROUP), "out": "*fp32"}
    divisible = {(0, i) for i in range(3 * GROUP)} if aligned else set()
    return _source(row_norm_kernel, types, constants, divisible | {(1,)})


_QUANTIZED = {"nf4": ("u8", "fp32"), "fp4": ("u8", "fp32"), "bnb8": ("i8", "fp32"), "affine": ("i8", "bf16")}


def quantized_source(config: configs.RowNormConfig, rank: int, format: str) -> ASTSource:
    """The kernel for quantised weights, for one of its formats."""
    codes, scales = _QUANTIZED[format]
    factor = "bf16" if config.factor_bytes == 2 else "fp32"
    types = {
        "packed": f"*{codes}",
        "scales": f"*{scales}",
        "zeros": "*i8" if format == "affine" else f"*{scales}",
        "left": f"*{factor}",
        "right": f"*{factor}",
        "out": "*fp32",
    }
    constants = {
        "stride_lr": 1,
        "stride_ri": 1,
        "FORMAT": format,
        "ZEROS": format == "affine",
        "VALUE": DTYPES["fp32" if format == "bnb8" else "bf16"],
        **block_constants(config, rank, DTYPES[factor]),
    }
    return _source(quantized_row_norm_kernel, types, constants, {(i,) for i in range(len(types))})


def _source(
    kernel: Any, types: dict[str, Any], constants: dict[str, Any], divisible: set[tuple[int, ...]]
) -> ASTSource:
    """Arguments that have no type and are no constants are integers divisible by 16, except the scale."""
    names = kernel.arg_names
    integers = [n for n in names if n not in types and n not in constants and n != "scale"]
    signature = {"scale": "fp32", **types, **dict.fromkeys(integers, "i32"), **dict.fromkeys(constants, "constexpr")}
    divisible = divisible | {(names.index(n),) for n in integers}
    return ASTSource(
        kernel,
        {name: signature[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {place: [["tt.divisibility", 16]] for place in divisible},
    )


@dataclass(frozen=True)
class Launch:
    """A norm ``[d_out, d_in]`` on a card, divided into programs as by its launcher.

    Attributes:
        config: block sizes.
        programs: of the launch.
        parts: number of parts into which d_in is divided.
        l2: bytes through L2.
        memory: bytes from memory.
        flops: of whole tiles; fp32 counts three times.
    """

    config: configs.RowNormConfig
    programs: int
    parts: int
    l2: float
    memory: float
    flops: float

    def seconds(self, card: Card, resident: int, operand_bytes: int) -> float:
        """Predicted; see the module's description."""
        at_a_time = resident * card.gpu.processors
        waves = -(-self.programs // at_a_time) * at_a_time / self.programs
        rate = card.half if operand_bytes == 2 else card.half / 2
        return _LAUNCH_SECONDS + max(self.memory / card.memory, waves * max(self.l2 / card.l2, self.flops / rate))


def _launch(
    config: configs.RowNormConfig,
    problem: configs.Problem,
    card: Card,
    shape: tuple[int, int],
    weight: float,
) -> Launch:
    d_out, d_in = shape
    rows, parts, _ = configs.division(config, problem, card.gpu, shape)
    tiles = -(-d_in // config.columns)
    reads = parts if config.chunks(problem.rank) else tiles
    left, right = (n * problem.rank * problem.factor_bytes for n in shape)
    sums = 8 * parts * d_out if parts > 1 else 4 * d_out
    depth = config.depth * (config.chunks(problem.rank) or -(-problem.rank // config.depth))
    products = 1 if problem.operand_bytes == 2 else 3
    return Launch(
        config,
        rows * parts,
        parts,
        l2=weight + rows * right + reads * left + sums,
        memory=weight + left + right + sums,
        flops=products * 2 * rows * config.rows * tiles * config.columns * depth,
    )


def dense_launch(problem: configs.Problem, card: Card, d_out: int, d_in: int) -> Launch:
    """The launch of a dense weight's norm, with the configuration that the card's table gives."""
    config = configs.row_norm_config(problem, card.gpu)
    return _launch(config, problem, card, (d_out, d_in), d_out * d_in * problem.weight_bytes)


def quantized_launch(format: str, operand_bytes: int, rank: int, card: Card, d_out: int, d_in: int) -> Launch:
    """The launch of a quantised weight's norm; its scales and zero points are counted for groups of 64 values."""
    problem = quantized_problem(format, operand_bytes, rank)
    config = configs.row_norm_config(problem, card.gpu)
    codes = 0.5 if format in ("nf4", "fp4") else 1
    return _launch(config, problem, card, (d_out, d_in), d_out * d_in * (codes + 1 / 16))


def quantized_problem(format: str, operand_bytes: int, rank: int) -> configs.Problem:
    """The problem of a weight whose scales and zero points have the dtypes of :func:`quantized_source`."""
    scale, zero = _BYTES[_QUANTIZED[format][1]], 1 if format == "affine" else 0
    return configs.Problem(rank, operand_bytes, operand_bytes, configs.code_bytes(format, scale, zero))


SHAPE = (8192, 8192)
"""The weight of the report's norms."""
RANKS = (16, 64, 128, 384, 1024)
_OPERANDS = (
    # The weight, the factors, and the product's operands.
    ("bf16", "bf16", "bf16"),
    ("fp16", "fp16", "fp16"),
    ("fp32", "bf16", "bf16"),
    ("bf16", "fp32", "bf16"),
    ("bf16", "fp32", "fp32"),
    ("fp32", "fp32", "fp32"),
)
_FORMATS = ("nf4", "bnb8", "affine")


@dataclass(frozen=True)
class Row:
    """A line of the report: a norm of :data:`SHAPE` on a card."""

    kernel: str
    dtypes: str
    rank: int
    card: Card
    launch: Launch
    resources: Resources
    resident: int
    seconds: float


def rows(
    architectures: Sequence[int] = tuple(CARDS),
    ranks: Sequence[int] = RANKS,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Compile what is launched for every kernel, dtypes, rank and architecture.

    Args:
        report: called with a line after each architecture.
    """
    result = []
    for architecture in architectures:
        card = CARDS[architecture]
        for rank in ranks:
            result += [dense_row(card, rank, *operands) for operands in _OPERANDS]
            result += [_quantized_row(card, rank, f, operand) for f in _FORMATS for operand in ("bf16", "fp32")]
        report(f"sm_{architecture}: {len(result)} kernels so far")
    return result


def dense_row(card: Card, rank: int, weight: str, factor: str, operand: str) -> Row:
    """A dense weight's norm, of dtypes of :data:`DTYPES`: the weight's, the factors', the product's operands'."""
    named = f"{weight} weight, {factor} factors" + (f" as {operand}" if operand != factor else "")
    if rank > configs.WIDEST_CONVERTED_RANK:
        factor = operand
    problem = configs.Problem(rank, _BYTES[operand], _BYTES[factor], _BYTES[weight])
    launch = dense_launch(problem, card, *SHAPE)
    source = row_norm_source(launch.config, rank, weight, factor, operand)
    return _row("dense", named, rank, card, launch, source, problem.operand_bytes)


def _quantized_row(card: Card, rank: int, format: str, operand: str) -> Row:
    launch = quantized_launch(format, _BYTES[operand], rank, card, *SHAPE)
    source = quantized_source(launch.config, rank, format)
    return _row("quantised", f"{format} weight, {operand} factors", rank, card, launch, source, _BYTES[operand])


def _row(kernel: str, dtypes: str, rank: int, card: Card, launch: Launch, source: ASTSource, operand_bytes: int) -> Row:
    config = launch.config
    resources = compiled(card.gpu.architecture, source, config.num_warps, config.num_stages)
    resident = resident_programs(card, resources, config.num_warps)
    seconds = launch.seconds(card, max(1, resident), operand_bytes)
    return Row(kernel, dtypes, rank, card, launch, resources, resident, seconds)


def violations(rows: Sequence[Row]) -> list[str]:
    """What must not be: spilled registers, more shared memory than the card has, and on Hopper more than :data:`L2_LIMIT` of the
    norm that it is stated for."""
    problems = []
    for row in rows:
        named = f"sm_{row.card.gpu.architecture}, {row.dtypes}, rank {row.rank}"
        if row.resources.spilled:
            problems.append(f"{named}: {row.resources.spilled} bytes of registers spilled")
        if row.resources.shared > row.card.gpu.block_bytes:
            problems.append(f"{named}: {row.resources.shared} bytes of shared memory, of {row.card.gpu.block_bytes}")
        stated = (90, "bf16 weight, bf16 factors", 384)
        if (row.card.gpu.architecture, row.dtypes, row.rank) == stated and row.launch.l2 > L2_LIMIT:
            problems.append(f"{named}: {row.launch.l2 / 1e6:.0f} MB through L2, of {L2_LIMIT / 1e6:.0f}")
    return problems


def markdown(rows: Sequence[Row]) -> str:
    """The report as a page."""
    problems = violations(rows)
    lines = [
        "# Kernels",
        "",
        "What the compiler reports of the row norm's Triton kernels on six architectures, and the traffic and time that follow.",
        "For people who tune or review the kernels. **None of it has been measured on a GPU.**",
        "",
        "Written by `dorafx bench --kernels -o examples/guide/kernels.md`, without a GPU. Registers, spilled bytes and shared",
        f"memory are the compiler's (Triton {triton.__version__}); the rest is calculated. Each row is the norm of a weight of",
        f"{SHAPE[0]}x{SHAPE[1]}.",
        "",
        "- **tile**: rows x columns of W, depth of a product.",
        "- **left**: whether the left factor's rows stay in shared memory for the complete rank (in chunks of that depth), or both",
        "  factors are streamed.",
        "- **stages**: tiles in flight; `next` where the next tile of the right factor is loaded to registers during a product.",
        "- **parts**: into which d_in is divided.",
        "- **programs**: resident on a multiprocessor, by registers, threads and shared memory.",
        "- **L2**: bytes through it, `d_out·d_in·w + ceil(d_out / rows)·rank·d_in·f + reads·d_out·rank·f + 8·parts·d_out`. Here w",
        "  and f are the bytes of an element of weight and factors; reads are the parts, or the tiles along d_in where both",
        "  factors are streamed.",
        f"- **predicted**: {_LAUNCH_SECONDS * 1e6:.0f} us for the launch, plus the largest of three times. Memory: each operand once at the card's",
        f"  bandwidth. L2: {L2_BYTES_A_CLOCK} bytes a clock and multiprocessor (assumed; 6 TB/s on an H200). Products: complete tiles at the",
        "  tensor cores' rate (fp32 as three products of tf32). The last two grow by the idle share of the last wave.",
        "",
        f"Spilled registers: {'none' if not any(r.resources.spilled for r in rows) else 'see below'}. "
        f"Kernels: {len(rows)}. "
        + ("Everything is within its limits." if not problems else "Not within limits: " + "; ".join(problems)),
    ]
    for card in dict.fromkeys(row.card for row in rows):
        gpu = card.gpu
        lines += [
            "",
            f"## sm_{gpu.architecture} ({card.name}: {gpu.processors} multiprocessors, {gpu.block_bytes >> 10} KiB of shared memory a program)",
            "",
            "| weight and factors | rank | tile | left | stages | warps | parts | registers | spilled | shared KiB | programs | L2 MB | predicted us |",
            "|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [_line(row) for row in rows if row.card == card]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    config, chunks = row.launch.config, row.launch.config.chunks(row.rank)
    cells = (
        row.dtypes,
        row.rank,
        f"{config.rows}x{config.columns}x{config.depth}",
        f"resident, {chunks}" if chunks else "streamed",
        "next" if chunks and config.num_stages == 1 else config.num_stages,
        config.num_warps,
        row.launch.parts,
        row.resources.registers,
        row.resources.spilled,
        f"{row.resources.shared / 1024:.0f}",
        row.resident,
        f"{row.launch.l2 / 1e6:.0f}",
        f"{row.seconds * 1e6:.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |"
