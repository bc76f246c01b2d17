"""What one run of a program lets its caller see, and whether two programs let him see the same.

Values are not all of it. A caller can tell strides (``view`` raises where they are others), whether two outputs share memory (writing
one changes the other), whether an output is an input, what became of the inputs, which leaves received a gradient and
which of those are zeros, and which random numbers come next.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dorafx._compat.distributed import placements
from dorafx._compat.tensors import flattened, is_wrapper, storage_id, unflattened

GRAD_MODES = ("as it is", "grad", "no_grad", "inference")
_ROUNDINGS = 64
"""How many units in the last place of a result's dtype may not show where fp64 stands for it."""

ERROR_FACTOR = 8
"""How many times the original's own error, and a unit in the last place, a program in low precision may be off, both as root mean
squares: the largest error of few elements is a matter of luck. Faithful rewrites stay below 3."""

_NOISE = 1000
"""How many times as far as a rounding of the inputs moves the original's results another program's may be."""

_EXACT_OVERLAP = 1 << 22
"""Largest storage, in elements, of which overlapping parts are told from interleaved ones."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a caller sees of one tensor.

    Attributes:
        value: a copy; of a DTensor, of its local part.
        strides: None for dimensions of length 1, whose stride nobody can tell, and of an empty tensor.
        kind: class, layout and placements, where they are not those of a plain tensor.
    """

    value: torch.Tensor
    shape: tuple[int, ...]
    strides: tuple[int | None, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    kind: str = ""


@dataclass(eq=False)
class Observation:
    """Everything that one run of a program lets its caller see.

    Attributes:
        structure: the containers of the outputs.
        outputs: name -> a :class:`Seen`, or what is no tensor as it is.
        inputs: name -> the tensors that the program was given, and the leaves that it reads by itself, after the run.
        aliases: pairs of names whose tensors share memory. Outputs among themselves, and with inputs.
        same: pairs of names that are one object.
        gradients: name -> gradient of every leaf that requires one; None is kept apart from zeros. Empty where no output
            requires grad.
        generators: states of the random generators after the run.
        raised: what the forward or the backward raised: the class's name and ``" in the backward"``; empty where nothing was.
        message: the first line of what was raised.
    """

    structure: str = ""
    outputs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Seen] = field(default_factory=dict)
    aliases: frozenset[tuple[str, str]] = frozenset()
    same: frozenset[tuple[str, str]] = frozenset()
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    generators: dict[str, torch.Tensor] = field(default_factory=dict)
    raised: str = ""
    message: str = ""


def observe(
    program: Callable[..., Any],
    inputs: Sequence[Any],
    leaves: Mapping[str, torch.Tensor] | Sequence[torch.Tensor] = (),
    grad_mode: str = "as it is",
    seed: int = 0,
    backward: bool = True,
    names: Sequence[str] = (),
) -> Observation:
    """Run a program once and write down all that it shows.

    Args:
        program: called with fresh copies of the inputs, of equal strides; what shared memory among them still does, and what was one
            object still is.
        inputs: its positional arguments; tensors may be nested in containers.
        leaves: tensors that the program reads by itself, such as parameters. They are given as they are, and have their
            values back afterwards.
        grad_mode: that of the forward: ``"as it is"`` where observe is called, ``"grad"``, ``"no_grad"`` or ``"inference"``.
        seed: of the random generators before the run, and of the gradients that come from above. The generators have their
            states back afterwards.
        backward: whether to run one.
        names: what to call the inputs' tensors, one for each leaf of ``inputs``; ``"input 0"`` and so on by default.

    Returns:
        What was seen. An exception of the program's is part of it.

    Raises:
        ValueError: an unknown mode.
    """
    if grad_mode not in GRAD_MODES:
        raise ValueError(f"observe: {grad_mode!r} is none of {', '.join(GRAD_MODES)}")
    named = dict(leaves) if isinstance(leaves, Mapping) else {f"leaf {i}": leaf for i, leaf in enumerate(leaves)}
    with _mode("as it is" if not torch.is_inference_mode_enabled() else "grad"):
        arguments = _copied(inputs)
        before = {name: leaf.detach().clone() for name, leaf in named.items()}
    called = dict(enumerate(names))
    named_inputs = {
        called.get(i, f"input {i}"): argument
        for i, argument in enumerate(flattened(list(arguments))[0])
        if isinstance(argument, torch.Tensor)
    }
    watched = {**named_inputs, **named}
    # Asked now: a program may change what requires grad.
    trained = {name: t for name, t in watched.items() if t.requires_grad}
    observation = Observation()
    with _preserved_generators(watched.values()):
        torch.manual_seed(seed)
        try:
            with _mode(grad_mode):
                returned = program(*arguments)
            _see_outputs(observation, returned, watched)
            observation.generators = _states(watched.values())
            observation.inputs = {name: _seen(t) for name, t in watched.items()}
            if backward:
                _see_gradients(observation, returned, trained, seed)
        except Exception as error:
            observation.raised = type(error).__name__ + (" in the backward" if observation.inputs else "")
            observation.message = (str(error).splitlines() or [""])[0]
            observation.inputs = observation.inputs or {name: _seen(t) for name, t in watched.items()}
    with torch.no_grad():
        for name, value in before.items():
            if not _equal_bits(named[name], value):
                named[name].data.copy_(value)
    return observation


