"""What the caller of a program can observe of one run, and whether two programs are observably equal.

More than values: a caller can observe strides (``view`` depends on them), whether two outputs share memory (writing one changes the
other), whether an output is an input, how the inputs were changed, which leaves received a gradient and which gradients are zeros,
and which random numbers come next.
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
"""Differences up to this many units in the last place of a result's dtype are ignored where both sides ran in fp64 instead."""

ERROR_FACTOR = 8
"""How many times larger than the original's error, plus a unit in the last place, the error of a program in low precision may be. Both
are root mean squares: the largest error of few elements is a matter of luck. Faithful rewrites stay below 3."""

_NOISE = 1000
"""How many times larger a difference may be than the effect on the original's results of rounding its inputs."""

_EXACT_OVERLAP = 1 << 22
"""Largest storage, in elements, for which overlapping views are distinguished from interleaved ones."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a caller can observe of one tensor.

    Attributes:
        value: a copy; of a DTensor, of its local part.
        strides: None for dimensions of length 1, where they have no effect; empty for an empty tensor.
        kind: class, layout and placements, where they differ from a plain tensor's.
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
    """Everything that a caller can observe of one run of a program.

    Attributes:
        structure: the containers of the outputs.
        outputs: name -> a :class:`Seen`; a value that is no tensor is stored itself.
        inputs: name -> the input tensors, and the leaves that the program reads by itself, after the run.
        aliases: pairs of names whose tensors share memory: two outputs, or an output and an input.
        same: pairs, likewise, that are one and the same object.
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
    """Run a program once and record everything observable.

    Args:
        program: called with fresh copies of the inputs that preserve strides, shared memory and identity.
        inputs: its positional arguments; tensors may be nested in containers.
        leaves: tensors that the program reads by itself, such as parameters. They are not copied; their values are restored
            afterwards.
        grad_mode: that of the forward: ``"as it is"`` where observe is called, ``"grad"``, ``"no_grad"`` or ``"inference"``.
        seed: of the random generators before the run, and of the gradients of the outputs. The states of the generators are
            restored afterwards.
        backward: whether to run the backward too.
        names: of the inputs' tensors, one for each leaf of ``inputs``; ``"input 0"`` and so on by default.

    Returns:
        The observation. An exception that the program raises is part of it.

    Raises:
        ValueError: an unknown mode.
    """
    if grad_mode not in GRAD_MODES:
        raise ValueError(f"observe: {grad_mode!r} is none of {', '.join(GRAD_MODES)}")
    named = dict(leaves) if isinstance(leaves, Mapping) else {f"leaf {i}": leaf for i, leaf in enumerate(leaves)}
    with _mode("as it is" if not torch.is_inference_mode_enabled() else "grad"):
        arguments = _copied(inputs)
        before = {name: leaf.detach().clone() for name, leaf in named.items()}
    names_by_index = dict(enumerate(names))
    named_inputs = {
        names_by_index.get(i, f"input {i}"): argument
        for i, argument in enumerate(flattened(list(arguments))[0])
        if isinstance(argument, torch.Tensor)
    }
    watched = {**named_inputs, **named}
    # Before the run, which may change what requires grad.
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


