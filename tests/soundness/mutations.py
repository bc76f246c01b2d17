"""Faults to plant in a copy of dorafx: small edits, each with tests of the default run that must find it."""

from __future__ import annotations

from dataclasses import dataclass

FUZZ = "soundness/test_fuzz.py::test_programs"
VALUES = "soundness/test_norm_values.py"
VANISHING = "soundness/test_terms_that_vanish.py"
LAYOUT = "soundness/test_memory_layout.py"
WRITES = "soundness/test_writes.py"
RESULTS = "soundness/test_results.py"
CONVOLUTIONS = "spellings/test_convolution_spellings.py"
DEQUANTISED = "spellings/test_dequantised_twice.py"
DRAWN = "spellings/test_drawn_layers.py"
ON_DEVICE = "runtime/test_on_device.py"
KEPT = "ops/test_kept_for_the_backward.py"


@dataclass(frozen=True)
class Fault:
    """One edit.

    Attributes:
        file: below the package.
        old, new: the text, which must occur once, and what takes its place.
        tests: files or tests of the default run, the likeliest first.
    """

    file: str
    old: str
    new: str
    tests: tuple[str, ...] = (FUZZ,)


FAULTS: dict[str, Fault] = {
    "the gradient of g sees the bias": Fault(
        "ops/composition.py",
        "else base.to(wide) - inside.to(wide)",
        "else base.to(wide)",
        ("ops/test_composition.py",),
    ),
    "a base of another bias": Fault(
        "plan/bias.py",
        "        if inside != match.bias:\n",
        "        if not inside.items:\n",
        ("rewriter/test_biases.py",),
    ),
    "a product of a tracer that does not tell needs no gradient": Fault(
        "plan/bias.py", "may_require_grad(gemm.node) and", "out.requires_grad and", ("rewriter/test_biases.py",)
    ),
    "a trained bias in the base passes gradients on as well": Fault(
        "rewriter/emit.py", "n is base.trained", "False", ("rewriter/test_biases.py",)
    ),
    "products are rounded where their composition is": Fault(
        "rewriter/apply.py",
        "with emit.unrounded() if apart else nullcontext():",
        "with nullcontext():",
        ("rewriter/test_autocast_regions.py",),
    ),
    "a zero factor hides what is not finite": Fault(
        "ops/norm.py",
        "    if not bool(left.isfinite().all()) or not bool(right.isfinite().all()):\n        return None\n",
        "",
        ("ops/test_norm.py",),
    ),
    "what is written in between is equal all the same": Fault(
        "graphs/equal_values.py", "        if node in self._written:\n", "        if False:\n", (DEQUANTISED,)
    ),
    "any operands are equal": Fault(
        "graphs/equal_values.py",
        "operands = self._operands((node.args, node.kwargs))",
        "operands = len(node.args)",
        (DEQUANTISED,),
    ),
    "random numbers are equal": Fault(
        "_compat/operators.py", "        or torch.Tag.nondeterministic_seeded in overload.tags\n", "", (DEQUANTISED,)
    ),
    "rows that are written twice count once": Fault(
        "graphs/filled.py",
        "if any(first.stop > second.start for first, second in itertools.pairwise(writes)):",
        "if False:",
        (DRAWN,),
    ),
    "n for 1/n": Fault(
        "rewriter/apply.py",
        "    vector = emit.vector(value.poly)\n",
        "    vector = emit.vector(type(value.poly).var(Atom(norm.factors.atom.id)))\n",
        (FUZZ, VALUES),
    ),
    "a mean over several axes counts one": Fault(
        "lift/transfer/norms.py", "1.0 / math.prod(sizes)", "1.0 / sizes[0]", (FUZZ, VALUES)
    ),
    "a convolution without its options": Fault(
        "rewriter/convolved.py", "left, filters, None, *options)", "left, filters, None)", (CONVOLUTIONS,)
    ),
    "columns of other input channels in a channel's norm": Fault(
        "rewriter/roots.py",
        'emit.method("reshape", norms, (-1, info.span))',
        'emit.method("t", emit.method("reshape", norms, (info.span, -1)))',
        (CONVOLUTIONS,),
    ),
    "positions of a kernel that are scaled by themselves": Fault(
        "rewriter/convolved.py",
        "if positions == 1 or lift.is_scalar(atom):",
        "if True:",
        (CONVOLUTIONS,),
    ),
    "negative axes are the other ones": Fault(
        "lift/transfer/norms.py",
        'return "row" if dim % 2 == 1 else "col"',
        'return "row" if dim == 1 else "col"',
        (FUZZ, VALUES),
    ),
    "a view read after a later write": Fault(
        "graphs/functional.py",
        "            return None  # a view that is read after the memory was written again\n",
        "            pass\n",
        (WRITES, FUZZ),
    ),
    "a kept norm is handed out": Fault(
        "rewriter/hoist.py",
        "        escaping = copy_escaping(gm, entered)\n",
        "        escaping = frozenset()\n",
        ("runtime", FUZZ),
    ),
    "the geometry of parameters is not watched": Fault(
        "_compat/tensors.py",
        "        if list(map(geometry, tensors)) != self._exact:\n            return False\n",
        "",
        ("runtime", FUZZ),
    ),
    "versions are not watched": Fault(
        "runtime/watch.py", "if version_of(tensor) != self.version:", "if False:", ("runtime", FUZZ)
    ),
    "optimizers are not watched": Fault(
        "runtime/store.py", "            self.optimizer_steps += 1\n", "            pass\n", ("runtime", FUZZ)
    ),
    "a forward that records drops nothing": Fault(
        "runtime/prologue.py",
        "            if records or torch.is_grad_enabled():\n                kept_in.recorded(args)\n",
        "",
        ("runtime", FUZZ),
    ),
    "contents are not compared": Fault(
        "runtime/content.py", "if kept is None or kept[0] != content:", "if kept is None:", ("runtime", FUZZ)
    ),
    "contents are compared without strides": Fault(
        "runtime/content.py",
        "(geometry(tensor), xxhash",
        "((tensor.shape, tensor.dtype), xxhash",
        ("runtime", FUZZ),
    ),
    "factors are sampled while decoding": Fault(
        "runtime/watch.py",
        "        self.bytes = memory(tensor.data_ptr(), tensor.nbytes) if whole else",
        "        self.bytes = b'' if whole else",
        ("runtime",),
    ),
    "factors are compared one by one, but not together": Fault(
        "runtime/watch.py",
        "if list(map(xxhash.xxh3_64_intdigest, self._bytes)) != self._digests or self._views",
        "if self._views",
        ("runtime",),
    ),
    "positions do not count on a device": Fault(
        "ops/triton/checksums.py",
        "x = (positions.to(tl.uint64) << 32) | words.to(tl.uint64)",
        "x = words.to(tl.uint64)",
        (ON_DEVICE,),
    ),
    "a device's norms are trusted for another watch": Fault(
        "runtime/on_device.py", " and record.entries == entries", "", (ON_DEVICE,)
    ),
    "a device's norms are kept for other strides": Fault(
        "runtime/on_device.py",
        "if record is not None and record.layout.contents != layout.contents:",
        "if False:",
        (ON_DEVICE,),
    ),
    "what a device keeps is written": Fault(
        "runtime/on_device.py",
        "flat, norms, place = before.flat.clone(), [], 0",
        "flat, norms, place = before.flat, [], 0",
        (ON_DEVICE,),
    ),
    "a weight is always sampled on a device": Fault(
        "ops/triton/checksums.py",
        "        sampled = sampled and kept is not None\n",
        "        sampled = kept is not None\n",
        (ON_DEVICE,),
    ),
    "strides change": Fault(
        "rewriter/memory.py",
        "    if _is_empty(expected) or _strides_of(expected) == _strides_of(actual):",
        "    if True:",
        (FUZZ, LAYOUT),
    ),
    "two results are one tensor": Fault(
        "rewriter/memory.py",
        '            replacement = emit.method("clone", replacement)\n',
        "            pass\n",
        (LAYOUT, FUZZ),
    ),
    "a caller's norm is everybody's": Fault(
        "rewriter/apply.py", "if shared and not memory.stays_inside(node)", "if False", (LAYOUT, FUZZ, "runtime")
    ),
    "a fake kernel lies": Fault(
        "ops/norm.py",
        "    return layout.empty(operand.shape, operand, dtype=dtype or operand.dtype, device=operand.device)",
        "    return layout.empty(operand.shape, *([] if type(operand) is torch.Tensor else [operand]), "
        "dtype=dtype or operand.dtype, device=operand.device)",
        ("ops/test_contracts.py",),
    ),
    "zero is nothing": Fault(
        "lift/algebra.py",
        "    lost = frozenset(v for v in lost if not stands(v))\n",
        "    lost = _NOTHING\n",
        (FUZZ, VANISHING),
    ),
    "a rounding is dropped": Fault(
        "lift/values.py", "return torch.promote_types(before, after) != after", "return False", (FUZZ, VALUES)
    ),
    "a norm of fp64 in fp32": Fault(
        "rewriter/apply.py",
        "        right = emit.cast(right, torch.float64)",
        "        right = right",
        (FUZZ, "integration/test_mixed_dtypes.py"),
    ),
    "a tie with a bound": Fault(
        "lift/transfer/elementwise.py",
        '            return at_least(lift, v, low, "maximum")\n',
        "            return at_least(lift, v, low)\n",
        (VALUES,),
    ),
    "a symbol in fp32": Fault(
        "rewriter/terms.py",
        "            return self.call(getattr(operator, name), *operands)\n",
        '            return self.call(getattr(torch, {"truediv": "div"}.get(name, name)), *operands)\n',
        (VALUES, FUZZ),
    ),
    "an eps is forgotten": Fault("lift/transfer/elementwise.py", "eps=eps / scale,", "eps=0.0,", (FUZZ, VALUES)),
    "a detach is forgotten": Fault(
        "rewriter/terms.py",
        '        if info.kind not in ("node", "batch") and atom.detached and tensor_of(node) is not None:\n',
        "        if False:\n",
        (FUZZ, "soundness/test_gradient_modes.py"),
    ),
    "a bias is forgotten": Fault(
        "ops/composition.py", "        y = y + bias.to(wide)\n", "        y = y + 0 * bias.to(wide)\n", (FUZZ,)
    ),
    "the scaling counts twice": Fault(
        "ops/composition.py",
        "return total if lora is None else total + lora.to(wide) * scale",
        "return total if lora is None else total + lora.to(wide) * scale * scale",
        (FUZZ, "ops/test_composition.py"),
    ),
    "what was computed before gradients were switched on has them": Fault(
        "graphs/grad_mode.py",
        "self._enabled = not followed or self._began_enabled",
        "self._enabled = True",
        (RESULTS, FUZZ),
    ),
    "a norm with gradients leaves a graph that switches them on": Fault(
        "rewriter/nodes.py", 'if off and getattr(value, "requires_grad", False):', "if False:", (RESULTS, FUZZ)
    ),
    "results are views": Fault(
        "rewriter/results.py",
        "        if _is_view(original_result) or not _is_view(result):\n",
        "        if True:\n",
        (RESULTS,),
    ),
    "axes of one element lie anywhere": Fault(
        "rewriter/memory.py", "    if not known or tuple(emit", "    if True or tuple(emit", (RESULTS,)
    ),
    "what is kept is divided by any g": Fault(
        "ops/composition.py",
        "    exact = (size >= _EXACT_SCALES[0]) & (size <= _EXACT_SCALES[1])",
        "    exact = size == size",
        (KEPT,),
    ),
    "what is kept is not divided by g": Fault(
        "ops/composition.py", "(d_g if unscale is None else d_g * unscale)", "d_g", (KEPT,)
    ),
    "an output with a bias gives the sum back": Fault(
        "ops/composition.py",
        "return result is None and bias is None and kept == out_dtype == torch.bfloat16",
        "return result is None and kept == out_dtype == torch.bfloat16",
        (KEPT,),
    ),
    "a backward reads inputs that were overwritten": Fault(
        "codegen.py", 'node.op in ("placeholder", "get_attr") for node in', "False for node in", (KEPT,)
    ),
    "a backward begins at the first layer": Fault(
        "_compat/partitioner.py", "return found if len(found) <= _SOURCES else None", "return found", (KEPT,)
    ),
    "late hooks are not seen": Fault("backend.py", "    guard_on_hooks()\n", "", ("integration/test_hooks.py",)),
}
