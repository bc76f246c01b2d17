"""Canonical forms and their decorator."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import fx

from dorafx.errors import DorafxError, in_a_line
from dorafx.log.kinds import ReasonKind

from .composition import Candidate, Match
from .emission import CompositionPlan, Emit
from .near_misses import Reason

_logger = logging.getLogger(__name__)  # TORCH_LOGS="+dorafx"


class Form(Protocol):
    """A canonical form: what a class under [`dorafx.pattern`][] has.

    A form may also have a ``statement``, a function that computes it in plain PyTorch, and an ``example`` that makes arguments of it
    by name: a near miss of the form is then shown beside it (``dorafx explain --terms``).

    Attributes:
        name: what the log calls it; the decorator sets it.
    """

    name: str

    def check(self, candidate: Candidate) -> Match | Reason:
        """A [`Match`][dorafx.extension.Match], or a [`Reason`][dorafx.extension.Reason] that says what differs."""
        ...

    def rewrite(self, match: Match, plan: CompositionPlan, emit: Emit) -> fx.Node:
        """The node that replaces a match, made by the emitter as the plan has it."""
        ...


_FORMS: dict[str, Form] = {}
T = TypeVar("T")


def pattern(*, name: str) -> Callable[[type[T]], type[T]]:
    """Register a class as a canonical form under ``name``.

    Args:
        name: what the log calls it.

    Returns:
        A decorator that returns the class as it is; [`dorafx.extension.Form`][] says what the class must have.

    Raises:
        DorafxError: the class has no ``check`` or ``rewrite``, or another class has the name already.

    Examples:
        >>> @dorafx.pattern(name="half_done")
        ... class HalfDone:
        ...     def check(self, candidate): ...
        Traceback (most recent call last):
        dorafx.errors.DorafxError: pattern 'half_done' (HalfDone) lacks rewrite
    """

    def register(cls: type[T]) -> type[T]:
        missing = [member for member in ("check", "rewrite") if not callable(getattr(cls, member, None))]
        if missing:
            raise DorafxError(f"pattern {name!r} ({cls.__qualname__}) lacks {' and '.join(missing)}")
        previous = _FORMS.get(name)
        if previous is not None and type(previous).__qualname__ != cls.__qualname__:
            raise DorafxError(f"a pattern named {name!r} is registered already: {type(previous).__qualname__}")
        form: Any = cls()
        form.name = name
        _FORMS[name] = form
        return cls

    return register


def forms() -> dict[str, Form]:
    """The registered forms by name, the built-in ones first."""
    import dorafx.patterns  # noqa: F401  (registers the built-in forms)

    return dict(_FORMS)


def check_form(form: Form, candidate: Candidate) -> Match | Reason:
    """What a form says; that it failed, where it does, which costs neither the other forms nor the other layers of the graph anything."""
    try:
        return form.check(candidate)
    except Exception as error:
        _logger.debug("%s failed at %s", form.name, candidate.node.format_node(), exc_info=error)
        message, _ = in_a_line(error)
        what = f"the form {form.name!r} failed in its check ({message})"
        return Reason(what, candidate.node, kind=ReasonKind.FORM_FAILED)
