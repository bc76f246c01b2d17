"""Imports that the fork server of a benchmark does once for all processes that run PEFT's models."""

from __future__ import annotations

import importlib

from dorafx.quiet import quiet_imports

with quiet_imports():
    for name in ("peft", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
