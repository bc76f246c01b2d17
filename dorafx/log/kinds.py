"""The kinds of reasons: for each a name for programs, a sentence, and advice."""

from __future__ import annotations

from enum import Enum

_REPORT = "Report it with the output of `dorafx doctor` and the script of `rewrite_log().save_repro(record, path)`."
_OWN_PATTERN = (
    "if it is DoRA in a spelling that dorafx should recognise, report it; for a computation of your own, write a pattern "
    "(examples/guide/internals-extending.md)."
)
_NO_FACTORED_NORM = (
    "No factored norm exists for such a delta, and the layer runs unchanged. If it is a product of low-rank factors after all, "
    "write it with matrix products."
)
_SCALED_BY_ONE = (
    "DoRA scales base and low-rank product by one vector. The norm is factored in any case. If the difference is intended, nothing "
    "can be done; otherwise correct the layer."
)
_NOTHING_IS_WRONG = "Nothing is wrong, and the layer runs unchanged: examples/guide/distributed.md has the ways of sharding that are rewritten."


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
        "This is not DoRA as published, whose norm is the 2-norm of each row (or column). Check `ord` and `dim`.",
    )
    UNKNOWN_NORM = (
        "unknown-norm",
        "An operator that dorafx does not know as a norm reduces the adapted weight to a vector, or normalises it.",
        "Use a known operator (linalg.norm, vector_norm, the root of a sum of squares); " + _OWN_PATTERN,
    )
    SQUARES_READ = (
        "squares-read",
        "The sum of squares of the adapted weight is read before its root is taken.",
        "dorafx cannot follow a hand-written reduction over devices: shard the weight as a DTensor, whose reductions it knows.",
    )
    SCALED_WEIGHT = (
        "scaled-weight",
        "The weight inside the norm is scaled by a vector, or a diagonal is added to it.",
        "Scale the weight once, outside of forward, and not inside the norm.",
    )
    OTHER_SUMMANDS = (
        "other-summands",
        "The norm is of a sum that has no dense weight beside the low-rank product, or more than one.",
        "Merge the frozen parts into one weight before the norm, or keep them apart from the low-rank parts.",
    )
    BATCHED_WEIGHTS = (
        "batched-weights",
        "The weight is a batch of matrices, one for each expert, and dorafx does not rewrite this part of the layer for such weights.",
        "Give `W`, `A`, `B` and `m` the axis of the experts first, with as many entries in each; the norm is along the last axis.",
    )
    SYMBOLIC_SHAPE = (
        "symbolic-shape",
        "The weight or a factor has a symbolic shape, or is not a matrix.",
        "Compile with `dynamic=False`, or mark the sizes of parameters as static: the factors' shapes must be numbers.",
    )
    NORM_IN_OPERATOR = (
        "norm-in-operator",
        "The norm is computed inside of a larger operator (`F.normalize`), and the layer that uses it was left alone.",
        "See the log's reason for the layer's other norm: this one cannot be replaced on its own.",
    )

    # The delta inside of it
    HIDDEN_DELTA = (
        "hidden-delta",
        "An operator stands between the low-rank product and the norm.",
        "The delta inside the norm is no low-rank product, so no factored norm exists for it. Move the operator to the output, or "
        "remove it if it is not intended.",
    )
    GROUPED_CONVOLUTION = (
        "grouped-convolution",
        "A convolution with groups: by row the rank of its delta is so large that the dense product is cheaper, or its merged weight is "
        "applied group by group.",
        "If the norm is left alone, nothing: a factored one would cost more. If the norm is rewritten and the rest is not, convolve with the "
        "weight and with the low-rank factors separately, and scale the sum.",
    )
    ROUNDED_PRODUCT = (
        "rounded-product",
        "The low-rank product is rounded to a narrower dtype and then used in a wider one.",
        "Cast the factors, the weight or the result, and not the product in between: a rewrite would skip that rounding.",
    )
    UNKNOWN_DELTA = (
        "unknown-delta",
        "The delta comes from an operator that dorafx does not know as a product of low-rank factors.",
        _NO_FACTORED_NORM,
    )
    DELTA_PER_TOKEN = (
        "delta-per-token",
        "The delta differs from token to token.",
        _NO_FACTORED_NORM,
    )
    MIXED_DTYPES = (
        "mixed-dtypes",
        "The delta is a product of factors of different dtypes.",
        "torch refuses such a product: cast the factors to one dtype.",
    )
    VANISHING_TERM = (
        "vanishing-term",
        "A term is multiplied by zero, or cancels out. A rewrite without it would lose its gradient (of zeros) and its NaN.",
        "Remove the term if nothing needs its gradient of zeros. If it keeps a parameter in use for DistributedDataParallel, add it to "
        "the layer's output.",
    )

    # What the norm scales
    SCALES_NOTHING = (
        "scales-nothing",
        "No activation is scaled by the norm.",
        "Nothing, if you want the norm itself. Otherwise, " + _OWN_PATTERN,
    )
    NORM_IS_OUTPUT = (
        "norm-is-output",
        "The norm is an output of the graph, and scales nothing in it.",
        "Nothing, if you want the norm itself. If a graph break separates it from its layer, remove the break: the layer is in "
        "another graph.",
    )
    UNKNOWN_CONSUMER = (
        "unknown-consumer",
        "An operator that dorafx does not know stands between the norm and what it scales.",
        "Use known operators (products and quotients of vectors); " + _OWN_PATTERN,
    )
    NO_PRODUCT = (
        "no-product",
        "What the norm scales has no product with the norm's weight, or the norm does not scale that product.",
        "The output must contain `x @ W.T` with the norm's weight, scaled by m / norm. The norm is factored in any case. "
        "Otherwise, " + _OWN_PATTERN,
    )
    UNEQUAL_SCALING = (
        "unequal-scaling",
        "A part of the output is not scaled by the same vector as the base product.",
        _SCALED_BY_ONE,
    )
    OTHER_PARTS = (
        "other-parts",
        "The output lacks a part of the form (the base product, a low-rank product), or has an additional one.",
        _SCALED_BY_ONE,
    )
    FORM = (
        "form",
        "The layer differs from the form that a pattern describes. Reasons of your own patterns have this kind by default.",
        _OWN_PATTERN[0].upper() + _OWN_PATTERN[1:],
    )
    NOTHING_ELSE = (
        "nothing-else",
        "There is nothing to rewrite beside the norm.",
        "Nothing: the norm was the expensive part, and the rest of the layer is as cheap as it can be.",
    )
    MERGED_CHEAPER = (
        "merged-cheaper",
        "The merged weight costs less than taking it apart.",
        "Nothing: for this number of tokens the merged weight is the cheaper way.",
    )

    MERGED_ROUNDS_ONCE = (
        "merged-rounds-once",
        "The merged weight is formed in a wider dtype than the product and rounded once; separate parts would each be rounded.",
        "Nothing is wrong: separate parts would be less accurate than the program. To have the complete layer rewritten, write it as "
        "`g * (linear(x, W) + s * linear(linear(x, A), B))`, or keep the weight in the dtype of the product.",
    )

    # The program around it
    WRITTEN_IN_PLACE = (
        "written-in-place",
        "A tensor that the rewrite would read is written in place.",
        "Write the operation out of place (`w = w + delta` instead of `w += delta`) where others can see the tensor.",
    )
    INFERENCE_TENSOR = (
        "inference-tensor",
        "A tensor that the norm's gradient needs was created in inference mode.",
        "Load or create the weight outside of inference mode (torch.no_grad() is fine): the norm's backward reads it.",
    )
    VIEW_WITHOUT_GRADIENT = (
        "view-without-gradient",
        "A value requires a gradient only through a view that was created where gradients are not recorded.",
        "Create the view (a transpose, a slice) in the layer, under the same grad mode, or detach it: no gradient reaches the "
        "parameter through it.",
    )
    STRIDES = (
        "strides",
        "The layer's result has strides that a rewrite cannot give it.",
        "Make the result contiguous, or do not expand it.",
    )
    PLACEMENTS = (
        "placements",
        "The layer's result is a DTensor with placements to which a rewrite cannot redistribute it.",
        _NOTHING_IS_WRONG,
    )
    ZERO3 = (
        "zero3",
        "DeepSpeed ZeRO-3 partitions the parameters.",
        _NOTHING_IS_WRONG,
    )
    TRANSFORMED = (
        "transformed",
        "The program is inside a transform of torch.func or torch.autograd.forward_ad.",
        "Nothing is wrong. For a rewrite, write the batch or the derivative without the transform. Transforming the compiled function "
        "from outside is right, too, but not faster: Dynamo then runs the original code.",
    )
    UNKNOWN_SHAPES = (
        "unknown-shapes",
        "The graph has no shapes, and they cannot be derived without running it.",
        "Capture the program with Dynamo or torch.export, or remove what depends on the value of a tensor.",
    )

    TENSOR_SUBCLASS = (
        "tensor-subclass",
        "The weight or a factor is of a tensor subclass that does not know dorafx's operators.",
        "Convert it to a plain tensor in the layer (`weight.to(x.dtype)`, or its dequantisation), or let the subclass dispatch unknown "
        "operators to its plain value.",
    )

    # No graph
    RECOMPILE_LIMIT = (
        "recompile-limit",
        "Dynamo has compiled a function for as many kinds of inputs as it may, and runs further kinds uncompiled.",
        'Raise torch._dynamo.config.recompile_limit, or pass `dynamic=True`; TORCH_LOGS="recompiles" says what differs between the calls.',
    )
    COMPILER_DISABLED = (
        "compiler-disabled",
        "A function that `torch.compiler.disable` excludes from compilation calls the layer.",
        'Disable only the part that cannot be compiled. Or use `dorafx.optimize(model)`, whose scopes "blocks" and "modules" compile '
        "what such a function calls.",
    )
    NOT_TRACED = (
        "not-traced",
        "Dynamo did not trace the layer's forward, so no graph contains it.",
        "With FSDP1 use `use_orig_params=True`, or FSDP2 (`fully_shard`). Otherwise `dorafx.explain` shows what breaks the graph.",
    )
    STANCE = (
        "stance",
        "Compilation is turned off (`torch.compiler.set_stance`, `torch._dynamo.config.disable`).",
        'Nothing, if it is intended: under the stance "default" the layers are rewritten again.',
    )
    ANOTHER_BACKEND = (
        "another-backend",
        "A `torch.compile` with another backend contains the optimized model, and goes past what `dorafx.optimize` has compiled.",
        "Leave that `torch.compile` out: the model is compiled already. Or compile all of it with dorafx: "
        '`torch.compile(step, backend="dorafx")`. `generate` with a static cache on a GPU is such a one: pass it '
        '`compile_config=CompileConfig(backend="dorafx")`.',
    )
    ADDED_LATER = (
        "added-later",
        "The layer was added to the model after `dorafx.optimize`.",
        "Nothing: it is compiled from its next call on. To have the blocks that contain it compiled too, call `dorafx.restore(model)` and "
        "`dorafx.optimize(model)` after adding adapters.",
    )
    NOT_COMPILED = (
        "not-compiled",
        "The layer was called directly, and not through the compiled function.",
        "Call what `torch.compile` returned. Methods such as `generate` call the original model: use "
        "`dorafx.optimize(model)`, which compiles the model in place.",
    )

    # The user
    SKIPPED = (
        "skipped",
        "The options `dorafx.skip` or `dorafx.only` leave the module alone.",
        "Nothing is wrong, and the layer runs unchanged; `dorafx.strict` accepts that. To have it rewritten, change the option.",
    )

    # dorafx itself
    NOT_EMITTED = (
        "not-emitted",
        "The layer was recognised, in a spelling for which there is no replacement.",
        _OWN_PATTERN[0].upper() + _OWN_PATTERN[1:],
    )
    REPLACEMENT_FAILED = (
        "replacement-failed",
        "Replacing one layer failed unexpectedly.",
        f"This layer runs unchanged; the rest of the graph is rewritten. {_REPORT}",
    )
    OPERATOR_FAILED = (
        "operator-failed",
        "dorafx failed in an operator of the layer.",
        "A defect of dorafx: the layer runs unchanged. To have it rewritten now, use another operator in this line. "
        + _REPORT,
    )
    FORM_FAILED = (
        "form-failed",
        "A form raised an error when it checked a layer.",
        f"The other forms were tried without it. If the pattern is your own, fix its `check`. If it is dorafx's: {_REPORT}",
    )
    VERIFICATION = (
        "verification",
        "With the option `dorafx.verify`: the rewrite and the original gave different results.",
        f"The original is used. {_REPORT}",
    )
    NOT_VERIFIED = (
        "not-verified",
        "With the option `dorafx.verify`: the layer could not be run on random data.",
        "The original is used. Without the option the layer is rewritten.",
    )
    CODEGEN_FAILED = (
        "codegen-failed",
        "Inductor, or another codegen, failed on the rewritten graph.",
        f"The original graph was compiled instead, so nothing in it is rewritten. Another `dorafx.codegen` may work. {_REPORT}",
    )
    INTERNAL_FAILURE = (
        "internal-failure",
        "dorafx failed, and the graph runs unchanged.",
        f"A defect of dorafx. {_REPORT}",
    )

    @classmethod
    def named(cls, value: str) -> ReasonKind | None:
        """The kind of this value; None for an empty value (as in logs of earlier versions) and for one that this version does not have."""
        return next((kind for kind in cls if kind.value == value), None)
