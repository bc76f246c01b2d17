"""The row norm's kernels compile ahead of time for every architecture and configuration that ships, without spills."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dorafx.ops.triton import configs  # noqa: E402
from dorafx.ops.triton.quantized import quantized_row_norm_kernel  # noqa: E402
from dorafx.ops.triton.row_norm import finish_kernel, grouped_row_norm_kernel, row_norm_kernel  # noqa: E402

pytestmark = [pytest.mark.triton, pytest.mark.timeout(600)]

# Shared memory of one block, in bytes, as the CUDA programming guide gives it.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
OPERANDS = {2: ("bf16", "bf16"), 4: ("bf16", "fp32")}


def ptxas(architecture: int) -> str:
    """The assembler that Triton brings for an architecture; the newer one has had this name since Blackwell."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    newer = folder / "ptxas-blackwell"
    return str(newer if architecture >= 90 and newer.exists() else folder / "ptxas")


def compiled(architecture: int, source: ASTSource, warps: int, stages: int) -> tuple[int, int, int]:
    """(registers, spilled bytes, shared bytes)."""
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
    assert done.returncode == 0, done.stderr
    registers = int(re.findall(r"Used (\d+) registers", done.stderr)[0])
    spills = sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))
    return registers, spills, int(kernel.metadata.shared)


TYPES = {
    "bf16": triton.language.bfloat16,
    "fp16": triton.language.float16,
    "fp32": triton.language.float32,
}
ALONG_ROWS = ("stride_wi", "stride_lr", "stride_ri")
DOWN_COLUMNS = ("stride_wo", "stride_lo", "stride_rr")


def row_norm_source(
    config: configs.RowNormConfig,
    split: bool,
    grouped: bool = False,
    weight: str = "",
    half: str = "bf16",
    transposed: bool = False,
) -> ASTSource:
    """
    Args:
        weight: its dtype; by default that of ``OPERANDS``.
        half: the dtype of narrow factors.
        transposed: whether rows lie apart and columns side by side in memory, of all three operands.
    """
    kernel = grouped_row_norm_kernel if grouped else row_norm_kernel
    narrow = config.factor_bytes == 2
    weight, factor = weight or OPERANDS[config.factor_bytes][0], half if narrow else "fp32"
    apart, beside = (ALONG_ROWS, DOWN_COLUMNS) if transposed else (DOWN_COLUMNS, ALONG_ROWS)
    pointers = {
        "pointers": "*i64",
        "weight": f"*{weight}",
        "left": f"*{factor}",
        "right": f"*{factor}",
        "out": "*fp32",
        "scale": "fp32",
    }
    integers = ("d_out", "d_in", "rank", "part", *apart)
    constants = {
        **dict.fromkeys(beside, 1),  # the launcher specialises strides of one
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "DEPTH": config.depth,
        "SINGLE": config.single,
        "SPLIT": split,
        "OPERAND": TYPES[factor],
        "PRECISION": "tf32" if narrow else "tf32x3",
        "STAGES": config.num_stages,
        "WEIGHT": TYPES[weight],
        "LEFT": TYPES[factor],
        "RIGHT": TYPES[factor],
        "ALIGNED": True,
    }
    signature = {**pointers, **dict.fromkeys(integers, "i32"), **dict.fromkeys(constants, "constexpr")}
    names = kernel.arg_names
    signature = {name: signature[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in (*pointers, *integers)}
    aligned.pop((names.index("scale"),))
    return ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items() if k in names}, aligned)


def _tables() -> list[Any]:
    """Every configuration that ships, with the architecture whose table has it: one that is pasted in comes, too."""
    return [
        pytest.param(architecture, config, id=f"sm{architecture}-{8 * config.factor_bytes}bit-rank{config.max_rank}")
        for architecture, table in configs.TABLES.items()
        for config in table
    ]


def _fits(architecture: int, config: configs.RowNormConfig, source: ASTSource) -> None:
    registers, spills, shared = compiled(architecture, source, config.num_warps, config.num_stages)
    assert spills == 0
    assert registers <= 255
    assert shared <= SHARED[architecture]


slow = pytest.mark.slow


@pytest.mark.parametrize(("architecture", "config"), _tables())
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({"split": False}, id="whole"),
        pytest.param({"split": True, "weight": "fp32"}, id="split, fp32 weight"),
        pytest.param({"split": True, "transposed": True}, id="transposed", marks=slow),
        pytest.param({"split": True, "transposed": True, "weight": "fp32"}, id="transposed, fp32 weight", marks=slow),
    ],
)
def test_row_norm(variant: dict[str, Any], config: configs.RowNormConfig, architecture: int) -> None:
    _fits(architecture, config, row_norm_source(config, **variant))


