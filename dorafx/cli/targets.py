"""The target of ``dorafx explain``: a Python file and a callable, or the folder of a PEFT adapter."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dorafx.errors import DorafxError
from dorafx.preflight.stored import read_json
from dorafx.quiet import quiet_imports

_BY_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Target:
    """A model or function, what to call it with, and what the user should know about it."""

    model: Any
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


def script_target(target: str) -> Target:
    """The target that ``FILE.py:CALLABLE`` returns.

    Raises:
        ValueError: not of that form, no such file, or no such callable in it.
        TypeError: the callable returned something else than a model, ``(model, args)`` or ``(model, args, kwargs)``.
    """
    returned = _load(target)()
    parts = returned if isinstance(returned, tuple) else (returned,)
    if not 1 <= len(parts) <= 3 or not callable(parts[0]):
        raise TypeError(f"{target} must return a model, (model, args) or (model, args, kwargs), not {returned!r:.60}")
    model, args, kwargs = (*parts, *((), {})[len(parts) - 1 :]) if len(parts) < 3 else parts
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"{target}: args must be a tuple, not {type(args).__name__}")
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"{target}: kwargs must be a dict, not {type(kwargs).__name__}")
    return Target(model, args, kwargs)


def _load(target: str) -> Any:
    path, separator, name = target.rpartition(":")
    if not separator or not path.endswith(".py"):
        raise ValueError(f"{target!r} is not of the form FILE.py:CALLABLE, nor a folder with an adapter_config.json")
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    # Dataclasses and Dynamo look a function's module up in sys.modules; a module that is there under this name must stay.
    if spec.name in sys.modules:
        spec.name = f"{spec.name}_explained"
        spec.loader.name = spec.name  # type: ignore[attr-defined]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    if not callable(getattr(module, name, None)):
        defined = (
            n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
        )
        known = [n for n in defined if not n.startswith("_")]
        raise ValueError(f"{path} has no callable {name!r}; it has {', '.join(known) or 'none'}")
    return getattr(module, name)


def adapter_target(folder: Path, base: Path | None, tokens: int, train: bool, random_weights: bool) -> Target:
    """The model of a PEFT adapter's folder, from configurations alone: no weights are read, and none are made unless requested.

    Args:
        folder: has an ``adapter_config.json``.
        base: folder with the base model's ``config.json``; by default the adapter's own folder, the one above it, or the one
            that the adapter names, whichever has one.
        tokens: length of the sequence that it is called with, one sequence.
        train: as in training: dropout active, gradients recorded.
        random_weights: make random weights instead of tensors without data, for models whose forward reads values.

    Raises:
        ValueError: something is absent or wrong; the message names it.
        DorafxError: PEFT or transformers is not installed.
    """
    try:
        with quiet_imports():
            import peft
            import transformers
    except ImportError as error:
        raise DorafxError("explaining an adapter needs PEFT and transformers: pip install 'dorafx[peft]'") from error
    if tokens < 1:
        raise ValueError(f"--tokens must be at least 1, not {tokens}")
    settings = read_json(folder / "adapter_config.json")
    config: Any = transformers.AutoConfig.from_pretrained(
        str(_base_folder(folder, base, settings.get("base_model_name_or_path"))), local_files_only=True
    )
    # Without a cache, which would need values; the same layers run.
    for part in (config, getattr(config, "text_config", config)):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    task = settings.get("task_type")
    name = _BY_TASK.get(task) if task else (config.architectures or [None])[0]
    kind = getattr(transformers, name or "AutoModel", None)
    if kind is None:
        raise ValueError(f"{folder}: transformers has no class {name!r}, which the base model's config.json names")
    with torch.device("cpu" if random_weights else "meta"):
        model = kind.from_config(config) if name is None or name.startswith("Auto") else kind(config)
        adapter = peft.PeftConfig.from_pretrained(str(folder))
        adapter.inference_mode = not train
        model = peft.get_peft_model(model, adapter, low_cpu_mem_usage=not random_weights)
        inputs = {model.main_input_name: torch.zeros(1, tokens, dtype=torch.long)}
        if model.main_input_name != "input_ids":
            raise ValueError(
                f"{folder}: the base model takes {model.main_input_name!r}, not tokens; write a FILE.py:CALLABLE instead"
            )
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.zeros(1, tokens, dtype=torch.long)
    note = "" if settings.get("use_dora") else "the adapter is no DoRA adapter: its use_dora is not true"
    return Target(model.train(train), (), inputs, note)


def _base_folder(folder: Path, base: Path | None, named: Any) -> Path:
    if base is not None:
        read_json(base / "config.json")
        return base
    candidates = [folder, folder.parent]
    if isinstance(named, str) and named:
        candidates += [Path(named), folder / named]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    label = f", {named!r}," if named else ""
    raise ValueError(
        f"the base model{label} has no config.json in or beside {folder}: give its folder with --base (nothing is downloaded)"
    )
