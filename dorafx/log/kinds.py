"""The kinds of reasons: for each a name for programs, a sentence, and advice."""

from __future__ import annotations

from enum import Enum

_REPORT = "Report it with the output of `dorafx doctor` and the script of `rewrite_log().save_repro(record, path)`."
_OWN_PATTERN = (
    "if it is DoRA spelled in a way that should be known, report it; if it is a computation of your own, write a pattern "
    "(README, examples/custom_pattern.py)."
)
_NO_FACTORED_NORM = (
    "No factored norm serves such a delta, and the layer runs as it was. If it is a product of low-rank factors after all, form "
    "it by matrix products of them."
)
_SCALED_BY_ONE = (
    "DoRA scales base and low-rank product by one vector; the norm itself is factored either way. If the difference is meant, "
    "nothing can be done; else correct the layer."
)
_NOTHING_IS_WRONG = "Nothing is wrong, and the layer runs as it was: see examples/guide/distributed.md for ways of sharding that are rewritten."


class ReasonKind(Enum):
    """The kind of a reason why something was left alone. Its value is what a log has (``Record.kind``), and stays what it is; all
    kinds are listed in ``examples/guide/reasons.md``.

    Attributes:
        sentence: what a reason of this kind says.
        advice: what to do about it.
    """

    _value_: str
    sentence: str
    advice: str

    def __new__(cls, value: str, sentence: str, advice: str) -> ReasonKind:
        member = object.__new__(cls)
        member._value_ = value
        member.sentence = sentence
        member.advice = advice
        return member

    # The norm
    OTHER_NORM = (
        "other-norm",
        "The norm is of another order, of the whole weight, or over other dimensions.",
        "Not DoRA as published: its norm is the 2-norm of each row (or column). Check `ord` and `dim`.",
    )
    UNKNOWN_NORM = (
        "unknown-norm",
        "An operator that is not known as a norm makes a vector of the adapted weight, or normalises it.",
        "Use an operator that is known (linalg.norm, vector_norm, a root of a sum of squares); " + _OWN_PATTERN,
    )
    SQUARES_READ = (
        "squares-read",
        "The sum of squares of the adapted weight is read before its root is taken.",
        "A hand-written reduction over devices cannot be followed: shard the weight as a DTensor, whose reductions are known.",
    )
    SCALED_WEIGHT = (
        "scaled-weight",
        "The weight inside the norm is scaled by a vector, or a diagonal is added to it.",
        "Scale the weight once, outside of forward, instead of inside the norm.",
    )
    OTHER_SUMMANDS = (
        "other-summands",
        "The norm is of a sum with no dense weight, or with several, beside the low-rank product.",
        "Merge the frozen parts into one weight before the norm, or keep the low-rank parts separate from them.",
    )
    BATCHED_WEIGHTS = (
        "batched-weights",
        "The weight is a batch of matrices, one for each expert, and this part of the layer is not known for such weights.",
        "Give `W`, `A`, `B` and `m` the axis of the experts first, with as many entries in each; the norm is along the last axis.",
    )
    SYMBOLIC_SHAPE = (
        "symbolic-shape",
        "The weight or a factor has a symbolic shape, or is no matrix.",
        "Compile with `dynamic=False`, or mark the parameters' sizes static: the factors' shapes must be numbers.",
    )
    NORM_IN_OPERATOR = (
        "norm-in-operator",
        "The norm is computed inside of an operator that does more (`F.normalize`), and the layer that reads it was left alone.",
        "Look at the reason that the log gives for the layer's other norm: by itself this one cannot be replaced.",
    )

    # The delta inside of it
    HIDDEN_DELTA = (
        "hidden-delta",
        "An operator stands between the low-rank product and the norm.",
        "The delta inside the norm is no low-rank product then. Move the operator to the output or drop it, if it is not "
        "meant; no factored norm can serve it otherwise.",
    )
    GROUPED_CONVOLUTION = (
        "grouped-convolution",
        "A convolution with groups: by row its delta is a product of a rank so large that the dense one is cheaper, or its merged weight is "
        "multiplied group by group.",
        "Nothing where the norm is left alone: a factored one would cost more. Where the norm is rewritten, convolve with the weight and "
        "with the low-rank factors apart, and scale their sum.",
    )
    ROUNDED_PRODUCT = (
        "rounded-product",
        "The low-rank product is rounded and then read with more digits.",
        "Cast the factors, the weight or the result, not the product in between: a rewrite would leave that rounding out.",
    )
    UNKNOWN_DELTA = (
        "unknown-delta",
        "The delta is made by an operator that is not known as a product of low-rank factors.",
        _NO_FACTORED_NORM,
    )
    DELTA_PER_TOKEN = (
        "delta-per-token",
        "The delta is another for each token.",
        _NO_FACTORED_NORM,
    )
    MIXED_DTYPES = (
        "mixed-dtypes",
        "The delta is a product of factors of different dtypes.",
        "torch refuses such a product: cast the factors to one dtype.",
    )
    VANISHING_TERM = (
        "vanishing-term",
        "A term is multiplied by zero, or cancels out; without it its gradient (of zeros) and its NaN would be lost.",
        "Leave the term out of the program where nobody needs its gradient (of zeros); where it keeps a parameter in use for "
        "DistributedDataParallel, add it to the layer's output, not inside.",
    )

    # What the norm scales
    SCALES_NOTHING = (
        "scales-nothing",
        "No activation is scaled by the norm.",
        "Nothing, if the norm itself is what you want; else " + _OWN_PATTERN,
    )
    NORM_IS_OUTPUT = (
        "norm-is-output",
        "The norm is an output of the program, and scales nothing in it.",
        "Nothing, if the norm is what you want. If a graph break separates it from the layer, mend the break: the layer is in "
        "another graph.",
    )
    UNKNOWN_CONSUMER = (
        "unknown-consumer",
        "An operator that is not known stands between the norm and what it scales.",
        "Use an operator that is known (products and quotients of vectors); " + _OWN_PATTERN,
    )
    NO_PRODUCT = (
        "no-product",
        "What the norm scales holds no product with the norm's weight, or one that the norm does not scale.",
        "The output must contain `x @ W.T` of the same weight as the norm, scaled by m / norm; the norm itself is factored "
        "either way. Else " + _OWN_PATTERN,
    )
    UNEQUAL_SCALING = (
        "unequal-scaling",
        "A part of the output is not scaled by the same vector as the base product.",
        _SCALED_BY_ONE,
    )
    OTHER_PARTS = (
        "other-parts",
        "The output lacks a part of the form (a low-rank product, the base product), or has one more.",
        _SCALED_BY_ONE,
    )
    FORM = (
        "form",
        "It differs from the form that a pattern describes. Reasons of patterns of your own are of this kind unless they say another.",
        "If it is DoRA spelled in a way that should be known, report it; if it is a computation of your own, write a pattern "
        "(README, examples/custom_pattern.py).",
    )
    NOTHING_ELSE = (
        "nothing-else",
        "Beside the norm there is nothing to rewrite.",
        "Nothing: the norm was the expensive part, and the rest of the layer is as cheap as it can be.",
    )
    MERGED_CHEAPER = (
        "merged-cheaper",
        "The merged weight costs less than taking it apart.",
        "Nothing: with so many tokens the merged weight costs less than taking it apart.",
    )

    MERGED_ROUNDS_ONCE = (
        "merged-rounds-once",
        "The merged weight is made in a wider dtype than the product has, and rounded once; its parts would each be rounded.",
        "Nothing is wrong: taken apart, results would be less accurate than the program's own. To have the layer rewritten whole, write "
        "it as `g * (linear(x, W) + s * linear(linear(x, A), B))`, or keep the weight in the dtype of the product.",
    )

    # The program around it
    WRITTEN_IN_PLACE = (
        "written-in-place",
        "A tensor that the rewrite would read is written in place.",
        "Write the operation out of place (`w = w + delta` instead of `w += delta`) where others can see the tensor.",
    )
    INFERENCE_TENSOR = (
        "inference-tensor",
        "A tensor that the gradient of the norm needs was made in inference mode.",
        "Load or make the weight under torch.no_grad(), or outside of inference mode; the backward of the factored norm reads it.",
    )
    VIEW_WITHOUT_GRADIENT = (
        "view-without-gradient",
        "A value requires a gradient only through a view that was made where no gradients are recorded.",
        "Make the view (a transpose, a slice) where the layer is computed, under the same grad mode, or detach it: no gradient "
        "reaches the parameter through it.",
    )
    STRIDES = (
        "strides",
        "The original's result has strides that the result of a rewrite cannot have.",
        "Make the layer's result contiguous, or do not expand it: a rewrite cannot give its result such strides.",
    )
    PLACEMENTS = (
        "placements",
        "The original's result is a DTensor with placements that the result of a rewrite cannot be redistributed to.",
        _NOTHING_IS_WRONG,
    )
    ZERO3 = (
        "zero3",
        "DeepSpeed ZeRO-3 partitions the parameters.",
        _NOTHING_IS_WRONG,
    )
    TRANSFORMED = (
        "transformed",
        "The program is under a transform of torch.func or torch.autograd.forward_ad.",
        "Nothing is wrong. For a rewrite, write the batch or the derivative without the transform. To transform the compiled "
        "function from outside is right too and not faster: Dynamo then runs the original code.",
    )
    UNKNOWN_SHAPES = (
        "unknown-shapes",
        "The shapes of a graph that carries none cannot be found without running it.",
        "Capture the program with Dynamo or torch.export, or write it without the value of a tensor.",
    )

    TENSOR_SUBCLASS = (
        "tensor-subclass",
        "The weight or a factor is of a tensor subclass that does not know dorafx's operators.",
        "Make a plain tensor of it in the layer, once for the product and once for the norm or once for both: `weight.to(x.dtype)`, or what "
        "dequantises it. Or have the subclass dispatch operators that it does not know to its plain value.",
    )

    # No graph
    RECOMPILE_LIMIT = (
        "recompile-limit",
        "Dynamo compiled a function for as many kinds of inputs as it may, and runs it as it is written from then on.",
        'Raise torch._dynamo.config.recompile_limit, or pass `dynamic=True`; TORCH_LOGS="recompiles" says what differs between the calls.',
    )
    COMPILER_DISABLED = (
        "compiler-disabled",
        "The layer is called by a function that `torch.compiler.disable` keeps out of compiled code.",
        'Disable less: only the part that cannot be compiled. Or `dorafx.optimize(model)`, whose scopes "blocks" and "modules" compile '
        "what is called by such a function.",
    )
    NOT_TRACED = (
        "not-traced",
        "Dynamo did not trace the layer's forward, and so made no graph of it.",
        "With FSDP1 use `use_orig_params=True`, or FSDP2 (`fully_shard`). Else `dorafx.explain` shows what breaks the graph.",
    )
    STANCE = (
        "stance",
        "torch is told to run compiled functions as they are written (`torch.compiler.set_stance`, `torch._dynamo.config.disable`).",
        'Nothing, if it is meant: the layers are rewritten again under the stance "default".',
    )
    ADDED_LATER = (
        "added-later",
        "The layer was added to the model after `dorafx.optimize`.",
        "Nothing: it is compiled from its next call on. To have the blocks that contain it compiled too, call `dorafx.restore(model)` and "
        "`dorafx.optimize(model)` after adding adapters.",
    )
    NOT_COMPILED = (
        "not-compiled",
        "The layer was called past the function that is compiled.",
        "Call what `torch.compile` returned. Methods of a compiled model, such as `generate`, call the model as it was: use "
        "`dorafx.optimize(model)`, which compiles the model in place.",
    )

    # The user
    SKIPPED = (
        "skipped",
        "The options `dorafx.skip` or `dorafx.only` leave the module alone.",
        "Nothing is wrong, and the layer runs as it was, which `dorafx.strict` accepts. To have it rewritten, change the option.",
    )

    # dorafx itself
    NOT_EMITTED = (
        "not-emitted",
        "What was recognised is spelled in a way that has no replacement.",
        "A spelling that dorafx recognises and cannot emit: " + _OWN_PATTERN,
    )
    REPLACEMENT_FAILED = (
        "replacement-failed",
        "The replacement of one site failed unexpectedly.",
        f"This site was left as it was, the rest of the graph was not. {_REPORT}",
    )
    OPERATOR_FAILED = (
        "operator-failed",
        "dorafx failed in an operator of the layer, and so could not follow it.",
        "A defect of dorafx, and the layer runs as it was. To have it rewritten now, write this line with another operator. "
        + _REPORT,
    )
    FORM_FAILED = (
        "form-failed",
        "A form raised an error while it looked at a layer.",
        f"The other forms were asked as if it were not there. If the pattern is your own, mend its `check`. If it is dorafx's: {_REPORT}",
    )
    VERIFICATION = (
        "verification",
        "With the option `dorafx.verify`: the rewrite gave another result than the original.",
        f"The rewrite was refused, so results are the original's. {_REPORT}",
    )
    NOT_VERIFIED = (
        "not-verified",
        "With the option `dorafx.verify`: it could not be run on random data.",
        "It could not be run on random data, so it was left as it was; without the option dorafx.verify it is rewritten.",
    )
    CODEGEN_FAILED = (
        "codegen-failed",
        "What compiles the rewritten graph failed on it.",
        f"The original graph was compiled instead, so nothing of it was rewritten. Another `dorafx.codegen` may take it. {_REPORT}",
    )
    INTERNAL_FAILURE = (
        "internal-failure",
        "dorafx failed, and the graph was left as it was.",
        f"A defect of dorafx; the graph ran as it was. {_REPORT}",
    )

    @classmethod
    def named(cls, value: str) -> ReasonKind | None:
        """The kind of this value; None for an empty value (as in logs of earlier versions) and for one that this version does not have."""
        return next((kind for kind in cls if kind.value == value), None)
