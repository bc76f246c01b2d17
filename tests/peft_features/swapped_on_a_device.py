"""Hot swapping where the host sees nothing of the contents: the CPU stands for a device, in Triton's interpreter. Run by test_hot_swapping.py in
a process of its own, since the interpreter is switched on for a whole process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hot_swapping import adapter, loaded, swap
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from peft_features import STARTS, Twin, Way

from dorafx import rewrite_log
from dorafx.ops import dispatch
from dorafx.ops.triton import checksums
from dorafx.plan import cost
from dorafx.runtime import content, watch


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_DEVICES", ("cpu",))
    monkeypatch.setattr(checksums, "WORDS", 64)
    monkeypatch.setitem(cost.BALANCE, "cuda", 0.0)  # every comparison is worth it
    monkeypatch.setattr(watch, "is_read", lambda tensor: False)
    monkeypatch.setattr(content, "_content", lambda tensor: None)


@pytest.mark.parametrize("prepared", [False, True], ids=["same rank", "prepared"])
@pytest.mark.parametrize("how", ["optimize", "backend"])
def test_counts_at_the_first_step(how: str, prepared: bool, tmp_path: Path) -> None:
    adapters = [adapter(tmp_path, seed, r=4 if prepared and seed == 2 else 2) for seed in (1, 2)]

    def build() -> Any:
        model = loaded(adapters[0])
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=4)
        return model

    twin = Twin(Way(how, "eager"), build).warm()
    if not prepared:
        assert rewrite_log().norms.compared, "kernels compare the contents"
    with twin.without_recompilation():
        for k, start in enumerate(STARTS):
            twin.do(lambda model, k=k: swap(model, adapters[(k + 1) % 2]))
            for step in (start, "outputs"):
                getattr(twin, step)(*((1, 1) if step == "outputs" else ()))
