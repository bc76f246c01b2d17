# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""Contents of tensors on a device: position-sensitive 64-bit checksums of their bytes, compared there with those that are kept, and norms
that are computed only where they differ. The host reads nothing, so it never waits, and a CUDA graph can capture all of it.

A checksum is the sum modulo 2**64 of one number for each word of memory: the word and its position, mixed by the finaliser of
SplitMix64 (Steele, Lea and Flood, 2014), a bijection. Sums do not depend on the order of programs, and the same words at other positions
have another sum. Contents that differ collide with a probability of 2**-64.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .row_norm import norm_of_rows
from .tiles import launched_on, operand_type, precision_of

WORDS = 4096
"""Words of a chunk: the contents of a tensor are kept as a checksum of each chunk."""
EVERY = 128
"""Of a sampled tensor one chunk of this many is compared in a call, in each call others."""
_PROGRAMS = 2048
"""Programs that fill a device."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_UNITS = {4: tl.uint32, 2: tl.uint16, 1: tl.uint8}


@triton.jit
def _mixed(words, positions):
    """SplitMix64's finaliser of a word and its position."""
    x = (positions.to(tl.uint64) << 32) | words.to(tl.uint64)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def checksum_kernel(
    memories,
    kept,
    fresh,
    changed,
    phase,
    UNIT: tl.constexpr,
    WORDS: tl.constexpr,
    EVERY: tl.constexpr,
    COMPARED: tl.constexpr,
    SAMPLED: tl.constexpr,
):
    """The checksums of some chunks of one tensor.

    Args:
        memories: pointer to five integers a tensor: its address, its words, where its checksums begin, the norm that it belongs to, and
            whether it is sampled.
        kept, fresh: pointers to checksums, those of the contents before and those of the present ones.
        changed: pointer to a flag for each norm, set where they differ.
        phase: pointer to a number: which of the chunks of sampled tensors are compared.
        UNIT: the type of a word.
        COMPARED: whether there is something to compare with.
        SAMPLED: whether tensors that may be sampled are.
    """
    memory = memories + 5 * tl.program_id(1)
    address = tl.load(memory)
    words = tl.load(memory + 1)
    into = tl.load(memory + 2)
    norm = tl.load(memory + 3)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    if SAMPLED:
        if tl.load(memory + 4) != 0:
            first = first * EVERY + tl.load(phase) % EVERY
            step = step * EVERY
    pointer = address.to(tl.pointer_type(UNIT))
    inside = tl.arange(0, WORDS)
    for chunk in tl.range(first, tl.cdiv(words, WORDS), step):
        # Within a chunk 32 bits are enough: a thread holds sixteen words, and wider positions take the registers of some cards.
        begin = chunk * WORDS
        mask = inside < tl.minimum(words - begin, WORDS).to(tl.int32)
        mixed = _mixed(
            tl.load(pointer + begin + inside, mask=mask, other=0), begin.to(tl.uint32) + inside.to(tl.uint32)
        )
        total = tl.sum(tl.where(mask, mixed, 0), axis=0).to(tl.int64, bitcast=True)
        if COMPARED:
            if tl.load(kept + into + chunk) != total:
                tl.store(changed + norm, 1)
        tl.store(fresh + into + chunk, total)


