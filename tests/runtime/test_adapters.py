"""Never stale: what PEFT does to adapters between two decoding steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integration_support import assert_close, lora_config, peft_perceptron, randomise
from reuse_support import LAYERS, Decoder, counts, one_token, overwrite, parameters

from dorafx import rewrite_log


class Adapters:
    """A model of two adapters, compiled so that graphs may break where PEFT takes another path."""

    def __init__(self, rank: int = 4) -> None:
        self.model: Any = peft_perceptron()
        config = lora_config(target_modules=["first", "second"], task_type=None, r=rank)
        self.model.add_adapter("other", config)
        randomise(self.model, 5)
        options = {"dorafx.codegen": "eager", "dorafx.strict": True}
        self.compiled = torch.compile(self.model, backend="dorafx", options=options)

    def check(self) -> None:
        """Three steps; the last two reuse what the first computed, or found."""
        for step in range(3):
            before = counts()
            with torch.no_grad():
                assert_close(self.compiled(one_token()), self.model(one_token()), 1e-5)
            if step:
                assert counts() == (before[0], before[1] + LAYERS)


def test_adapters_added_switched_deleted() -> None:
    model = peft_perceptron()
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True})

    def check() -> None:
        with torch.no_grad():
            for _ in range(2):
                assert_close(compiled(one_token()), model(one_token()), 1e-5)

    check()
    model.add_adapter("other", lora_config(target_modules=["first", "second"], task_type=None, r=3))
    randomise(model, 5)
    check()
    model.set_adapter("other")
    check()
    model.set_adapter("default")
    check()
    model.delete_adapter("other")
    check()
    assert rewrite_log().norms.reused >= 5 * LAYERS


def test_switching_back_finds_the_norms_again_unless_they_changed() -> None:
    """An adapter that is not active may be written, too."""
    adapters = Adapters()
    adapters.check()
    adapters.model.set_adapter("other")
    adapters.check()
    computed = counts()[0]
    adapters.model.set_adapter("default")
    adapters.check()
    assert counts()[0] == computed
    for name, p in adapters.model.named_parameters():
        if ".other" in name:
            overwrite(p)
    adapters.model.set_adapter("other")
    adapters.check()
    assert counts()[0] == computed + LAYERS


@pytest.mark.default_cases("linear")
@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_add_weighted_adapter(kind: str) -> None:
    """A combination made, deleted and made again of the same name from other weights."""
    adapters = Adapters()
    adapters.check()
    for weights in ([0.7, 0.3], [-0.2, 1.4]):
        adapters.model.add_weighted_adapter(["default", "other"], weights, "mixed", combination_type=kind)
        adapters.model.set_adapter("mixed")
        adapters.check()
        adapters.model.set_adapter("default")
        adapters.model.delete_adapter("mixed")
        adapters.check()


def test_weighted_adapter_written_into_one_that_is_there() -> None:
    """``p.data[...] = …`` into factors that a norm was computed from."""
    adapters = Adapters()
    adapters.check()
    adapters.model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mixed", combination_type="cat")
    adapters.model.set_adapter("mixed")
    adapters.check()
    for name, p in adapters.model.named_parameters():
        if "lora_A.mixed" in name or "lora_B.mixed" in name:
            p.data[:] = p.data * 1.5
    adapters.check()


def test_delete_the_adapter_in_use() -> None:
    adapters = Adapters()
    adapters.model.set_adapter("other")
    adapters.check()
    adapters.model.delete_adapter("other")
    adapters.model.set_adapter("default")
    adapters.check()


def test_merged_and_unmerged() -> None:
    """Merged, a layer is a plain linear; unmerged, its weight is what it was up to rounding, in other memory."""
    decoder = Decoder().warm()
    for _ in range(2):
        decoder.model.merge_adapter()
        decoder.step()
        decoder.step()
        decoder.model.unmerge_adapter()
        computed = counts()[0]
        decoder.step()
        assert counts()[0] == computed + LAYERS
        decoder.step()


def test_written_while_merged() -> None:
    decoder = Decoder().warm()
    decoder.model.merge_adapter()
    decoder.step()
    decoder.model.unmerge_adapter()
    for p in parameters(decoder.model):
        overwrite(p)
    decoder.step()
    decoder.step()