# -- running ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Floating tensors are made in this dtype where none is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _mode(name: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if name == "grad":
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
        elif name == "no_grad":
            stack.enter_context(torch.no_grad())
        elif name == "inference":
            stack.enter_context(torch.inference_mode())
        yield


def _copied(inputs: Sequence[Any]) -> list[Any]:
    """Copies of the tensors in the inputs. Tensors on one storage get one copy of it."""
    leaves, structure = flattened(list(inputs))
    copies: dict[int, torch.Tensor] = {}
    storages: dict[int, torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if is_wrapper(tensor) or tensor.layout is not torch.strided:
            return tensor.detach().clone()
        storage = tensor.untyped_storage()
        address = storage_id(tensor)
        if address not in storages:
            storages[address] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage.clone())  # type: ignore[no-untyped-call]
        copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        copy.set_(storages[address].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
        return copy

    for leaf in leaves:
        if isinstance(leaf, torch.Tensor) and id(leaf) not in copies:
            copy = copied(leaf)
            if isinstance(leaf, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, requires_grad=leaf.requires_grad)
            elif copy.is_floating_point() or copy.is_complex():
                copy.requires_grad_(leaf.requires_grad)
            copies[id(leaf)] = copy
    copied_tree: list[Any] = unflattened([copies.get(id(leaf), leaf) for leaf in leaves], structure)
    return copied_tree


def _devices(tensors: Any) -> list[torch.device]:
    return list(dict.fromkeys(t.device for t in tensors if t.device.type not in ("cpu", "meta")))


@contextlib.contextmanager
def _preserved_generators(tensors: Any) -> Iterator[None]:
    devices = _devices(tensors)
    kinds = {device.type for device in devices}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in kinds:
            of_kind = [device for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=of_kind, device_type=kind))
        yield


def _states(tensors: Any) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    for device in _devices(tensors):
        states[str(device)] = getattr(torch, device.type).get_rng_state(device)
    return states


# -- seeing -----------------------------------------------------------------------------------------------------------


def _see_outputs(observation: Observation, returned: Any, watched: dict[str, torch.Tensor]) -> None:
    leaves, structure = flattened(returned)
    observation.structure = " ".join(str(structure).split())
    tensors: dict[str, torch.Tensor] = {}
    for i, leaf in enumerate(leaves):
        name = f"output {i}"
        if isinstance(leaf, torch.Tensor):
            tensors[name] = leaf
            observation.outputs[name] = _seen(leaf)
        else:
            observation.outputs[name] = leaf
    others = list({**watched, **tensors}.items())
    aliases, same = set(), set()
    for name, output in tensors.items():
        for other_name, other in others:
            if other_name == name:
                break  # the pairs after it are met from their other side
            if other is output:
                same.add((other_name, name))
            if _overlap(output, other):
                aliases.add((other_name, name))
    observation.aliases, observation.same = frozenset(aliases), frozenset(same)


def _see_gradients(observation: Observation, returned: Any, trained: dict[str, torch.Tensor], seed: int) -> None:
    outputs, weights = [], []
    for i, leaf in enumerate(flattened(returned)[0]):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            # One generator each: what comes from above depends on no other output.
            generator = torch.Generator().manual_seed(1 + seed + 1000 * i)
            part: Any = leaf if placements(leaf) is None else leaf.to_local()  # type: ignore[attr-defined]
            outputs.append(part)
            weight = torch.randn(part.shape, dtype=torch.float64, generator=generator)
            weights.append((weight + 0.5 * weight.sign()).to(part.device, part.dtype))
    if not outputs or not trained:
        return
    with _mode("grad"):
        gradients = torch.autograd.grad(outputs, list(trained.values()), weights, allow_unused=True)
    observation.gradients = {name: None if g is None else _local(g.detach()) for name, g in zip(trained, gradients)}


