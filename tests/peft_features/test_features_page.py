"""The guide's page of PEFT's features is written from the tests' declarations, so that no row of it is without a test."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from pages import is_current
from peft_features import FEATURES, SECTIONS

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "examples" / "guide" / "peft-features.md"
HEAD = """# PEFT features

What people do with a PEFT model beyond forward and backward, and whether it works with dorafx: adapters, merging,
configurations, optimizers. For anybody who uses more of PEFT than `get_peft_model`.

Each row is a test in `tests/peft_features`. A stock model and an equal one under dorafx, with magnitudes away from the
norms, go through the same steps. After each change they are compared in decoding (where norms are reused), a prompt of
eight tokens, a long prompt and training; each of these comes first once.

| result | meaning |
|---|---|
| **works** | the same results as stock PEFT, and no outdated norm |
| **PEFT refuses** | stock PEFT raises an error, and the same with dorafx |
| **parity with an upstream bug** | stock PEFT's result is not what one expects, and dorafx's is the same |

All rows hold for `dorafx.optimize(model)` and `torch.compile(model, backend="dorafx")`, with Inductor and with eager
codegen. The versions are those of the extra `test` in `pyproject.toml`.

## Swapping adapters in a compiled model

One compilation serves adapters of all ranks up to `target_rank`:

```python
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

import dorafx

base = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "1"], use_dora=True)).eval()
prepare_model_for_compiled_hotswap(model, target_rank=16)  # first
dorafx.optimize(model)  # then
```

"""
MODULES = [
    "test_hot_swapping",
    "test_adapter_changes",
    "test_merged_adapters",
    "test_configurations",
    "test_initialisations",
    "test_optimizers_by_name",
    "test_averages",
]


def page() -> str:
    for module in MODULES:
        importlib.import_module(module)
    text = HEAD
    for section in SECTIONS:
        rows = [feature for feature in FEATURES.values() if feature.section == section]
        text += f"## {section}\n\n| feature | with dorafx | what to know |\n|---|---|---|\n"
        text += "".join(f"| {row.name} | {row.outcome} | {row.note} |\n" for row in rows)
        files = sorted({row.test.split("::")[0] for row in rows})
        text += f"\nTests: {', '.join(f'`tests/peft_features/{file}`' for file in files)}.\n\n"
    return (
        text
        + "Written by `DORAFX_WRITE_PAGES=1 pytest -m page`; the same test without it fails where this page is not current.\n"
    )


@pytest.mark.page
def test_page() -> None:
    is_current(PAGE, page())
    assert len(FEATURES) >= 80
    files = {path.stem for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).stem}
    assert files == set(MODULES)
    assert {feature.section for feature in FEATURES.values()} == set(SECTIONS)
    for feature in FEATURES.values():
        module, name = feature.test.split(".py::")
        assert callable(getattr(importlib.import_module(module), name)), feature.test
        assert len(feature.note.split()) <= 60, feature.name


def test_the_pages_program(tmp_path: Path) -> None:
    program = HEAD.split("```python\n")[1].split("```")[0]
    exec(program, {"__name__": "page"})
