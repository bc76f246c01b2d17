"""A captured graph as a Python script that rebuilds it without any of its values, and compares it before and after the rewrite."""

from __future__ import annotations

import builtins
import functools
import importlib.metadata
import keyword
import math
import os
import platform
import re
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from dorafx._compat.distributed import placements
from dorafx._compat.scripts import autocast_state, higher_order_name, script_name
from dorafx._compat.tensors import is_wrapper, size_hint, storage_id
from dorafx.graphs.inputs import looks_like_parameter
from dorafx.graphs.provenance import input_path, operator_name, site_of
from dorafx.log import Record, Reproduction
from dorafx.options import Options

MOST_NODES = 4000
"""Of graphs with more nodes a log keeps no script, as making it would take a noticeable part of the compile time; ``DORAFX_REPRO`` gets
scripts of all graphs."""

_MOST_RECORDS = 40
_OPTIONS = ("codegen", "norm", "compose", "norm_reuse")
_INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "truediv": "/",
    "floordiv": "//",
    "mod": "%",
    "pow": "**",
    "matmul": "@",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "eq": "==",
    "ne": "!=",
    "and_": "&",
    "or_": "|",
}
_IN_PLACE = {"iadd": "+=", "isub": "-=", "imul": "*=", "itruediv": "/=", "imatmul": "@=", "ipow": "**="}
_PATHS = re.compile(r"(?:[A-Za-z]:)?[\\/](?:[^\\/:\n'\"\[\]]+[\\/])+([^\\/:\s]+)")
_FRAME = re.compile(r'^\s*File "([^"]+)", line (\d+)')
# Names that the script itself uses.
_RESERVED = frozenset({"torch", "math", "operator", "self", "DEVICE", "Graph", "OPTIONS", "compare", "draw", "inputs"})


class CannotBeRebuilt(Exception):
    """No script can rebuild the graph; the message says why."""


class _Opaque(Exception):
    """A node cannot be written as Python; the message says why."""


def reproduction(gm: fx.GraphModule, options: Options, records: Sequence[Record]) -> Reproduction:
    """The script of a graph. No value of a tensor gets into it; numbers that Dynamo took for
    constants (a number among the arguments, an attribute) are in the graph, and so in the script.

    Args:
        gm: the graph as it was captured; in the grad mode and under the autocast that are active now.
        options: with which it was rewritten.
        records: what became of it.
    """
    if len(gm.graph.nodes) > MOST_NODES and not os.environ.get("DORAFX_REPRO"):
        return Reproduction.impossible(
            f"the graph has {len(gm.graph.nodes)} nodes: scripts of more than {MOST_NODES} are made only while "
            "DORAFX_REPRO=folder is set"
        )
    try:
        return _Script(gm, options, records).made()
    except CannotBeRebuilt as error:
        return Reproduction.impossible(str(error))


