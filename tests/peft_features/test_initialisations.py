"""How factors are initialised: before `optimize`, and again in a compiled model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import assert_close, base_model, lora_config, tokens
from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraGAConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft_features import Twin, Way, feature, layers, output, perturb

SECTION = "Initialisations"
TARGETS = ["q_proj", "up_proj"]


def _off_the_norm(model: Any) -> Any:
    """Magnitudes away from the norms; the factors stay as they were initialised."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude_vector" in name:
                p.mul_(1 + 0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def _by_name(name: Any) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(3)
        config = lora_config(target_modules=["first", "second"], task_type=None, init_lora_weights=name)
        return _off_the_norm(get_peft_model(layers(), config))

    return build


def _trained_on(twin: Twin) -> None:
    """What a step makes of the initial factors, and what is kept of their norms."""
    for start in ("token", "training"):
        twin.do(lambda m: perturb(m, seed=6))
        twin.check(start)
    twin.rewritten()


@feature(
    SECTION,
    "DoRA at its initialisation",
    "works",
    "B is zero and the magnitude is the norm, so the model is the base model: on a CPU to the last bit of fp32, as in stock PEFT. On a "
    "GPU, and where Inductor compiles convolutions, to a few units in the last place of the largest output: sums are taken in another order.",
)
def test_identity(way: Way) -> None:
    def build() -> Any:
        return get_peft_model(layers(), lora_config(target_modules=["first", "second"], task_type=None)).eval()

    twin = Twin(way, build, tolerance=5e-7).warm()
    with torch.no_grad():
        base = layers()
        for shape in ((1, 1), (3, 5)):
            exact = 0 if way.codegen == "eager" else 5e-7  # Inductor computes what is between the layers in another way
            assert_close(output(twin.call, twin.model, *shape), output(base, twin.model, *shape), exact)


@feature(
    SECTION,
    'PiSSA (`"pissa"`, `"pissa_niter_4"`), OLoRA (`"olora"`), orthogonal, Gaussian',
    "works",
    "PiSSA and OLoRA subtract the factors' product from the base weight; the norm is of the sum again.",
)
def test_by_name(way: Way) -> None:
    for name in ("pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian"):
        twin = Twin(way, _by_name(name), tolerance=5e-5)
        twin.outputs(1, 1)
        twin.outputs(3, 5)
        twin.training()
        twin.do(lambda m: perturb(m, seed=6))
        twin.outputs(1, 1)
        twin.rewritten()


@feature(
    SECTION,
    "PiSSA or OLoRA of a second adapter, after compiling",
    "works",
    "It also changes the base weight of the first adapter (`p.data = …`), which the next forward uses.",
)
def test_second_by_name(way: Way) -> None:
    twin = Twin(way, _by_name(True), tolerance=5e-5)
    twin.warm()
    for name in ("olora", "pissa"):

        def more(m: Any, name: str = name) -> None:
            m.add_adapter(
                name, lora_config(target_modules=["first", "second"], task_type=None, init_lora_weights=name, r=3)
            )
            _off_the_norm(m)

        refused = twin.refused(lambda m, _, more=more: more(m))
        assert refused is None, refused
        twin.outputs(1, 1)
        twin.outputs(3, 5)
        twin.do(lambda m, name=name: m.set_adapter(name))
        twin.check()
        twin.do(lambda m: m.set_adapter("default"))
        twin.outputs(1, 1)


def _data() -> list[dict[str, torch.Tensor]]:
    return [
        {"input_ids": tokens(4, 9, seed), "attention_mask": torch.ones(4, 9, dtype=torch.long)} for seed in range(3)
    ]


@pytest.mark.slow
@feature(
    SECTION,
    "EVA (`initialize_lora_eva_weights`)",
    "works",
    'Before compiling. After it, under `torch.compiler.set_stance("force_eager")`: its hooks would be compiled with the layers, which takes '
    "minutes. It may change ranks.",
)
def test_eva(way: Way) -> None:
    def build() -> Any:
        torch.manual_seed(3)
        config = lora_config(
            target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0), r=4, task_type="CAUSAL_LM"
        )
        return _off_the_norm(get_peft_model(base_model("llama", 1), config))

    def initialised(m: Any) -> None:
        with torch.compiler.set_stance("force_eager"):
            initialize_lora_eva_weights(m, dataloader=_data(), show_progress_bar=False)
        _off_the_norm(m)

    def before() -> Any:
        model = build()
        torch.manual_seed(4)
        initialised(model)
        return model

    _trained_on(Twin(way, before).warm())
    twin = Twin(way, build).warm()
    twin.do(initialised)
    _same_factors_up_to_sign(twin)
    twin.check()
    _trained_on(twin)


def _same_factors_up_to_sign(twin: Twin) -> None:
    """A singular vector has no sign; both models get stock PEFT's."""
    for (name, p), (_, q) in zip(twin.stock.named_parameters(), twin.model.named_parameters()):
        assert p.shape == q.shape, name
        if "lora_A" in name:
            assert_close(q.detach().abs(), p.detach().abs(), 1e-2, name)
    twin.model.load_state_dict(twin.stock.state_dict())


@feature(
    SECTION,
    "CorDA (`preprocess_corda`)",
    "works",
    "It runs before there is an adapter, so before compiling.",
)
def test_corda(way: Way) -> None:
    def build() -> Any:
        model = base_model("llama", 1)
        config = lora_config(
            target_modules=TARGETS,
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method="kpm"),
            task_type="CAUSAL_LM",
        )

        def run() -> None:
            with torch.no_grad():
                for batch in _data():
                    model(batch["input_ids"][:1])  # its covariances are of batches of one

        preprocess_corda(model, config, run_model=run)
        return _off_the_norm(get_peft_model(model, config))

    _trained_on(Twin(way, build, tolerance=5e-5).warm())


@feature(
    SECTION,
    "LoRA-GA (`preprocess_loraga`)",
    "works",
    "As CorDA, from the gradients of training steps.",
)
def test_lora_ga(way: Way) -> None:
    def build() -> Any:
        model = base_model("llama", 1)
        config = lora_config(
            target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), task_type="CAUSAL_LM"
        )

        def step() -> None:
            for batch in _data():
                model(**batch, labels=batch["input_ids"]).loss.backward()

        torch.manual_seed(2)
        preprocess_loraga(model, config, step)
        torch.manual_seed(2)
        return _off_the_norm(get_peft_model(model, config))

    _trained_on(Twin(way, build, tolerance=5e-5).warm())


@pytest.mark.parametrize("width", [64, 300])
def test_how_far_the_identity_is_off(width: int) -> None:
    """Where the norm has an algorithm of its own, too (from 256 x 256 on)."""
    import dorafx

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(width, width))
    x = torch.randn(64, width)
    with torch.no_grad():
        expected = base(x)
        model = get_peft_model(base, lora_config(target_modules=["0"], task_type=None)).eval()
        dorafx.optimize(model, codegen="eager", strict=True)
        assert_close(model(x), expected, 4e-7)
