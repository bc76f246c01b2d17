"""What becomes of the DoRA layers of published packages. The slow tests hold each line to what they measure, and the page is made of it."""

from __future__ import annotations

from dataclasses import dataclass

WHOLE_LINEAR, WHOLE_COLUMNS, WHOLE_CONVOLUTION = "linear", "linear_columns", "convolution"
HADAMARD = "product of two low-rank products, element by element"
KRONECKER = "Kronecker product"


@dataclass(frozen=True)
class Expected:
    """A layer of a package.

    Attributes:
        spelling: how the package writes it.
        patterns: the forms by which it is rewritten whole; none where it is left alone.
        miss: a part of the reason in the log where it is left alone.
    """

    spelling: str
    patterns: tuple[str, ...] = ()
    miss: str = ""


@dataclass(frozen=True)
class Package:
    """A package as it is in the registry.

    Attributes:
        requirements: what ``pip install --no-deps`` puts beside the test environment: the package, and what it needs in other
            versions than the environment has.
        worker: the file that measures its layers.
        layers: by the name that the worker gives them.
    """

    name: str
    requirements: tuple[str, ...]
    worker: str
    layers: dict[str, Expected]


_DELTA = "weight delta: `base(x) + op(x, m·(W+ΔW)/n - W)`"
_PEFT = "norm of `W + s·(lora_B(lora_A(I)))ᵀ`, `(m/n - 1)·xWᵀ + m/n·s·xAᵀBᵀ`"


def _lycoris() -> dict[str, Expected]:
    layers = {}
    for base in ("linear", "conv1d", "conv2d", "conv3d"):
        for norm in ("output", "input"):
            form = (WHOLE_COLUMNS if norm == "input" else WHOLE_LINEAR) if base == "linear" else WHOLE_CONVOLUTION
            layers[f"LoCon {base}, norm by {norm}"] = Expected(_DELTA, (form,))
            layers[f"LoHa {base}, norm by {norm}"] = Expected(
                f"{_DELTA}, ΔW a {HADAMARD}", miss="between the low-rank product and the norm|makes the delta"
            )
            layers[f"LoKr {base}, norm by {norm}"] = Expected(f"{_DELTA}, ΔW a {KRONECKER}", miss="operator kron")
    layers["LoCon conv2d, Tucker core"] = Expected(f"{_DELTA}, ΔW by `einsum` of a core", (WHOLE_CONVOLUTION,))
    layers["LoCon linear, multiplier 0.7, scalar"] = Expected(
        "the same with `t·(m/n - 1) + 1` for `m/n`, and a scalar buffer", (WHOLE_LINEAR,)
    )
    layers["LoCon linear, rank dropout"] = Expected(f"{_DELTA}, a mask on the rows of `A`", (WHOLE_LINEAR,))
    return layers


PACKAGES = (
    Package("LyCORIS 4.1.3", ("lycoris-lora==4.1.3", "toml==0.10.2"), "worker_lycoris.py", _lycoris()),
    Package(
        "adapters 1.3.0",
        ("adapters==1.3.0", "transformers==4.57.6", "tokenizers==0.22.2", "huggingface-hub==0.36.2"),
        "worker_adapters.py",
        dict.fromkeys(
            (
                "Llama, q and v",
                "Llama, q, k, v and the MLP",
                "BERT, q and v",
                "BERT, q, v and the MLP, dropout",
            ),
            Expected("norm of `W + B·A·s`, `m.weight.view(-1)/n·(xWᵀ + s·xAᵀBᵀ)`", (WHOLE_LINEAR,)),
        ),
    ),
    Package(
        "torchtune 0.6.1",
        (
            "torchtune==0.6.1",
            "torchao==0.15.0",  # the last with the NF4 tensors that torchtune imports
            "omegaconf==2.4.0",
            "sentencepiece==0.2.3",
            "tiktoken==0.14.0",
        ),
        "worker_torchtune.py",
        {
            "DoRALinear": Expected(_PEFT, (WHOLE_LINEAR,)),
            "DoRALinear with bias": Expected(_PEFT, (WHOLE_LINEAR,)),
            "DoRALinear with dropout": Expected(_PEFT, (WHOLE_LINEAR,)),
            "a block of lora_llama3, use_dora": Expected(_PEFT, (WHOLE_LINEAR,)),
            "DoRALinear, base in NF4": Expected(f"{_PEFT}, `W` dequantised twice by a cast", (WHOLE_LINEAR,)),
        },
    ),
    Package(
        "NeMo Automodel 0.7.0",
        ("nemo-automodel==0.7.0",),
        "worker_nemo.py",
        {
            "LinearLoRA": Expected(_PEFT, (WHOLE_LINEAR,)),
            "LinearLoRA without bias": Expected(_PEFT, (WHOLE_LINEAR,)),
            "LinearLoRA, dropout before the factors": Expected(
                f"{_PEFT}, the base product of the dropped input in training", ("linear_dropout", WHOLE_LINEAR)
            ),
            "LinearLoRA, dropout after the factors": Expected(f"{_PEFT}, dropout of `xAᵀBᵀ`", (WHOLE_LINEAR,)),
            "a model patched by patch_linear_module": Expected(_PEFT, (WHOLE_LINEAR,)),
        },
    ),
)