def random_values(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Normal values in fp64, moved away from zero: a magnitude or scaling near zero would hide errors in what it multiplies."""
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    return values + 0.5 * values.sign()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype inside the context."""
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
                break  # later pairs are visited from the other tensor
            if other is output:
                same.add((other_name, name))
            if _overlap(output, other):
                aliases.add((other_name, name))
    observation.aliases, observation.same = frozenset(aliases), frozenset(same)


def _see_gradients(observation: Observation, returned: Any, trained: dict[str, torch.Tensor], seed: int) -> None:
    outputs, weights = [], []
    for i, leaf in enumerate(flattened(returned)[0]):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            # One generator each: the gradient of an output does not depend on the other outputs.
            generator = torch.Generator().manual_seed(1 + seed + 1000 * i)
            part: Any = leaf if placements(leaf) is None else leaf.to_local()  # type: ignore[attr-defined]
            outputs.append(part)
            weights.append(random_values(part.shape, generator).to(part.device, part.dtype))
    if not outputs or not trained:
        return
    with _mode("grad"):
        gradients = torch.autograd.grad(outputs, list(trained.values()), weights, allow_unused=True)
    observation.gradients = {name: None if g is None else _local(g.detach()) for name, g in zip(trained, gradients)}


def _seen(tensor: torch.Tensor) -> Seen:
    value = tensor.detach()
    dtensor_placements = placements(tensor)
    kind = "" if type(tensor) in (torch.Tensor, torch.nn.Parameter) else type(tensor).__name__
    if tensor.layout is not torch.strided:
        kind += f" {tensor.layout}"
    if dtensor_placements is not None:
        kind += f" {dtensor_placements}"
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
        differences: one sentence for each difference.
        error: largest difference of values, relative to the largest finite element of their tensor; inf if values cannot be
            compared.
    """

    differences: tuple[str, ...]
    error: float


def differences(
    expected: Observation, actual: Observation, tolerance: float = 1e-9, exact: Observation | None = None
) -> list[str]:
    """The differences that :func:`compare` finds."""
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
    """Compare the observation of a program with that of the original.

    Values: a finite number of the original must be equal within the tolerance; a NaN must not become a finite number; an infinity
    must stay the same or become NaN (the same expression in another order may give ``inf - inf``). A gradient of None differs from
    one of zeros. The gradient of a vector (a bias) may be finite where the original's is NaN if no output has a finite value in
    that column anyway: ``g·(y - b) + b`` with an infinite g.

    Args:
        expected: of the original.
        actual: of the replacement.
        tolerance: largest difference, relative to the largest finite element of the original's tensor.
        exact: of the original in fp64, for programs in lower precision. The error of the replacement may then be a small multiple
            of the original's, plus a unit in the last place of the result's dtype, as root mean squares.
        dtypes: of the original in its own dtypes, if both sides ran in fp64 except for the program's casts. Differences of a few units
            in the last place of these dtypes are ignored.
        nan_gradients: whether a NaN gradient must stay NaN. With infinities among the inputs autograd may give ``inf - inf`` where
            the same expression in another order, ``g·(y - b) + g·b``, subtracts nothing; the outputs show the infinities anyway.
        noise: of the original in fp64, on inputs that were perturbed by a rounding error. What this changes depends on rounding (as the
            gradient of a saturated softmax does), so no order of summation preserves it.
    """
    if expected.raised or actual.raised:
        if expected.raised == actual.raised:
            return Comparison((), 0.0)
        outcomes = [f"{o.raised}: {o.message}" if o.raised else "no error" for o in (actual, expected)]
        return Comparison((f"{outcomes[0]} where the original raises {outcomes[1]}",), math.inf)
    comparer = _Comparer(tolerance, exact, dtypes, nan_gradients, noise)
    comparer.lost_columns = _lost_columns(expected, actual)
    if expected.structure != actual.structure:
        comparer.report(f"the outputs' structure is {actual.structure}, not {expected.structure}")
    for group in ("outputs", "inputs"):
        references, values = getattr(expected, group), getattr(actual, group)
        for name in references:
            if name in values:
                label = name if group == "outputs" else f"{name} after the run"
                comparer.compare_any(label, references[name], values[name], group)
    for pair in sorted(actual.aliases - expected.aliases):
        comparer.report(f"{pair[1]} shares memory with {pair[0]}")
    for pair in sorted(expected.aliases - actual.aliases):
        comparer.report(f"{pair[1]} no longer shares memory with {pair[0]}")
    for pair in sorted(actual.same ^ expected.same):
        if (pair in actual.aliases) == (pair in expected.aliases):
            comparer.report(f"{pair[1]} is {'' if pair in actual.same else 'no longer '}the same object as {pair[0]}")
    for name, state in expected.generators.items():
        if name in actual.generators and not torch.equal(state, actual.generators[name]):
            comparer.report(f"other random numbers were drawn on {name}")
    for name in dict.fromkeys((*expected.gradients, *actual.gradients)):
        comparer.compare_gradients(name, expected.gradients.get(name), actual.gradients.get(name))
    return Comparison(tuple(dict.fromkeys(comparer.sentences)), comparer.error)


def _lost_columns(expected: Observation, actual: Observation) -> dict[int, torch.Tensor]:
    """For each size of the last axis of outputs, the columns in which no output is finite, either with or without the rewrite."""
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
        self.lost_columns: dict[int, torch.Tensor] = {}
        self.sentences: list[str] = []
        self.error = 0.0

    def report(self, sentence: str) -> None:
        self.sentences.append(sentence)
        self.error = math.inf

    def _report_element(self, name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
        self.report(f"{name} is {actual.item():.3g} where the original gives {expected.item():.3g}")

    def compare_any(self, name: str, expected: Any, actual: Any, group: str) -> None:
        if not isinstance(expected, Seen) or not isinstance(actual, Seen):
            if type(expected) is not type(actual):
                self.report(f"{name} is a {type(actual).__name__}, not a {type(expected).__name__}")
            elif isinstance(expected, float) and isinstance(actual, float):
                self._compare_values(name, torch.tensor(expected), torch.tensor(actual))
            elif not _is_same(expected, actual):
                self.report(f"{name} is {actual!r}, not {expected!r}")
            return
        for what in ("kind", "shape", "dtype", "device", "strides", "requires_grad"):
            reference, value = getattr(expected, what), getattr(actual, what)
            if reference != value:
                self.report(
                    f"{name} has {what} {value or 'of a plain tensor'}, not {reference or 'of a plain tensor'}"
                    if what == "kind"
                    else f"{name} has {what} {value}, not {reference}"
                )
        if expected.shape != actual.shape:
            return
        exact, native, perturbed = (
            getattr(run, group).get(name.removesuffix(" after the run")) if run is not None else None
            for run in (self.exact, self.dtypes, self.noise)
        )
        self._compare_values(
            name,
            expected.value,
            actual.value,
            exact.value if isinstance(exact, Seen) else None,
            native.dtype if isinstance(native, Seen) else None,
            perturbed.value if isinstance(perturbed, Seen) else None,
        )

    def compare_gradients(self, name: str, expected: torch.Tensor | None, actual: torch.Tensor | None) -> None:
        if expected is None or actual is None:
            if expected is not None:
                self.report(f"{name} receives no gradient, where the original gives {_text(expected)}")
            elif actual is not None:
                self.report(f"{name} receives a gradient, {_text(actual)}, where the original gives none")
            return
        for what in ("shape", "dtype"):
            if getattr(expected, what) != getattr(actual, what):
                self.report(f"the gradient of {name} has {what} {getattr(actual, what)}, not {getattr(expected, what)}")
        if expected.shape == actual.shape:
            exact, native, perturbed = (
                run.gradients.get(name) if run is not None else None for run in (self.exact, self.dtypes, self.noise)
            )
            dtype = native.dtype if native is not None else None
            self._compare_values(f"the gradient of {name}", expected, actual, exact, dtype, perturbed)

    def _compare_values(
        self,
        name: str,
        expected: torch.Tensor,
        actual: torch.Tensor,
        exact: torch.Tensor | None = None,
        rounded_to: torch.dtype | None = None,
        perturbed: torch.Tensor | None = None,
    ) -> None:
        if expected.layout is not torch.strided:
            expected, actual = expected.to_dense(), actual.to_dense()
        if not expected.numel():
            return
        if not (expected.is_floating_point() or expected.is_complex()):
            if not torch.equal(expected, actual.to(expected.dtype)):
                self.report(f"{name} differs in {int((expected != actual).sum())} of {expected.numel()} elements")
            return
        wide = torch.complex128 if expected.is_complex() else torch.float64
        dtype = expected.dtype
        expected, actual = expected.to(wide), actual.to(wide)
        finite = torch.isfinite(expected)
        if dtype is torch.float64:
            exact = None
        if exact is not None:
            exact = exact.to(wide)  # torch does not say of float8 which values are finite
            # What is finite in fp64 may have overflowed in the original.
            finite &= torch.isfinite(exact)
        non_finite = finite & ~torch.isfinite(actual)
        if non_finite.any():
            self._report_element(name, actual[non_finite][0], expected[non_finite][0])
            return
        no_longer_nan = torch.isnan(expected) & torch.isfinite(actual)
        if (
            name.startswith("the gradient")
            and expected.numel() in self.lost_columns
            and expected.numel() == max(expected.shape, default=0)
        ):
            no_longer_nan &= ~self.lost_columns[expected.numel()].view(expected.shape)
        if no_longer_nan.any() and (self.nan_gradients or not name.startswith("the gradient")):
            self.report(f"{name} is {actual[no_longer_nan][0].item():.3g} where the original gives nan")
            return
        unequal = torch.isinf(expected) & ~torch.isnan(actual) & (actual != expected)
        if unequal.any():
            self._report_element(name, actual[unequal][0], expected[unequal][0])
            return
        if not finite.any():
            return
        expected, actual = expected[finite], actual[finite]
        if exact is not None:
            reference = exact[finite]
            original_error = distance(expected, reference) + torch.finfo(dtype).eps
            if perturbed is not None and perturbed.shape == finite.shape:
                original_error = max(original_error, distance(perturbed.to(wide)[finite], reference) * _coarser(dtype))
            rms_error, error = distance(actual, reference), _largest_distance(actual, reference)
            if rms_error > max(self.tolerance, ERROR_FACTOR * original_error):
                self.sentences.append(
                    f"{name} is {rms_error:.1e} off in the root mean square, more than {ERROR_FACTOR} times the original's {original_error:.1e}"
                )
        else:
            allowed, error = self.tolerance, _largest_distance(actual, expected)
            if rounded_to is not None and rounded_to.is_floating_point and rounded_to is not torch.float64:
                allowed = max(allowed, _ROUNDINGS * torch.finfo(rounded_to).eps)
            if perturbed is not None and perturbed.shape == finite.shape:
                allowed = max(allowed, _NOISE * _largest_distance(perturbed.to(wide)[finite], expected))
            if not error <= allowed:
                self.sentences.append(f"{name} differs by {error:.1e} of its largest element")
        self.error = max(self.error, error)


def _coarser(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / torch.finfo(torch.float64).eps


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm of ``other``; 0 if it is NaN."""
    return _number_of((one - other).norm() / other.norm().clamp_min(1e-300))


def _largest_distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of an element, relative to the largest element of ``other``; 0 if it is NaN."""
    return _number_of((one - other).abs().max() / other.abs().max().clamp_min(1e-300))


def _number_of(distance: torch.Tensor) -> float:
    # The compared values are all finite, those of the perturbed run may not be.
    return 0.0 if torch.isnan(distance) else distance.item()


def _is_same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # a class whose equality is not a bool
        return repr(one) == repr(other)


def _text(gradient: torch.Tensor) -> str:
    return "zeros" if not gradient.any() else "numbers"