@triton.jit
def guarded_norm_kernel(
    norms,
    scales,
    changed,
    kept,
    out,
    phase,
    WEIGHT: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A block of rows of one norm: computed if its contents changed, else copied.

    Args:
        norms: pointer to 14 integers a norm: the addresses of its operands, d_out, d_in, rank, the two strides of each operand, its
            position in ``out``, and its flag.
        scales: pointer to the scale of each.
        changed: pointer to the flags.
        kept, out: pointers to the norms of before, and to what this writes.
        phase: pointer to a number that is incremented: the next call samples other chunks. None to leave it.
    """
    index = tl.program_id(2)
    norm = norms + 14 * index
    d_out = tl.load(norm + 3).to(tl.int32)
    row = tl.program_id(0) * ROWS
    if phase is not None:
        if tl.program_id(0) + index == 0:
            tl.store(phase, tl.load(phase) + 1)
    if row >= d_out:
        return
    place = tl.load(norm + 12)
    if tl.load(changed + tl.load(norm + 13)) == 0:
        rows = row + tl.arange(0, ROWS)
        mask = rows < d_out
        tl.store(out + place + rows, tl.load(kept + place + rows, mask=mask), mask=mask)
        return
    d_in, rank = tl.load(norm + 4).to(tl.int32), tl.load(norm + 5).to(tl.int32)
    weight = tl.load(norm).to(tl.pointer_type(WEIGHT))
    left = tl.load(norm + 1).to(tl.pointer_type(LEFT))
    right = tl.load(norm + 2).to(tl.pointer_type(RIGHT))
    norm_of_rows(
        weight, left, right, weight, weight, out + place, tl.load(scales + index), d_out, d_in, rank, d_in, 1,
        tl.load(norm + 6).to(tl.int32), tl.load(norm + 7).to(tl.int32), tl.load(norm + 8).to(tl.int32),
        tl.load(norm + 9).to(tl.int32), tl.load(norm + 10).to(tl.int32), tl.load(norm + 11).to(tl.int32),
        "dense", False, WEIGHT, ROWS, COLUMNS, DEPTH, 0, OPERAND, PRECISION, 1,
    )  # fmt: skip


class Memory(NamedTuple):
    """The memory of a tensor.

    Attributes:
        address, size: its bytes.
        norm: the position of the norm that is computed from it.
        sampled: whether a call that trusts the host compares some of its chunks only.
    """

    address: int
    size: int
    norm: int
    sampled: bool


class Checksums:
    """The memories of some norms, and how to compare their contents. A change of an address needs another of these.

    Args:
        memories: their bytes.
        norms: how many norms they belong to.
        device: where all of this is.

    Attributes:
        count: checksums of all chunks together.
        shape: equal for memories whose checksums can be compared.
    """

    def __init__(self, memories: Sequence[Memory], norms: int, device: torch.device) -> None:
        self.norms, self.device = norms, device
        self.count = 0
        self.shape: list[tuple[int, int, int]] = []
        groups: dict[int, list[tuple[list[int], int, int]]] = {}
        for address, size, norm, sampled in memories:
            unit = next(unit for unit in _UNITS if not (address | size) % unit)
            self.shape.append((unit, size, norm))
            chunks = triton.cdiv(size // unit, WORDS)
            row = [address, size // unit, self.count, norm, int(sampled)]
            groups.setdefault(unit, []).append((row, chunks, triton.cdiv(chunks, EVERY) if sampled else chunks))
            self.count += chunks
        self._launches = [
            (
                _UNITS[unit],
                on_device([row for row, _, _ in rows], torch.int64, device),
                len(rows),
                _programs(max(chunks for _, chunks, _ in rows), len(rows)),
                _programs(max(chunks for _, _, chunks in rows), len(rows)),
            )
            for unit, rows in groups.items()
        ]

    def compare(
        self, kept: torch.Tensor | None, phase: torch.Tensor, sampled: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare the present contents with those that are kept: a launch for each width of words, which is one unless some tensor
        has an odd number of bytes.

        Args:
            kept: ``[count]`` checksums, int64; None if nothing is kept: then all has changed.
            phase: one int64 that says which chunks are sampled.
            sampled: whether to compare only some chunks of the memories that may be sampled. The checksums of the others are then
                taken over from ``kept``.

        Returns:
            The present checksums, and an int32 for each norm, which is not zero where its contents changed.
        """
        sampled = sampled and kept is not None
        if kept is None or not sampled:
            fresh = torch.empty(self.count, dtype=torch.int64, device=self.device)
        else:
            fresh = kept.clone()
        changed = (torch.ones if kept is None else torch.zeros)(self.norms, dtype=torch.int32, device=self.device)
        with launched_on(self.device):
            for unit, table, tensors, programs, sampling in self._launches:
                checksum_kernel[(sampling if sampled else programs, tensors)](
                    table,
                    fresh if kept is None else kept,
                    fresh,
                    changed,
                    phase,
                    UNIT=unit,
                    WORDS=WORDS,
                    EVERY=EVERY,
                    COMPARED=kept is not None,
                    SAMPLED=sampled,
                    num_warps=8,
                )
        return fresh, changed


def _programs(chunks: int, tensors: int) -> int:
    """Programs for each tensor: as many as fill a device, and no more than the largest has chunks."""
    return max(1, min(chunks, -(-_PROGRAMS // tensors)))


class GuardedNorms:
    """Norms of dense weights, each computed where a flag says so, and copied elsewhere: a launch for each mix of dtypes, whatever the
    shapes. A norm that did not change costs a few loads; one that did is computed by small tiles that fit every device.

    Args:
        operands: weight ``[d_out, d_in]``, left ``[d_out, r]`` and right ``[r, d_in]`` of each, not fp64 and not empty, on one device.
        scales: the scale of each delta.
        factor_dtypes: the dtype that the factors of each are multiplied in, where it is narrower than theirs.
        device: where they are.

    Attributes:
        sizes: d_out of each.
    """

    def __init__(
        self,
        operands: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        scales: Sequence[float],
        factor_dtypes: Sequence[torch.dtype | None],
        device: torch.device,
    ) -> None:
        self.sizes = [weight.shape[0] for weight, _, _ in operands]
        self.device = device
        places = [0, *itertools.accumulate(self.sizes)]
        groups: dict[Any, list[int]] = {}
        for i, (tensors, dtype) in enumerate(zip(operands, factor_dtypes)):
            groups.setdefault((*(t.dtype for t in tensors), dtype), []).append(i)
        self._launches = []
        for (weight, left, right, dtype), members in groups.items():
            rows = [
                [
                    *(t.data_ptr() for t in operands[i]),
                    *operands[i][0].shape,
                    operands[i][2].shape[0],
                    *(stride for t in operands[i] for stride in t.stride()),
                    places[i],
                    i,
                ]
                for i in members
            ]
            operand = operand_type(left, right, self.device.type == "cpu", dtype)
            constants = {
                "WEIGHT": _TYPES[weight],
                "LEFT": _TYPES[left],
                "RIGHT": _TYPES[right],
                "OPERAND": operand,
                "PRECISION": precision_of(operand),
                **GUARDED_BLOCKS,
            }
            grid = (max(triton.cdiv(self.sizes[i], GUARDED_BLOCKS["ROWS"]) for i in members), 1, len(members))
            table = on_device(rows, torch.int64, self.device)
            self._launches.append(
                (grid, table, on_device([scales[i] for i in members], torch.float32, self.device), constants)
            )

    def norms(self, changed: torch.Tensor, kept: torch.Tensor, phase: torch.Tensor) -> torch.Tensor:
        """The norms one after another, fp32, in new memory.

        Args:
            changed: an int32 for each.
            kept: those of before.
            phase: one int64, which is incremented: the next call samples other chunks.
        """
        if not self._launches:
            phase.add_(1)
        out = torch.empty(sum(self.sizes), dtype=torch.float32, device=self.device)
        with launched_on(self.device):
            for k, (grid, table, scales, constants) in enumerate(self._launches):
                guarded_norm_kernel[grid](
                    table, scales, changed, kept, out, None if k else phase, **constants, num_warps=4
                )
        return out


GUARDED_BLOCKS = {"ROWS": 32, "COLUMNS": 64, "DEPTH": 16}
"""Tiles of the guarded norms: addresses and strides that are read from memory take registers, and no card may spill."""


def on_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of some numbers, copied without waiting for the device."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