class _Script:
    """The text of one script."""

    def __init__(self, gm: fx.GraphModule, options: Options, records: Sequence[Record]) -> None:
        self.gm = gm
        self.options = options
        self.records = records
        self.left_out: list[str] = []
        self.members: list[str] = []
        self.inputs: list[tuple[str, str]] = []
        """Name and expression of each argument of the graph's forward."""
        self.functions: list[list[str]] = []
        """Bodies of higher-order operators."""
        self.names: set[str] = set()
        self.uses_device = False
        self._prefix = ""

    def made(self) -> Reproduction:
        forward = self._body(self.gm, None)
        arguments = ", ".join(["self", *(name for name, _ in self.inputs)])
        graph = [
            "class Graph(torch.nn.Module):",
            "    def __init__(self, draw):",
            "        super().__init__()",
            *(f"        {line}" for line in self.members),
            "",
            f"    def forward({arguments}):",
            *(f"        {line}" if line else "" for line in forward),
        ]
        inputs = [
            "def inputs(draw):",
            "    return [",
            *(f"        {value},  # {name}" for name, value in self.inputs),
            "    ]",
        ]
        parts = [*(f for f in self.functions), graph, inputs, self._main()]
        body = "\n\n\n".join("\n".join(part) for part in parts)
        head = [*self._docstring(), "", *self._imports(body), ""]
        if self.uses_device:
            head += ['DEVICE = "cuda" if torch.cuda.is_available() else "cpu"']
        head += [f"OPTIONS = {self._option_values()!r}", "", "", ""]
        program = [
            re.sub(r"(^|  )#.*", "", line).rstrip() for line in (repr(self._option_values()), *body.splitlines())
        ]
        return Reproduction.of(
            "\n".join(head) + body + "\n", "\n".join(line for line in program if line), tuple(self.left_out)
        )

    # -- around the graph ---------------------------------------------------------------------------------------------

    def _docstring(self) -> list[str]:
        lines = [
            '"""A graph that dorafx met, rebuilt without the data of the program that it is from: every value is drawn at random.',
            "",
            "`python THIS_FILE` (torch and dorafx are needed) runs it before and after the rewrite, forward and backward, in fp64, in its own",
            "dtypes, and as it is compiled. The exit code is 1 where that differs or dorafx fails, else 0.",
            "",
            f"Written by dorafx {_version()} with torch {torch.__version__} and Python {platform.python_version()}. Of it the log said:",
        ]
        for record in self.records[:_MOST_RECORDS]:
            lines.append(f"  {_plain(str(record))}")
        if len(self.records) > _MOST_RECORDS:
            lines.append(f"  and {len(self.records) - _MOST_RECORDS} more")
        if self.options.selection:
            self.left_out.append(
                "what dorafx.skip and dorafx.only leave alone is rewritten here, as the script has no modules of those names"
            )
        if self.left_out:
            lines += [
                "",
                "What is not as in the program:",
                *(f"  - {_plain(text)}" for text in dict.fromkeys(self.left_out)),
            ]
        return [*lines, '"""']

    def _imports(self, body: str) -> list[str]:
        imports = [f"import {name}" for name in ("math", "operator", "torch") if name == "torch" or f"{name}." in body]
        modules = sorted(set(re.findall(r"\b(torch(?:\.[a-z_][\w]*)+)\.\w+\(", body)))
        for module in modules:
            if module.startswith(("torch.amp.", "torch.utils.")) and module != "torch.utils":
                imports.append(f"import {module}")
        return [*imports, "", "from dorafx.repro import compare", ""]

    def _option_values(self) -> dict[str, Any]:
        default = Options()
        values = {name: getattr(self.options, name) for name in _OPTIONS}
        return {f"dorafx.{name}": value for name, value in values.items() if value != getattr(default, name)}

    def _main(self) -> list[str]:
        mode = "inference" if torch.is_inference_mode_enabled() else "grad" if torch.is_grad_enabled() else "no_grad"
        settings = [f"grad_mode={mode!r}"]
        if autocast := autocast_state():
            settings.append(f"autocast={{{', '.join(f'{kind!r}: {dtype!r}' for kind, dtype in autocast)}}}")
        if torch.get_default_dtype() != torch.float32:
            settings.append(f"default_dtype={torch.get_default_dtype()!r}")
        return [
            'if __name__ == "__main__":',
            f"    raise SystemExit(compare(Graph, inputs, OPTIONS, {', '.join(settings)}))",
        ]

    # -- the graph ----------------------------------------------------------------------------------------------------

    def _name(self, wanted: str) -> str:
        name = re.sub(r"\W", "_", wanted) or "value"
        if name[0].isdigit() or keyword.iskeyword(name) or name in _RESERVED or name in vars(builtins):
            name = f"{name}_" if not name[0].isdigit() else f"_{name}"
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

    def _body(self, gm: fx.GraphModule, parameters: list[str] | None) -> list[str]:
        """The statements of a graph.

        Args:
            parameters: receives the names of a body's arguments; None for the outermost graph, whose inputs become attributes and
                arguments.
        """
        names: dict[fx.Node, str] = {}
        lines: list[str] = []
        depth = 0
        opened: list[int] = []
        place = ("", "")
        symbols = self._symbols(gm) if parameters is None else {}
        if parameters is None:
            paths = [input_path(n) for n in gm.graph.find_nodes(op="placeholder") if looks_like_parameter(n)]
            self._prefix = _common_modules(paths)
        storages: dict[int, str] = {}
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                if parameters is not None:
                    names[node] = self._name(node.name)
                    parameters.append(names[node])
                elif node in symbols:
                    continue
                else:
                    names[node] = self._input(node, storages)
                continue
            if node.op == "output":
                break
        if parameters is None:
            for node, value in symbols.items():
                names[node] = self._name(node.name)
                lines.append(f"{names[node]} = {value(names)}")
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                lines.append(f"return {self._value(node.args[0], names)}")
                break
            here = _source(node), site_of(node)
            if here != place and any(here) and node.op != "get_attr":
                place = here
                text, site = here
                lines.append("    " * depth + f"# {text}{f'  [{_plain(site)}]' if site else ''}")
            indent = "    " * depth
            called = getattr(node.target, "__name__", "")
            if called == "_enter_autocast":
                kind, dtype, enabled, cache = (*node.args, None, None, True, None)[:4]
                lines.append(
                    f"{indent}with torch.autocast({kind!r}, dtype={self._value(dtype, names)}, enabled={enabled!r}, "
                    f"cache_enabled={cache!r}):"
                )
                depth += 1
                opened.append(len(lines))
                continue
            if called == "_exit_autocast":
                if opened and opened.pop() == len(lines):
                    lines.append(f"{indent}pass")
                depth = max(depth - 1, 0)
                continue
            try:
                lines += [indent + line for line in self._statement(gm, node, names)]
            except _Opaque as why:
                lines += [indent + line for line in self._stand_in(node, names, str(why), parameters is None)]
        return lines

    def _symbols(self, gm: fx.GraphModule) -> dict[fx.Node, Callable[[dict[fx.Node, str]], str]]:
        """How the script computes each symbolic size that is an input: from a tensor that has it, or as the number that it was."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        sizes: dict[str, tuple[fx.Node, int]] = {}
        for node in placeholders:
            value = node.meta.get("example_value", node.meta.get("val"))
            for i, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt):
                    sizes.setdefault(str(size), (node, i))
        symbols: dict[fx.Node, Callable[[dict[fx.Node, str]], str]] = {}
        for node in placeholders:
            value = node.meta.get("example_value", node.meta.get("val"))
            if isinstance(value, torch.SymInt) and str(value) in sizes:
                tensor, dimension = sizes[str(value)]
                symbols[node] = lambda names, t=tensor, d=dimension, v=value: f"{names[t]}.size({d})  # {size_hint(v)}"  # type: ignore[misc]
            elif not isinstance(value, torch.Tensor):
                hint = size_hint(value)
                if not isinstance(hint, (int, float, bool)):
                    raise CannotBeRebuilt(
                        f"the input {node.name} is a {type(value).__name__}, of which a script cannot draw a value"
                    )
                symbols[node] = lambda names, v=hint: _number(v)  # type: ignore[misc]
        return symbols

    def _input(self, node: fx.Node, storages: dict[int, str]) -> str:
        tensor = node.meta.get("example_value", node.meta.get("val"))
        assert isinstance(tensor, torch.Tensor)
        path = input_path(node)
        shown = _plain(path or node.name)
        if placements(tensor) is not None:
            raise CannotBeRebuilt(
                f"the input {shown} is a DTensor: a graph of several processes cannot be rebuilt in one script"
            )
        if is_wrapper(tensor) or tensor.layout is not torch.strided:
            kind = type(tensor).__name__ if is_wrapper(tensor) else str(tensor.layout)
            self.left_out.append(f"the input {shown} is a {kind}; a plain dense tensor stands for it")
        elif (key := storage_id(tensor)) in storages:
            self.left_out.append(f"the inputs {shown} and {storages[key]} share memory; here they do not")
        else:
            storages[key] = shown
        if looks_like_parameter(node):
            return self._member(path.removeprefix(self._prefix) or node.name, tensor, shown)
        name = self._name(node.name)
        self.inputs.append((name, self._drawn(tensor)))
        return name

    def _member(self, path: str, tensor: torch.Tensor, shown: str) -> str:
        name = self._name(f"p_{path}")
        kind = "parameter" if tensor.dtype.is_floating_point else "buffer"
        value = self._drawn(tensor, "parameter" if kind == "parameter" else "tensor")
        if kind == "parameter":
            self.members.append(f"self.{name} = {value}  # {shown}")
        else:
            self.members.append(f"self.register_buffer({name!r}, {value})  # {shown}")
        return f"self.{name}"

    def _drawn(self, tensor: Any, how: str = "tensor") -> str:
        """An expression that draws a tensor of this geometry."""
        shape = tuple(int(size_hint(size)) for size in tensor.shape)
        settings = [repr(shape), repr(tensor.dtype)]
        if tensor.layout is torch.strided and not is_wrapper(tensor):
            strides = tuple(int(size_hint(stride)) for stride in tensor.stride())
            if strides != _contiguous(shape):
                settings.append(f"strides={strides!r}")
        if tensor.device.type not in ("cpu", "meta"):
            self.uses_device = True
            settings.append("device=DEVICE")
        dynamic = tuple(i for i, size in enumerate(tensor.shape) if isinstance(size, torch.SymInt))
        if dynamic:
            settings.append(f"symbolic={dynamic!r}")
        if tensor.requires_grad:
            settings.append("requires_grad=True")
        return f"draw.{how}({', '.join(settings)})"

    def _stand_in(self, node: fx.Node, names: dict[fx.Node, str], why: str, outermost: bool) -> list[str]:
        """What a node computes becomes an input, drawn at random."""
        value = node.meta.get("example_value", node.meta.get("val"))
        if not outermost:
            raise CannotBeRebuilt(f"{why}, and it is inside of a checkpointed region or a branch")
        parts = list(value) if isinstance(value, (tuple, list)) else [value]
        if not node.users:
            self.left_out.append(f"{why}; the call is left out")
            return [f"# left out: {_plain(why)}"]
        if any(not isinstance(part, (torch.Tensor, int, float, bool, type(None))) for part in parts) or value is None:
            raise CannotBeRebuilt(f"{why}, and its result is no tensor that could be drawn instead")
        if any(isinstance(part, torch.Tensor) and placements(part) is not None for part in parts):
            raise CannotBeRebuilt(
                f"{why}, and its result is a DTensor: a graph of several processes cannot be rebuilt in one script"
            )
        self.left_out.append(
            f"{why}; its result is an input here, drawn at random, through which no gradient flows back"
        )
        from_parameters = _only_parameters(node)
        written = []
        for i, part in enumerate(parts):
            if not isinstance(part, torch.Tensor):
                written.append(_number(size_hint(part)) if part is not None else "None")
                continue
            name = node.name if len(parts) == 1 else f"{node.name}_{i}"
            if from_parameters:
                written.append(self._member(name, part, f"stands for the result of {_plain(operator_name(node))}"))
            else:
                written.append(self._name(name))
                self.inputs.append((written[-1], self._drawn(part)))
        if isinstance(value, (tuple, list)):
            names[node] = self._name(f"{node.name}_all")
            return [f"{names[node]} = {_sequence(written)}  # {_plain(why)}"]
        names[node] = written[0]
        return [f"# {written[0]}: {_plain(why)}"]

    def _statement(self, gm: fx.GraphModule, node: fx.Node, names: dict[fx.Node, str]) -> list[str]:
        if node.op == "get_attr":
            return self._attribute(gm, node, names)
        if node.op == "call_module":
            raise _Opaque(f"{node.name} calls the module {node.target}, which is not part of the graph")
        if node.op == "call_method":
            receiver, *rest = node.args
            called = f"{self._value(receiver, names)}.{node.target}"
            return [self._assigned(node, names, self._call(called, rest, node.kwargs, names))]
        higher = higher_order_name(node.target)
        if higher:
            return [self._assigned(node, names, self._higher_order(gm, node, higher, names))]
        path = script_name(node.target)
        if not path:
            raise _Opaque(f"{node.name} calls {_target(node)}, which is not of torch")
        if path == "getattr" and len(node.args) == 2 and str(node.args[1]).isidentifier():
            return [self._assigned(node, names, f"{self._value(node.args[0], names)}.{node.args[1]}")]
        module, _, short = path.rpartition(".")
        if module == "operator":
            written = self._operator(node, short, names)
            if written is not None:
                return written
        return [self._assigned(node, names, self._call(path, node.args, node.kwargs, names))]

    def _assigned(self, node: fx.Node, names: dict[fx.Node, str], expression: str) -> str:
        if not node.users:
            return expression
        names[node] = self._name(node.name)
        return f"{names[node]} = {expression}"

    def _operator(self, node: fx.Node, name: str, names: dict[fx.Node, str]) -> list[str] | None:
        if node.kwargs:
            return None
        values = [self._value(a, names) for a in node.args]
        if name in _INFIX and len(values) == 2:
            return [self._assigned(node, names, f"{_atom(values[0])} {_INFIX[name]} {_atom(values[1])}")]
        if name == "neg":
            return [self._assigned(node, names, f"-{_atom(values[0])}")]
        if name == "getitem":
            return [self._assigned(node, names, f"{_atom(values[0])}[{self._index(node.args[1], names)}]")]
        if name == "setitem":
            return [f"{_atom(values[0])}[{self._index(node.args[1], names)}] = {values[2]}"]
        if name in _IN_PLACE and len(values) == 2:
            names[node] = self._name(node.name)
            return [f"{names[node]} = {values[0]}", f"{names[node]} {_IN_PLACE[name]} {values[1]}"]
        return None

    def _attribute(self, gm: fx.GraphModule, node: fx.Node, names: dict[fx.Node, str]) -> list[str]:
        value: Any = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, fx.GraphModule):
            return []  # written where it is called
        if gm is not self.gm:
            raise CannotBeRebuilt(f"a checkpointed region or a branch holds the constant {node.target}")
        if not isinstance(value, torch.Tensor):
            raise CannotBeRebuilt(f"the graph holds {node.target}, a {type(value).__name__}")
        if placements(value) is not None:
            raise CannotBeRebuilt(f"the graph holds {node.target}, a DTensor")
        names[node] = self._member(str(node.target), value, f"the graph's {node.target}")
        if not isinstance(value, torch.nn.Parameter):
            self.left_out.append(f"the values of the constant {node.target} of the graph are drawn at random")
        return []

    def _higher_order(self, gm: fx.GraphModule, node: fx.Node, name: str, names: dict[fx.Node, str]) -> str:
        if name == "tag_activation_checkpoint":
            body, *operands = tuple(node.args)
            settings = {k: v for k, v in node.kwargs.items() if k in ("use_reentrant", "preserve_rng_state")}
            settings.setdefault("use_reentrant", False)
            function = self._function(gm, body)
            written = [function, *(self._value(o, names) for o in operands)]
            written += [f"{k}={v!r}" for k, v in settings.items()]
            return f"torch.utils.checkpoint.checkpoint({', '.join(written)})"
        if name == "cond":
            condition, *branches, operands = tuple[Any, ...](node.args)
            functions = [self._function(gm, branch) for branch in branches]
            return (
                f"torch.cond({self._value(condition, names)}, {', '.join(functions)}, {self._value(operands, names)})"
            )
        raise _Opaque(f"{node.name} calls the higher-order operator {name}, for which a script has no Python")

    def _function(self, gm: fx.GraphModule, body: Any) -> str:
        module: Any = gm
        for part in str(body.target).split("."):
            module = getattr(module, part)
        # Not by the name in the graph: Dynamo gives the body the same one when it traces the script, and confuses the two.
        name = self._name(f"region_{len(self.functions)}")
        arguments: list[str] = []
        lines = self._body(module, arguments)
        self.functions.append(
            [f"def {name}({', '.join(arguments)}):", *(f"    {line}" if line else "" for line in lines)]
        )
        return name

    # -- values -------------------------------------------------------------------------------------------------------

    def _call(self, called: str, args: Iterable[Any], kwargs: dict[str, Any], names: dict[fx.Node, str]) -> str:
        written = [self._value(a, names) for a in args] + [f"{k}={self._value(v, names)}" for k, v in kwargs.items()]
        return f"{called}({', '.join(written)})"

    def _index(self, index: Any, names: dict[fx.Node, str]) -> str:
        if isinstance(index, tuple) and index:
            return ", ".join(self._index_part(part, names) for part in index) + ("," if len(index) == 1 else "")
        return self._index_part(index, names)

    def _index_part(self, part: Any, names: dict[fx.Node, str]) -> str:
        if not isinstance(part, slice):
            return self._value(part, names)
        start, stop, step = ("" if p is None else self._value(p, names) for p in (part.start, part.stop, part.step))
        return f"{start}:{stop}{f':{step}' if step else ''}"

    def _value(self, value: Any, names: dict[fx.Node, str]) -> str:
        """An argument as Python.

        Raises:
            _Opaque: there is no Python for it.
        """
        if isinstance(value, fx.Node):
            if value not in names:
                raise _Opaque(f"{value.name}, which it reads, is left out")
            return names[value]
        if isinstance(value, (list, tuple)):
            return _sequence([self._value(v, names) for v in value], isinstance(value, list))
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self._value(v, names)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({', '.join(self._value(v, names) for v in (value.start, value.stop, value.step))})"
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return _number(size_hint(value))
        if value is None or value is Ellipsis or isinstance(value, (bool, int, str)):
            return "..." if value is Ellipsis else repr(value)
        if isinstance(value, (float, complex)):
            return _number(value)
        if isinstance(value, torch.device):
            if value.type in ("cpu", "meta"):
                return f"torch.device({value.type!r})"
            self.uses_device = True
            return "torch.device(DEVICE)"
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return repr(value)
        raise _Opaque(f"it takes a {type(value).__name__}")


def _version() -> str:
    try:
        return importlib.metadata.version("dorafx")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _number(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    return repr(value)


def _atom(text: str) -> str:
    return f"({text})" if text.startswith("-") else text


def _sequence(parts: Sequence[str], is_list: bool = False) -> str:
    if is_list:
        return f"[{', '.join(parts)}]"
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _common_modules(paths: Sequence[str]) -> str:
    """The modules that all of these parameters are in, as a prefix of their names."""
    if len(paths) < 2:
        return ""
    common = []
    for parts in zip(*(path.split(".")[:-1] for path in paths)):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return "".join(f"{part}." for part in common)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, types.FunctionType):
        return f"{node.target.__module__}.{node.target.__qualname__}"
    name = str(node.target)
    return name if not name.startswith("<") else str(getattr(node.target, "__name__", type(node.target).__name__))


def _only_parameters(node: fx.Node) -> bool:
    """Whether a node is computed from parameters and buffers alone."""
    seen: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    leaves = False
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op in ("placeholder", "get_attr"):
            if isinstance(current.meta.get("example_value", current.meta.get("val")), (int, torch.SymInt)):
                continue
            if not looks_like_parameter(current):
                return False
            leaves = True
        stack.extend(current.all_input_nodes)
    return leaves


def _source(node: fx.Node) -> str:
    """``file.py:12: code`` of the innermost frame, without the folders that the file is in."""
    return _innermost(node.meta.get("stack_trace") or "")


@functools.lru_cache(maxsize=1024)
def _innermost(trace: str) -> str:
    lines = trace.splitlines()
    for i in range(len(lines) - 1, -1, -1):
        frame = _FRAME.match(lines[i])
        if frame is not None:
            code = lines[i + 1].strip() if i + 1 < len(lines) else ""
            return _plain(f"{os.path.basename(frame[1])}:{frame[2]}{f': {code}' if code else ''}")[:160]
    return ""


@functools.lru_cache(maxsize=4096)
def _plain(text: str) -> str:
    """A text in one line without folders, and without what would end a docstring or a comment."""
    text = _PATHS.sub(r"\1", " ".join(text.split()))
    return text.replace('"""', "'''").replace("\\", "/")
