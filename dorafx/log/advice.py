"""What to do about a miss: one piece of advice for each kind of reason, all of them here."""

from __future__ import annotations

import re

__all__ = ["UNKNOWN", "advice_for", "is_known"]

UNKNOWN = "Report it with the reason, the source line and the output of `dorafx doctor`."

_OWN_PATTERN = (
    "if it is DoRA spelled in a way that should be known, report it; if it is a computation of your own, write a pattern "
    "(README, examples/custom_pattern.py)."
)

# The first that is found in a reason is its kind.
_KINDS: tuple[tuple[str, str], ...] = (
    (r"^internal failure", f"A defect of dorafx; the graph ran as it was. {UNKNOWN}"),
    (r"^verification: ", f"The rewrite was refused, so results are the original's. {UNKNOWN}"),
    (
        r"^not verified",
        "The region could not be run on random data, so it was left alone; without the option dorafx.verify it is rewritten.",
    ),
    (
        r"^the program is transformed",
        "Nothing is wrong. For a rewrite, write the batch or the derivative without the transform. To transform the compiled "
        "function from outside is right too and not faster: Dynamo then runs the original code.",
    ),
    (r"merged weight is cheaper", "Nothing: with so many tokens the merged weight costs less than taking it apart."),
    (
        r"nothing else to do",
        "Nothing: the norm was the expensive part, and the rest of the layer is as cheap as it can be.",
    ),
    (r"no activation is scaled by it", "Nothing, if the norm itself is what you want; else " + _OWN_PATTERN),
    (
        r"norm itself is an output of the program",
        "Nothing, if the norm is what you want. If a graph break separates it from the layer, mend the break: the layer is in "
        "another graph.",
    ),
    (
        r"stands between the low-rank product and the norm",
        "The delta inside the norm is no low-rank product then. Move the operator to the output or drop it, if it is not "
        "meant; no factored norm can serve it otherwise.",
    ),
    (
        r"stands between the norm and what it scales|is not known as a norm",
        "Use an operator that is known (linalg.norm, vector_norm, a root of a sum of squares; products and quotients of "
        "vectors); " + _OWN_PATTERN,
    ),
    (
        r"multiplied by zero, or cancels out",
        "Leave the term out of the program where nobody needs its gradient (of zeros); where it keeps a parameter in use for "
        "DistributedDataParallel, add it to the layer's output, not inside.",
    ),
    (
        r"is rounded",
        "Cast the factors, the weight or the result, not the product in between: a rewrite would leave that rounding out.",
    ),
    (
        r"its replacement failed|is not known as a vector|is one row repeated|a factor of the delta",
        f"This site was left as it was, the rest of the graph was not. {UNKNOWN}",
    ),
    (
        r"the original's result has the strides",
        "Make the layer's result contiguous, or do not expand it: no result of a rewrite lies in memory like that.",
    ),
    (
        r"written in place",
        "Write the operation out of place (`w = w + delta` instead of `w += delta`) where others can see the tensor.",
    ),
    (
        r"is another for each token|makes the delta, and is not known",
        "No factored norm serves such a delta, and the layer runs as it was. If it is a product of low-rank factors after all, "
        "form it by matrix products of them.",
    ),
    (
        r"multiplies factors of different dtypes",
        "torch refuses such a product: cast the factors to one dtype.",
    ),
    (
        r"reads the sum of squares of the adapted weight",
        "A reduction over devices of one's own cannot be followed: shard the weight as a DTensor, whose reductions are known.",
    ),
    (
        r"DeepSpeed ZeRO-3|the original's result is",
        "Nothing is wrong, and the layer runs as it was: see examples/distributed.md for ways of sharding that are rewritten.",
    ),
    (
        r"is of order|is of the whole weight|is over dimensions",
        "Not DoRA as published: its norm is the 2-norm of each row (or column). Check `ord` and `dim`.",
    ),
    (
        r"symbolic",
        "Compile with `dynamic=False`, or mark the parameters' sizes static: the factors' shapes must be numbers.",
    ),
    (
        r"the norm is of a sum with",
        "Merge the frozen parts into one weight before the norm, or keep the low-rank parts separate from them.",
    ),
    (
        r"scaled or diagonal part|itself scaled by a vector",
        "Scale the weight once, outside of forward, instead of inside the norm.",
    ),
    (
        r"no product with the norm's weight|product with the weight is not scaled|is no convolution",
        "The output must contain `x @ W.T` of the same weight as the norm, scaled by m / norm; the norm itself is factored "
        "either way. Else " + _OWN_PATTERN,
    ),
    (
        r"not scaled by the same vector|not scaled as the weight's|not scaled by g while|is added to the delta form|"
        r"the delta form lacks|no low-rank product is added",
        "DoRA scales base and low-rank product by one vector; the norm itself is factored either way. If the difference is "
        "meant, nothing can be done; else correct the layer.",
    ),
    (
        r"no index|another layer's|no value of the graph|carries no shape|is computed after|a scaling is a constant|"
        r"with a convolution's input|two convolutions that are added|used without its root|stands alone in the product|nothing but biases|has one column|no node computes this norm",
        "A spelling that dorafx recognises and cannot emit: " + _OWN_PATTERN,
    ),
)
_COMPILED = tuple((re.compile(kind), advice) for kind, advice in _KINDS)


def is_known(reason: str) -> bool:
    """Whether a reason is of a kind that has advice of its own."""
    return any(kind.search(_bare(reason)) for kind, _ in _COMPILED)


def advice_for(reason: str) -> str:
    """What to do about a record's reason; empty where there is no reason."""
    if not reason:
        return ""
    text = next((advice for kind, advice in _COMPILED if kind.search(_bare(reason))), UNKNOWN)
    return text[0].upper() + text[1:]


def _bare(reason: str) -> str:
    return reason.removeprefix("only the norm is rewritten: ")