@pytest.mark.parametrize(("architecture", "config"), [t for t in _tables() if t.values[1].factor_bytes == 2])
@pytest.mark.slow
def test_row_norm_of_fp16(config: configs.RowNormConfig, architecture: int) -> None:
    _fits(architecture, config, row_norm_source(config, True, weight="fp16", half="fp16"))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [t if t.values[0] == 90 else pytest.param(*t.values, id=t.id, marks=slow) for t in _tables()],
)
def test_row_norm_of_a_group(config: configs.RowNormConfig, architecture: int) -> None:
    _fits(architecture, config, row_norm_source(config, False, grouped=True))


def test_a_group_loads_as_wide_vectors_as_one_norm() -> None:
    """Addresses that a kernel reads from memory have no alignment of their own."""
    config = configs.ROW_NORM[0]
    wide = []
    for grouped in (False, True):
        kernel = triton.compile(
            row_norm_source(config, False, grouped),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        )
        wide.append(len(re.findall(r"cp\.async\.cg\.shared\.global [^;]*, 0x10,", kernel.asm["ptx"])))
    assert wide[0] == wide[1] > 0


WEIGHTS = {"nf4": ("u8", "fp32"), "fp4": ("u8", "fp32"), "bnb8": ("i8", "fp32"), "affine": ("i8", "bf16")}


def quantized_source(config: configs.RowNormConfig, format: str) -> ASTSource:
    codes, scales = WEIGHTS[format]
    factor = "bf16" if config.factor_bytes == 2 else "fp32"
    pointers = {
        "packed": f"*{codes}",
        "scales": f"*{scales}",
        "zeros": "*i8" if format == "affine" else f"*{scales}",
        "left": f"*{factor}",
        "right": f"*{factor}",
        "out": "*fp32",
    }
    integers = ("d_out", "d_in", "rank", "part", "group", "stride_lo", "stride_rr")
    constants = {
        "stride_lr": 1,
        "stride_ri": 1,
        "FORMAT": format,
        "ZEROS": format == "affine",
        "WEIGHT": TYPES["fp32" if format == "bnb8" else "bf16"],
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "DEPTH": config.depth,
        "SPLIT": False,
        "OPERAND": TYPES[factor],
        "PRECISION": "tf32" if config.factor_bytes == 2 else "tf32x3",
        "STAGES": config.num_stages,
    }
    names = quantized_row_norm_kernel.arg_names
    signature = {**pointers, "scale": "fp32", **dict.fromkeys(integers, "i32"), **dict.fromkeys(constants, "constexpr")}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in (*pointers, *integers)}
    return ASTSource(
        quantized_row_norm_kernel,
        {name: signature[name] for name in names},
        {(names.index(k),): v for k, v in constants.items()},
        aligned,
    )


@pytest.mark.parametrize("architecture", SHARED)
@pytest.mark.parametrize(
    "config", configs.QUANTIZED_ROW_NORM, ids=lambda c: f"{8 * c.factor_bytes}bit-rank{c.max_rank}"
)
@pytest.mark.parametrize("format", ["nf4", *(pytest.param(f, marks=pytest.mark.slow) for f in WEIGHTS if f != "nf4")])
def test_row_norm_of_a_quantized_weight(format: str, config: configs.RowNormConfig, architecture: int) -> None:
    source = quantized_source(config, format)
    _, spills, shared = compiled(architecture, source, config.num_warps, config.num_stages)
    assert spills == 0
    assert shared <= SHARED[architecture]


@pytest.mark.parametrize("architecture", SHARED)
def test_finish(architecture: int) -> None:
    signature = {"partial": "*fp32", "out": "*fp32", "d_out": "i32", "parts": "i32", "ROWS": "constexpr"}
    source = ASTSource(finish_kernel, signature, {(4,): 256})
    assert compiled(architecture, source, 4, 3)[1] == 0


def test_every_rank_has_a_configuration() -> None:
    for factor_bytes in (2, 4):
        for rank in (1, 8, 16, 17, 64, 100, 384, 4096):
            config = configs.row_norm_config(factor_bytes, rank)
            assert config.factor_bytes == factor_bytes
            assert config.max_rank is None or config.max_rank >= rank
            assert not config.single or config.depth >= rank


def test_splits_fill_the_device() -> None:
    assert configs.splits(row_blocks=8 * 132, column_blocks=64, processors=132) == 1
    assert configs.splits(row_blocks=1, column_blocks=64, processors=132) > 32
    for blocks in (1, 7, 32, 64, 131, 500):
        parts = configs.splits(blocks, 64, 132)
        assert 1 <= parts <= 64
