"""Checkpoints on disk, of which single tensors, or rows of them, are read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dorafx.errors import DorafxError

from .layer import Weight

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Parts of a diffusers pipeline, each in a folder of its own.
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
_HEADS = ("lm_head", "embed_out", "output_projection")
_POSITIONS = ("wpe", "embed_positions", "position_embeddings")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tok_embeddings")


# Parts of a model beside its text model, as they are called in names of modules; layers of different parts have the same names.
_TOWERS = {"vision": "vision", "visual": "vision", "image": "vision", "audio": "audio", "speech": "audio",
           "encoder": "encoder", "decoder": "decoder", "text_encoder_2": "second", "text_encoder_3": "third"}  # fmt: skip


def _towers(module: str) -> frozenset[str]:
    return frozenset(tower for word, tower in _TOWERS.items() if word in module)


class Tensors:
    """The tensors of safetensors files, opened when one is read.

    Args:
        files: name of each tensor -> its file, and its name there.
        stack: closes the files.
    """

    def __init__(self, files: dict[str, tuple[Path, str]], stack: contextlib.ExitStack) -> None:
        self.files = files
        self._stack = stack
        self._opened: dict[Path, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def _slice(self, name: str) -> Any:
        path, inner = self.files[name]
        if path not in self._opened:
            self._opened[path] = self._stack.enter_context(open_file(path))
        try:
            return self._opened[path].get_slice(inner)
        except Exception as error:
            raise ValueError(f"{path}: cannot read {inner!r} ({error})") from None

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        tensor: torch.Tensor = self._slice(name)[...]
        return tensor if tensor.dtype in _DTYPES.values() else tensor.float()

    def number(self, name: str) -> float:
        """A tensor of one entry.

        Raises:
            ValueError: it has more, or none.
        """
        tensor = self.read(name)
        if tensor.numel() != 1:
            raise ValueError(f"{self.files[name][0]}: {name} has {tensor.numel()} entries, where one number belongs")
        return float(tensor)

    def dtype_of(self, name: str) -> str:
        """The dtype as the file names it: ``"BF16"``, ``"U8"``."""
        return str(self._slice(name).get_dtype())

    def weight(self, name: str) -> Weight | str:
        """A floating tensor of which rows are read; why that cannot be, for others."""
        view = self._slice(name)
        dtype = _DTYPES.get(str(view.get_dtype()))
        if dtype is None:
            return f"{name} is stored as {view.get_dtype()}, a quantised format"
        return Weight(tuple(view.get_shape()), dtype, lambda first, last: view[first:last])


def open_file(path: Path) -> Any:
    """A safetensors file, of which nothing is read but the header.

    Raises:
        DorafxError: the package is not installed.
        ValueError: it is no such file.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise DorafxError("checking files needs safetensors: pip install 'dorafx[peft]'") from error
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error})") from None
    except RuntimeError as error:  # a single file that is larger than the memory
        raise ValueError(f"{path} cannot be mapped ({error}): save the base in several files") from None


