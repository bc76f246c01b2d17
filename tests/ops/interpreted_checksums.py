"""The kernels that compare contents, and the norms that are computed where these changed, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import EXAMPLES, close, operands

from dorafx.ops import dispatch
from dorafx.ops.triton import checksums
from dorafx.ops.triton.checksums import Checksums, GuardedNorms, Memory
from dorafx.ops.triton.row_norm import GROUP, Guard, launch_group

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _short_chunks() -> Iterator[None]:
    """So that small tensors have several; of a sampled one every third is compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "WORDS", 64)
        patch.setattr(checksums, "EVERY", 3)
        yield


def phase() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64)


class Memories:
    """Bytes, with what compares them; each tensor belongs to a norm of its own."""

    def __init__(self, *tensors: torch.Tensor, sampled: bool = False) -> None:
        memories = [Memory(t.data_ptr(), t.nbytes, i, sampled) for i, t in enumerate(tensors)]
        self.checksums = Checksums(memories, len(tensors), CPU)
        self.phase = phase()
        self.sums, changed = self.checksums.compare(None, self.phase, False)
        assert changed.all(), "nothing is known yet"

    def changed(self, sampled: bool = False) -> list[bool]:
        _, changed = self.checksums.compare(self.sums, self.phase, sampled)
        return changed.bool().tolist()


@settings(max_examples=EXAMPLES, deadline=None)
@given(size=st.integers(1, 2000), place=st.integers(0, 1999), bit=st.integers(0, 7), offset=st.integers(0, 7))
def test_every_bit_counts(size: int, place: int, bit: int, offset: int) -> None:
    """At any address, of any number of bytes."""
    memory = torch.randint(0, 256, (size + offset,), dtype=torch.uint8)[offset:]
    other = torch.randint(0, 256, (100,), dtype=torch.uint8)
    memories = Memories(other, memory)
    assert memories.changed() == [False, False]
    memory[place % size] ^= 1 << bit
    assert memories.changed() == [False, True]
    memory[place % size] ^= 1 << bit
    assert memories.changed() == [False, False]


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows=st.permutations(range(6)), width=st.integers(1, 200))
def test_positions_count(rows: list[int], width: int) -> None:
    matrix = torch.randint(0, 256, (6, width), dtype=torch.uint8)
    memories = Memories(matrix)
    permuted = matrix[rows].clone()
    same = torch.equal(matrix, permuted)
    matrix.copy_(permuted)
    assert memories.changed() == [not same]


def test_a_transposed_square_is_another_content() -> None:
    matrix = torch.randn(24, 24)
    memories = Memories(matrix)
    matrix.copy_(matrix.t().clone())
    assert memories.changed() == [True]


def test_what_is_between_the_bytes_of_two_tensors_does_not_count() -> None:
    buffer = torch.randint(0, 256, (300,), dtype=torch.uint8)
    memories = Memories(buffer[:100], buffer[104:300])
    buffer[100:104] = 7
    assert memories.changed() == [False, False]


def test_samples_are_others_in_every_call_and_at_last_all() -> None:
    matrix = torch.randn(5 * 64)
    for place in (0, 63, 64, 200, 319):
        memories = Memories(matrix, sampled=True)
        matrix[place] += 1
        found = []
        for _ in range(3):
            found.append(memories.changed(sampled=True)[0])
            memories.phase += 1
        assert sum(found) == 1 and found[place // 64 % 3]
        assert memories.changed() == [True], "a call that does not trust the host compares all"


def test_checksums_that_were_not_taken_are_kept() -> None:
    matrix = torch.randn(5 * 64)
    memories = Memories(matrix, sampled=True)
    matrix += 1
    fresh, _ = memories.checksums.compare(memories.sums, memories.phase, True)
    assert (fresh != memories.sums).tolist() == [True, False, False, True, False]


def test_sums_are_the_same_in_every_call() -> None:
    matrix = torch.randn(1000)
    memories = Memories(matrix)
    assert torch.equal(memories.checksums.compare(memories.sums, memories.phase, False)[0], memories.sums)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 130), st.integers(1, 40)), min_size=1, max_size=4),
    weight=st.sampled_from(DTYPES),
    factor=st.sampled_from(DTYPES),
    layout=st.sampled_from(["rows", "columns", "strided"]),
    flags=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_norms_are_computed_where_a_flag_says_so(
    shapes: list[tuple[int, int, int]], weight: torch.dtype, factor: torch.dtype, layout: str, flags: list[bool]
) -> None:
    """Of several shapes and ranks in one launch, in any layout; the others are copied bit for bit."""
    dtypes = (weight, factor, factor)
    norms = [tuple(t.to(d) for t, d in zip(operands(*shape, seed=i), dtypes)) for i, shape in enumerate(shapes)]
    if layout == "columns":
        norms = [tuple(t.t().contiguous().t() for t in tensors) for tensors in norms]
    if layout == "strided":
        norms = [tuple(t.repeat_interleave(2, 1)[:, ::2] for t in tensors) for tensors in norms]
    scales = [0.5 - i for i in range(len(norms))]
    guarded = GuardedNorms(norms, scales, [None] * len(norms), CPU)  # type: ignore[arg-type]
    before, when = torch.randn(sum(guarded.sizes)), phase()
    changed = torch.tensor(flags[: len(norms)], dtype=torch.int32)
    got = guarded.norms(changed, before, when)
    assert when.item() == 1, "the next call samples other chunks"
    for norm, kept, tensors, scale, flag in zip(
        got.split(guarded.sizes), before.split(guarded.sizes), norms, scales, flags
    ):
        if flag:
            close(norm, *tensors, scale)
        else:
            assert torch.equal(norm, kept)


def test_dtypes_of_several_kinds() -> None:
    """A launch for each, which count the call once."""
    wide, narrow = operands(40, 50, 5), tuple(t.bfloat16() for t in operands(33, 20, 9))
    guarded = GuardedNorms([wide, narrow, wide], [1.0, 2.0, 3.0], [None, None, torch.bfloat16], CPU)  # type: ignore[list-item]
    when = phase()
    got = guarded.norms(torch.ones(3, dtype=torch.int32), torch.zeros(113), when).split(guarded.sizes)
    for norm, tensors, scale in zip(got, (wide, narrow, wide), (1.0, 2.0, 3.0)):
        close(norm, *tensors, scale)
    assert when.item() == 1


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("flags", [[0, 0, 0], [0, 1, 0], [1, 1, 1]])
def test_a_group_is_computed_where_flags_say_so(flags: list[int], parts: int) -> None:
    """By the tiles of long forwards, with and without a division of d_in."""
    group = [operands(40, 300, 6, seed=i) for i in range(3)]
    before = torch.randn(120)
    guard = Guard(torch.tensor(flags, dtype=torch.int32), before.clone())
    got = launch_group(group, 0.7, parts, guard=guard)
    for i, (norm, tensors) in enumerate(zip(got, group)):
        assert norm.data_ptr() == guard.out[40 * i :].data_ptr()
        if flags[i]:
            close(norm, *tensors, 0.7)
        else:
            assert torch.equal(norm, before[40 * i : 40 * i + 40])


def test_more_norms_than_one_launch_takes() -> None:
    group = [operands(9, 30, 4, seed=i) for i in range(GROUP + 2)]
    flags = torch.tensor([i % 2 for i in range(GROUP + 2)], dtype=torch.int32)
    got = dispatch.row_norms_where(flags, torch.zeros(9 * len(group)), group, 0.7, None)
    for i, (norm, tensors) in enumerate(zip(got, group)):
        if i % 2:
            close(norm, *tensors, 0.7)
        else:
            assert not norm.any()
