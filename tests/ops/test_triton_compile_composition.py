"""The kernels of the composition and of the DoRA linear, ahead of time for every architecture that ships: no spilled
registers, wide loads, offsets of 64 bits, rounding to nearest even."""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dorafx.bench.ahead import CARDS, compiled  # noqa: E402
from dorafx.ops.triton import configs  # noqa: E402
from dorafx.ops.triton.compose import add_parts_kernel, compose_backward_kernel, compose_kernel  # noqa: E402
from dorafx.ops.triton.linear import dora_linear_kernel  # noqa: E402

pytestmark = [pytest.mark.triton, pytest.mark.timeout(600)]

ARCHITECTURES = [a if a in (80, 90, 100) else pytest.param(a, marks=pytest.mark.slow) for a in CARDS]


def source(
    kernel: Any,
    pointers: dict[str, str | None],
    constants: dict[str, Any],
    long: tuple[str, ...] = (),
    scale: str = "fp32",
    ones: dict[str, int] | None = None,
) -> ASTSource:
    """A kernel as the launcher would have it compiled: absent tensors are None, strides of one are constants, everything
    else is divisible by 16. ``long`` names the integers of 64 bits, ``ones`` those that are constants."""
    constants |= {name: value for name, value in (ones or {}).items() if name in kernel.arg_names}
    constants = {**constants, **{name: None for name, dtype in pointers.items() if dtype is None}}
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
        else:
            signature[name] = scale if name == "scale" else "i64" if name in long else "i32"
    names = list(kernel.arg_names)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n] not in ("constexpr", "fp32", "fp64")
    }
    return ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, aligned)


def forward(
    config: configs.ComposeConfig, dtype: str, form: str = "direct", wide: bool = False, **options: Any
) -> ASTSource:
    delta, alone = form == "delta", form == "alone"
    pointers = {
        "result": dtype if delta else None,
        "base": dtype,
        "lora": None if alone else dtype,
        "g": "fp32",
        "bias": None if delta else dtype,
        "out": dtype,
        "total": None if alone else dtype,
    }
    strides = dict.fromkeys(("stride_rc", "stride_bc", "stride_lc", "stride_yc"), 1)
    constants = {**strides, "WIDE": wide, "ROWS": config.rows, "COLUMNS": config.columns}
    return source(compose_kernel, pointers, constants, **options)


def backward(
    config: configs.ComposeConfig, dtype: str, form: str = "trained", wide: bool = False, **options: Any
) -> ASTSource:
    trained = form != "frozen"
    pointers = {
        "grad": dtype,
        "g": "fp32",
        "total": dtype if trained else None,
        "d_base": dtype,
        "d_lora": dtype,
        "sums_g": "fp32" if trained else None,
        "sums_bias": "fp32" if trained else None,
    }
    strides = dict.fromkeys(("stride_gc", "stride_tc", "stride_dc"), 1)
    constants = {**strides, "DELTA": form == "delta", "WIDE": wide, "ROWS": config.rows, "COLUMNS": config.columns}
    return source(compose_backward_kernel, pointers, constants, **options)


def linear(config: configs.LinearConfig, kept: bool, wide: bool = False, **options: Any) -> ASTSource:
    dtype = "bf16" if config.operand_bytes == 2 else "fp32"
    pointers: dict[str, str | None] = dict.fromkeys(("x", "weight", "h", "left", "out"), dtype)
    pointers |= {"g": "fp32", "bias": dtype, "total": dtype if kept else None}
    constants = {
        **dict.fromkeys(("stride_xi", "stride_wi", "stride_hr", "stride_lr"), 1),
        "WIDE": wide,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "DEPTH": config.depth,
        "GROUP": 8,
        "OPERAND": tl.bfloat16 if config.operand_bytes == 2 else tl.float32,
        "PRECISION": "tf32" if config.operand_bytes == 2 else "tf32x3",
        "STAGES": config.num_stages,
    }
    return source(dora_linear_kernel, pointers, constants, **options)


def assembly(made: ASTSource, warps: int, architecture: int = 90) -> Any:
    return triton.compile(made, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps}).asm


def check(architecture: int, made: ASTSource, warps: int, stages: int = 3) -> None:
    found = compiled(architecture, made, warps, stages)
    assert found.spilled == 0
    assert found.registers <= 255
    assert found.shared <= CARDS[architecture].gpu.block_bytes