def read_json(path: Path) -> dict[str, Any]:
    """An object.

    Raises:
        ValueError: no such file, or something else in it.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path.name} in {path.parent}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def tensors_of(path: Path, stack: contextlib.ExitStack, prefix: str = "") -> Tensors:
    """The tensors of one safetensors file."""
    with open_file(path) as opened:
        return Tensors({f"{prefix}{name}": (path, name) for name in opened.keys()}, stack)  # noqa: SIM118


class Base:
    """A base model's weights in a folder or a single file.

    Args:
        path: the folder, with one safetensors file, several with an index, or (diffusers) folders of such; or a file.
        stack: closes the files.

    Raises:
        ValueError: nothing that can be read is there; the message says what is.
    """

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self.path = path
        folder = path.parent if path.is_file() and path.name == "model.safetensors" else path
        self.config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        files: dict[str, tuple[Path, str]] = {}
        if path.is_file():
            files = tensors_of(path, stack).files
        elif path.is_dir():
            files = _in_folder(path, stack)
            if not files:
                for component in _COMPONENTS:
                    folder = path / component
                    if folder.is_dir():
                        found = _in_folder(folder, stack)
                        files |= {f"{component}.{name}": where for name, where in found.items()}
        else:
            raise ValueError(
                f"there is no base model {str(path)!r}: give its folder with --base (nothing is downloaded)"
            )
        if not files and (path.is_file() or any(path.glob("*.safetensors"))):
            raise ValueError(f"the base {path} holds no tensor: give the base's folder with --base")
        if not files:
            others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
            what = f"; {others[0]} cannot be read by rows, save it as safetensors" if others else ""
            raise ValueError(f"{path} has no safetensors file{what}")
        self.tensors = Tensors(files, stack)
        self.modules = {name.removesuffix(".weight") for name in files if name.endswith(".weight")}
        self._endings: dict[str, list[str]] = {}
        for module in self.modules:
            parts = module.split(".")
            for start in range(len(parts)):
                self._endings.setdefault(".".join(parts[start:]), []).append(module)

    def module(self, site: str) -> str | None:
        """The name under which the base stores a module; None if it has none.

        Names in front of the layers may differ: the body of a model is saved without its head, and loaded into one with it; and
        transformers renames the parts of a model that reads images and text when it loads it.
        """
        if site in self.modules:
            return site
        parts = site.split(".")
        # The number of a layer, and what follows it, are the same in both.
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        last = (
            number - 1
            if number
            else max(0, len(parts) - (1 if parts[-1] in (*_HEADS, *_EMBEDDINGS, *_POSITIONS) else 2))
        )
        for start in range(last + 1):
            ending = ".".join(parts[start:])
            alike = [m for m in self._endings.get(ending, []) if _towers(m) == _towers(site)]
            if len(alike) == 1:
                return alike[0]
            if alike:
                return None
        if parts[-1] in _HEADS and self._is_tied:
            tied = [m for m in self.modules if m.rsplit(".", 1)[-1] in _EMBEDDINGS]
            return tied[0] if len(tied) == 1 else None
        return None

    @property
    def _configs(self) -> list[dict[str, Any]]:
        """config.json and the configurations of parts that are in it."""
        return [self.config, *(c for c in self.config.values() if isinstance(c, dict))]

    @property
    def _is_tied(self) -> bool:
        told = [c["tie_word_embeddings"] for c in self._configs if "tie_word_embeddings" in c]
        return all(told)  # where nothing is said, transformers ties

    @property
    def model_types(self) -> set[str]:
        """What config.json calls the model and its parts; empty if there is none."""
        return {str(c["model_type"]) for c in self._configs if c.get("model_type")}

    @property
    def quantization(self) -> str:
        """The method by which the base is quantised, as its config.json names it; empty if it is not."""
        found = (c["quantization_config"] for c in self._configs if isinstance(c.get("quantization_config"), dict))
        return next((str(q.get("quant_method") or "unknown") for q in found), "")


def _in_folder(folder: Path, stack: contextlib.ExitStack) -> dict[str, tuple[Path, str]]:
    """Tensor -> file and name, of the shards that an index names, else of every safetensors file in a folder."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        index = min(indices, key=lambda p: len(p.name))
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise ValueError(f"{index}: it has no weight_map of tensors to files")
        absent = sorted({s for s in shards.values() if not (folder / s).is_file()})
        if absent:
            raise ValueError(f"{index} names {absent[0]}, which is not there")
        return {name: (folder / shard, name) for name, shard in shards.items()}
    single = [p for p in sorted(folder.glob("*.safetensors")) if not p.name.startswith("adapter_")]
    named = [p for p in single if p.name in ("model.safetensors", "diffusion_pytorch_model.safetensors")]
    files: dict[str, tuple[Path, str]] = {}
    for path in named[:1] or single:  # beside these there may be variants of the same weights
        files |= tensors_of(path, stack).files
    return files