def _seen(tensor: torch.Tensor) -> Seen:
    value = tensor.detach()
    of = placements(tensor)
    kind = "" if type(tensor) in (torch.Tensor, torch.nn.Parameter) else type(tensor).__name__
    if tensor.layout is not torch.strided:
        kind += f" {tensor.layout}"
    if of is not None:
        kind += f" {of}"
    strides: tuple[int | None, ...] = ()
    if tensor.layout is torch.strided and tensor.numel():
        strides = tuple(stride if size > 1 else None for size, stride in zip(tensor.shape, tensor.stride()))
    return Seen(
        _local(value).clone(),
        tuple(tensor.shape),
        strides,
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        kind.strip(),
    )


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor if placements(tensor) is None else tensor.to_local()
    return local


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether writing to one changes the other."""
    if any(is_wrapper(t) or t.layout is not torch.strided or not t.numel() for t in (one, other)):
        return one is other
    if one.device.type == "meta" or storage_id(one) != storage_id(other):
        return False
    ranges = []
    for t in (one, other):
        start = t.storage_offset() * t.element_size()
        length = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
        ranges.append((start, start + length * t.element_size()))
    (start, end), (other_start, other_end) = ranges
    if start >= other_end or other_start >= end:
        return False
    elements = max(end, other_end) // one.element_size()
    if one.dtype != other.dtype or elements > _EXACT_OVERLAP:
        return True
    touched = torch.zeros(elements, dtype=torch.bool)
    touched.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(touched.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = _local(one.detach()), _local(other.detach())
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


# -- comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """What differs between two observations.

    Attributes:
        differences: sentences, each of which says what differs; none where nothing does.
        error: largest difference of values, relative to the largest finite element of their tensor; inf where two values
            cannot be compared.
    """

    differences: tuple[str, ...]
    error: float


def differences(
    expected: Observation, actual: Observation, tolerance: float = 1e-9, exact: Observation | None = None
) -> list[str]:
    """What of a program's observation differs from the original's; empty where nothing does. As :func:`compare`."""
    return list(compare(expected, actual, tolerance, exact).differences)


def compare(
    expected: Observation,
    actual: Observation,
    tolerance: float = 1e-9,
    exact: Observation | None = None,
    dtypes: Observation | None = None,
    nan_gradients: bool = True,
    noise: Observation | None = None,
) -> Comparison:
    """Compare what a program shows with what the original shows.

    Values: where the original gives a finite number, so must the other, to the tolerance; where it gives NaN, the other must give
    no finite number; where it gives an infinity, the other must give the same or NaN (the same expression in another
    order gives ``inf - inf``). A gradient that is None is not one of zeros. Of a vector (a bias) the gradient may be a number where
    the original's is NaN if that column of all outputs is lost already: ``g·(y - b) + b`` with an infinite g.

    Args:
        expected: of the original.
        actual: of the other.
        tolerance: largest difference, relative to the largest finite element of the original's tensor.
        exact: of the original in fp64, for programs in lower precision. Then the other may be as far from it as a small
            multiple of the original's own distance and a unit in the last place of the result's dtype, as root mean squares.
        dtypes: of the original in its own dtypes, where both sides ran in fp64 but for the program's own casts. Of these the last
            few units in the last place of the result's own dtype do not show.
        nan_gradients: whether a gradient that is NaN must stay one. With infinities among the inputs autograd gives ``inf - inf`` where
            the same expression in another order, ``g·(y - b) + g·b``, has nothing to subtract; the outputs show them anyway.
        noise: of the original in fp64, on inputs that were moved by a rounding. What that changes (the gradient of a saturated softmax is
            all rounding) no order of summation keeps.
    """
    if expected.raised or actual.raised:
        if expected.raised == actual.raised:
            return Comparison((), 0.0)
        outcomes = [f"{o.raised}: {o.message}" if o.raised else "no error" for o in (actual, expected)]
        return Comparison((f"{outcomes[0]} where the original raises {outcomes[1]}",), math.inf)
    comparer = _Comparer(tolerance, exact, dtypes, nan_gradients, noise)
    comparer.lost = _lost_columns(expected, actual)
    if expected.structure != actual.structure:
        comparer.say(f"the outputs' structure is {actual.structure}, not {expected.structure}")
    for group in ("outputs", "inputs"):
        theirs, ours = getattr(expected, group), getattr(actual, group)
        for name in theirs:
            if name in ours:
                comparer.compare_any(
                    name if group == "outputs" else f"{name} after the run", theirs[name], ours[name], group
                )
    for pair in sorted(actual.aliases - expected.aliases):
        comparer.say(f"{pair[1]} shares memory with {pair[0]}")
    for pair in sorted(expected.aliases - actual.aliases):
        comparer.say(f"{pair[1]} no longer shares memory with {pair[0]}")
    for pair in sorted(actual.same ^ expected.same):
        if (pair in actual.aliases) == (pair in expected.aliases):
            comparer.say(f"{pair[1]} is {'' if pair in actual.same else 'no longer '}the same object as {pair[0]}")
    for name, state in expected.generators.items():
        if name in actual.generators and not torch.equal(state, actual.generators[name]):
            comparer.say(f"other random numbers were drawn on {name}")
    for name in dict.fromkeys((*expected.gradients, *actual.gradients)):
        comparer.compare_gradients(name, expected.gradients.get(name), actual.gradients.get(name))
    return Comparison(tuple(dict.fromkeys(comparer.sentences)), comparer.error)


def _lost_columns(expected: Observation, actual: Observation) -> dict[int, torch.Tensor]:
    """For each length of a last axis of outputs, the columns in which none of them has a finite number, with or without the rewrite."""
    columns: dict[int, torch.Tensor] = {}
    for name, one in expected.outputs.items():
        other = actual.outputs.get(name)
        values = [getattr(seen, "value", None) for seen in (one, other)]
        for value in values:
            if isinstance(value, torch.Tensor) and value.dim() and value.is_floating_point() and value.numel():
                lost = ~value.isfinite().reshape(-1, value.shape[-1]).any(0)
                size = value.shape[-1]
                columns[size] = columns[size] & lost if size in columns else lost
    return columns


class _Comparer:
    def __init__(
        self,
        tolerance: float,
        exact: Observation | None,
        dtypes: Observation | None,
        nan_gradients: bool,
        noise: Observation | None,
    ) -> None:
        self.tolerance = tolerance
        self.exact = exact
        self.dtypes = dtypes
        self.nan_gradients = nan_gradients
        self.noise = noise
        self.lost: dict[int, torch.Tensor] = {}
        self.sentences: list[str] = []
        self.error = 0.0

    def say(self, sentence: str) -> None:
        self.sentences.append(sentence)
        self.error = math.inf

    def compare_any(self, name: str, expected: Any, actual: Any, group: str) -> None:
        if not isinstance(expected, Seen) or not isinstance(actual, Seen):
            if type(expected) is not type(actual):
                self.say(f"{name} is a {type(actual).__name__}, not a {type(expected).__name__}")
            elif isinstance(expected, float) and isinstance(actual, float):
                self._compare_values(name, torch.tensor(expected), torch.tensor(actual))
            elif not _is_same(expected, actual):
                self.say(f"{name} is {actual!r}, not {expected!r}")
            return
        for what in ("kind", "shape", "dtype", "device", "strides", "requires_grad"):
            theirs, ours = getattr(expected, what), getattr(actual, what)
            if theirs != ours:
                self.say(
                    f"{name} has {what} {ours or 'of a plain tensor'}, not {theirs or 'of a plain tensor'}"
                    if what == "kind"
                    else f"{name} has {what} {ours}, not {theirs}"
                )
        if expected.shape != actual.shape:
            return
        exact, typed, moved = (
            getattr(of, group).get(name.removesuffix(" after the run")) if of is not None else None
            for of in (self.exact, self.dtypes, self.noise)
        )
        self._compare_values(
            name,
            expected.value,
            actual.value,
            exact.value if isinstance(exact, Seen) else None,
            typed.dtype if isinstance(typed, Seen) else None,
            moved.value if isinstance(moved, Seen) else None,
        )

    def compare_gradients(self, name: str, expected: torch.Tensor | None, actual: torch.Tensor | None) -> None:
        if expected is None or actual is None:
            if expected is not None:
                self.say(f"{name} receives no gradient, where the original gives {_text(expected)}")
            elif actual is not None:
                self.say(f"{name} receives a gradient, {_text(actual)}, where the original gives none")
            return
        for what in ("shape", "dtype"):
            if getattr(expected, what) != getattr(actual, what):
                self.say(f"the gradient of {name} has {what} {getattr(actual, what)}, not {getattr(expected, what)}")
        if expected.shape == actual.shape:
            exact, typed, moved = (
                of.gradients.get(name) if of is not None else None for of in (self.exact, self.dtypes, self.noise)
            )
            self._compare_values(
                f"the gradient of {name}", expected, actual, exact, typed.dtype if typed is not None else None, moved
            )

    def _compare_values(
        self,
        name: str,
        expected: torch.Tensor,
        actual: torch.Tensor,
        exact: torch.Tensor | None = None,
        rounded_to: torch.dtype | None = None,
        moved: torch.Tensor | None = None,
    ) -> None:
        if expected.layout is not torch.strided:
            expected, actual = expected.to_dense(), actual.to_dense()
        if not expected.numel():
            return
        if not (expected.is_floating_point() or expected.is_complex()):
            if not torch.equal(expected, actual.to(expected.dtype)):
                self.say(f"{name} differs in {int((expected != actual).sum())} of {expected.numel()} elements")
            return
        wide = torch.complex128 if expected.is_complex() else torch.float64
        dtype = expected.dtype
        expected, actual = expected.to(wide), actual.to(wide)
        finite = torch.isfinite(expected)
        if dtype is torch.float64:
            exact = None
        if exact is not None:
            # What is finite in fp64 may have overflowed in the original.
            finite &= torch.isfinite(exact)
        gone = finite & ~torch.isfinite(actual)
        if gone.any():
            self.say(f"{name} is {_number(actual[gone][0])} where the original gives {_number(expected[gone][0])}")
            return
        no_longer_nan = torch.isnan(expected) & torch.isfinite(actual)
        if (
            name.startswith("the gradient")
            and expected.numel() in self.lost
            and expected.numel() == max(expected.shape, default=0)
        ):
            no_longer_nan &= ~self.lost[expected.numel()].view(expected.shape)
        if no_longer_nan.any() and (self.nan_gradients or not name.startswith("the gradient")):
            self.say(f"{name} is {_number(actual[no_longer_nan][0])} where the original gives nan")
            return
        unlike = torch.isinf(expected) & ~torch.isnan(actual) & (actual != expected)
        if unlike.any():
            self.say(f"{name} is {_number(actual[unlike][0])} where the original gives {_number(expected[unlike][0])}")
            return
        if not finite.any():
            return
        expected, actual = expected[finite], actual[finite]
        if exact is not None:
            against = exact.to(wide)[finite]
            original_error = distance(expected, against) + torch.finfo(dtype).eps
            if moved is not None and moved.shape == finite.shape:
                original_error = max(original_error, distance(moved.to(wide)[finite], against) * _coarser(dtype))
            off, error = distance(actual, against), _largest_distance(actual, against)
            if off > max(self.tolerance, ERROR_FACTOR * original_error):
                self.sentences.append(
                    f"{name} is {off:.1e} off in the root mean square, more than {ERROR_FACTOR} times the original's {original_error:.1e}"
                )
        else:
            allowed, error = self.tolerance, _largest_distance(actual, expected)
            if rounded_to is not None and rounded_to.is_floating_point and rounded_to is not torch.float64:
                allowed = max(allowed, _ROUNDINGS * torch.finfo(rounded_to).eps)
            if moved is not None and moved.shape == finite.shape:
                allowed = max(allowed, _NOISE * _largest_distance(moved.to(wide)[finite], expected))
            if not error <= allowed:
                self.sentences.append(f"{name} differs by {error:.1e} of its largest element")
        self.error = max(self.error, error)


def _coarser(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / torch.finfo(torch.float64).eps


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of all elements together, relative to the other's; NaN counts for nothing."""
    return _number_of((one - other).norm() / other.norm().clamp_min(1e-300))


def _largest_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of an element, relative to the other's largest; NaN counts for nothing."""
    return _number_of((one - other).abs().max() / other.abs().max().clamp_min(1e-300))


def _number_of(distance: torch.Tensor) -> float:
    # Of what is compared all is finite, of the noise some may not be.
    return 0.0 if torch.isnan(distance) else distance.item()


def _is_same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # a class whose equality is no truth: what it shows is compared
        return repr(one) == repr(other)


def _text(gradient: torch.Tensor) -> str:
    return "zeros" if not gradient.any() else "numbers"


def _number(value: torch.Tensor) -> str:
    return f"{value.item():.3g}"