# Each compilation takes a second or two, so the default run has the commonest of each architecture.
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_commonest(architecture: int) -> None:
    chosen, of_many = (
        configs.compose_config(4096, architecture=architecture),
        configs.linear_config(2, 4096, architecture),
    )
    check(architecture, forward(chosen.forward, "bf16"), chosen.forward.num_warps)
    check(architecture, backward(chosen.backward, "bf16"), chosen.backward.num_warps)
    check(architecture, linear(of_many, kept=True), of_many.num_warps, of_many.num_stages)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compose(dtype: str, architecture: int) -> None:
    chosen = configs.compose_config(4096, architecture=architecture)
    for form in ("direct", "delta", "alone"):
        check(architecture, forward(chosen.forward, dtype, form), chosen.forward.num_warps)
    for form in ("trained", "delta", "frozen"):
        check(architecture, backward(chosen.backward, dtype, form), chosen.backward.num_warps)
    # Narrow layers, and rows that lie side by side (a convolution's channels), have tiles of other shapes.
    for layout in ((24, False), (64, True)):
        chosen = configs.compose_config(*layout, architecture)
        check(architecture, forward(chosen.forward, dtype, wide=layout[1]), chosen.forward.num_warps)
        check(architecture, backward(chosen.backward, dtype, wide=layout[1]), chosen.backward.num_warps)
    check(architecture, source(add_parts_kernel, {"sums": "fp32", "out": "fp32"}, {"COLUMNS": 128}), 4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("config", configs.LINEAR, ids=lambda c: f"{8 * c.operand_bytes}bit-{c.max_tokens}tokens")
def test_linear(config: configs.LinearConfig, architecture: int) -> None:
    check(architecture, linear(config, kept=True), config.num_warps, config.num_stages)


def test_loads_and_stores_are_wide_and_round_to_nearest() -> None:
    chosen = configs.COMPOSE
    for made, config in (
        (forward(chosen.forward, "bf16"), chosen.forward),
        (backward(chosen.backward, "bf16"), chosen.backward),
    ):
        ptx = assembly(made, config.num_warps)["ptx"]
        memory = re.findall(r"(?:ld|st)\.global\S*", ptx)
        assert any(".v4.b32" in name for name in memory)
        assert not any(name.endswith((".b16", ".u16")) for name in memory), memory
        assert "cvt.rn.bf16x2.f32" in ptx
        assert "cvt.rz" not in ptx
        assert "atom." not in ptx
        assert not re.search(r"\bred\.(?:global|async)", ptx)


def each_kind(wide: bool = False, **options: Any) -> dict[str, tuple[ASTSource, int]]:
    return {
        "forward": (forward(configs.COMPOSE.forward, "bf16", wide=wide, **options), configs.COMPOSE.forward.num_warps),
        "backward": (
            backward(configs.COMPOSE.backward, "bf16", wide=wide, **options),
            configs.COMPOSE.backward.num_warps,
        ),
        "linear": (linear(configs.LINEAR[0], True, wide=wide, **options), configs.LINEAR[0].num_warps),
    }


@pytest.mark.parametrize("kind", ["forward", "backward", pytest.param("linear", marks=pytest.mark.slow)])
def test_scalars_in_fp64_make_no_fp64_arithmetic(kind: str) -> None:
    """Inductor hands floats over in fp64, where a GPU is slow."""
    ptx = assembly(*each_kind(scale="fp64")[kind])["ptx"]
    assert not re.findall(r"\b(?:add|sub|mul|fma|mad|div)(?:\.\w+)*\.f64\b", ptx)
    assert "cvt.rn.f32.f64" in ptx


@pytest.mark.parametrize("kind", ["forward", "backward", "linear"])
def test_offsets_have_64_bits_before_a_tile_and_within_one_on_request(kind: str) -> None:
    """Products of a position and a stride, in the intermediate representation. Before a tile they have 64 bits always, with
    strides of 32 bits too; within a tile where the launcher found that the strides ask for it."""
    rows = ("stride_bo", "stride_br", "stride_go", "stride_gr", "stride_xt", "stride_wo", "stride_ht", "stride_lo")
    for wide, long in ((False, ()), (True, (*rows, "stride_lr", "stride_yr", "stride_tr", "stride_dr"))):
        ttir = assembly(*each_kind(wide, long=long)[kind])["ttir"]
        products = re.findall(r"arith\.muli .* : (\S+)", ttir)
        assert "i64" in products
        tiles = {p.split("x")[-1] for p in products if p.startswith("tensor")}
        assert tiles == {"i64>"} if wide else "i32>" in tiles


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_grid_of_one_program_compiles(kind: str) -> None:
    """The launcher makes integers of one constants, the counts of blocks among them."""
    ones = {"row_blocks": 1, "column_blocks": 1, "rows": 1, "columns": 1, "blocks": 1, "part": 1}
    made, warps = each_kind(ones=ones)[kind]
    assert assembly(made, warps)["ptx"]
