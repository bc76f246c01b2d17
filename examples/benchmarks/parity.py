"""Does training with dorafx go where training with stock PEFT goes? Losses of every step, for several seeds.

    python examples/benchmarks/parity.py --out examples/benchmarks/results/cpu-parity.json

For each seed a Llama-shaped model is trained on the first half of a text, and then fine-tuned with DoRA on the second half,
twice from the same state: by stock PEFT, eagerly, and by dorafx. Each run is a process of its own. With ``--control`` stock PEFT
does it once more with another number of threads, which adds in another order: what it differs by is what rounding alone does. The text is the language
reference that ships with Python (``pydoc_data.topics``), by bytes. Writes the losses as JSON, and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dorafx.bench.environment import describe_environment
from dorafx.bench.processes import PEFT, run_job

LIMIT = 7.1e-4
"""Mean difference of the losses of a step that arXiv:2603.22276 reports between its factored norm and PEFT's."""

BATCH, LENGTH = 2, 64


def corpus() -> torch.Tensor:
    """The text as bytes, ``[bytes]``."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(text.encode()))


def batches(text: torch.Tensor, steps: int, seed: int) -> list[torch.Tensor]:
    """``[BATCH, LENGTH]`` pieces of the text from random places, the same for every run of a seed."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(text) - LENGTH, (steps, BATCH), generator=generator)
    return [torch.stack([text[start : start + LENGTH] for start in row.tolist()]) for row in starts]


def base_model(hidden: int, layers: int, seed: int) -> Any:
    """A Llama-shaped model with random weights, fp32: the base model is trained so, whatever it is fine-tuned in."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def train(model: Any, data: list[torch.Tensor], rate: float, report: Callable[[str], None]) -> list[float]:
    """Train with AdamW, its rate warmed up over a twentieth of the steps and linear from there to nothing; the loss of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    warm = max(1, len(data) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (len(data) - step) / (len(data) - warm + 1))
    )
    losses = []
    model.train()
    for step, ids in enumerate(data):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if step % 100 == 99:
            report(f"step {step + 1}: loss {losses[-1]:.3f}")
    return losses


def job(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """One run: ``base`` trains the base model and saves it; ``stock``, ``control`` and ``dorafx`` fine-tune what it saved."""
    torch.set_num_threads(request["threads"] + (request["run"] == "control"))
    seed, text = request["seed"], corpus()
    model = base_model(request["hidden"], request["layers"], seed)
    half = len(text) // 2
    if request["run"] == "base":
        losses = train(model, batches(text[:half], request["base_steps"], seed), 1e-3, report)
        torch.save(model.state_dict(), request["state"])
        return {"losses": losses, "parameters": sum(p.numel() for p in model.parameters())}
    from peft import LoraConfig, get_peft_model

    model.load_state_dict(torch.load(request["state"], weights_only=True))
    torch.manual_seed(seed)
    adapter = LoraConfig(
        r=request["rank"],
        lora_alpha=2 * request["rank"],
        use_dora=True,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model.to(getattr(torch, request["dtype"])), adapter)
    rewritten = 0
    if request["run"] == "dorafx":
        import dorafx

        dorafx.optimize(model, strict=True)
    losses = train(model, batches(text[half:], request["steps"], seed + 1000), request["rate"], report)
    if request["run"] == "dorafx":
        rewritten = len({record.site for record in dorafx.rewrite_log().rewrites})
        if rewritten != 7 * request["layers"]:
            raise RuntimeError(f"{rewritten} of {7 * request['layers']} layers were rewritten")
    return {"losses": losses, "rewritten": rewritten}


def difference(stock: list[float], ours: list[float]) -> dict[str, float]:
    """Mean and largest absolute difference of the losses of a step, and of the last hundred steps' mean losses."""
    apart = [abs(a - b) for a, b in zip(stock, ours)]
    tail = -min(100, len(stock))
    return {
        "mean": statistics.fmean(apart),
        "largest": max(apart),
        "of the end": abs(statistics.fmean(stock[tail:]) - statistics.fmean(ours[tail:])),
    }


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All runs of all seeds; after each, what is written as JSON of those that are done."""
    seeds: list[dict[str, Any]] = []
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "seeds", "plot")}
    environment = describe_environment("cpu", options.threads)
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            request = {**settings, "seed": seed, "state": str(Path(folder) / "base.pt")}
            results = {}
            for name in ("base", "stock", "dorafx", *(["control"] if options.control else [])):

                def said(what: str, name: str = name, seed: int = seed) -> None:
                    print(f"seed {seed}, {name}: {what}", flush=True)

                results[name] = run_job(job, {**request, "run": name}, said, preload=PEFT)
        stock, ours = results["stock"]["losses"], results["dorafx"]["losses"]
        seeds.append(
            {
                "seed": seed,
                "parameters": results["base"]["parameters"],
                "rewritten": results["dorafx"]["rewritten"],
                "difference": difference(stock, ours),
                "stock": stock,
                "dorafx": ours,
            }
        )
        if options.control:
            seeds[-1]["control"] = difference(stock, results["control"]["losses"])
            print(f"seed {seed}: stock PEFT from itself {seeds[-1]['control']}", flush=True)
        print(f"seed {seed}: differences {seeds[-1]['difference']}", flush=True)
        mean = statistics.fmean(done["difference"]["mean"] for done in seeds)
        yield {"environment": environment, "settings": settings, "mean": mean, "limit": LIMIT, "seeds": seeds}


def plot(document: dict[str, Any], path: Path) -> None:
    """A column for each seed: above the losses of both, means over 50 steps; below how far the losses of a step are apart, the largest of
    50 steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    seeds = document["seeds"]
    figure = Figure(figsize=(max(3.4 * len(seeds), 5), 5), layout="constrained")
    axes = figure.subplots(2, len(seeds), sharex=True, sharey="row", squeeze=False)
    for seed, losses, apart in zip(seeds, axes[0], axes[1]):
        count = len(seed["stock"])
        size = min(50, max(1, count // 10))
        starts = range(0, count - count % size, size)
        steps = [start + size / 2 for start in starts]
        stock, ours = (
            [statistics.fmean(seed[run][start : start + size]) for start in starts] for run in ("stock", "dorafx")
        )
        # Okabe and Ito's colours (2008), as in the plots of dorafx bench; the lines differ in width and marks, too.
        losses.plot(steps, stock, color="#d55e00", linewidth=5, alpha=0.5, label="stock PEFT")
        losses.plot(steps, ours, color="#0072b2", linewidth=1.2, marker="o", markersize=3, label="dorafx")
        losses.set_title(f"seed {seed['seed']}", loc="left", fontsize=9)
        differences = [abs(a - b) for a, b in zip(seed["stock"], seed["dorafx"])]
        largest = [max(max(differences[start : start + size]), 1e-9) for start in starts]
        apart.plot(steps, largest, color="black", linewidth=1, marker=".", markersize=4, label="measured")
        apart.axhline(LIMIT, color="#d55e00", linestyle="--", linewidth=1.5, label=f"limit, {LIMIT:g}")
        apart.set_yscale("log")
        apart.yaxis.set_minor_locator(NullLocator())
        apart.set_xlabel("step", fontsize=8)
        for axis in (losses, apart):
            axis.tick_params(labelsize=7)
            axis.grid(color="#dddddd", linewidth=0.5)
    axes[0][0].set_ylabel("loss (nats a byte),\nmeans of 50 steps", fontsize=8)
    axes[1][0].set_ylabel("difference of a step's losses,\nlargest of 50 steps", fontsize=8)
    axes[0][0].legend(fontsize=8)
    axes[1][0].legend(fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="DoRA steps (default 2000)")
    parser.add_argument("--base-steps", type=int, default=300, help="steps of the base model before (default 300)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=1e-4, help="peak learning rate of DoRA (default 1e-4)")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the frozen weights; PEFT keeps the adapters in fp32 (default float32)",
    )
    parser.add_argument(
        "--control", action="store_true", help="also compare stock PEFT with itself, on one thread more"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path("parity.json"), help="the JSON file; the plot is .png beside it"
    )
    parser.add_argument("--plot", type=Path, help="only draw the plot of this JSON file, beside it")
    options = parser.parse_args()
    if options.plot is not None:
        plot(json.loads(options.plot.read_text(encoding="utf-8")), options.plot.with_suffix(".png"))
        print(f"{options.plot.with_suffix('.png')} is written")
        return 0
    for document in run(options):
        options.out.write_text(json.dumps(document) + "\n", encoding="utf-8")
        plot(document, options.out.with_suffix(".png"))
    print(f"mean difference {document['mean']:.2e} (limit {LIMIT:g}); {options.out} and its plot are written")
    return 0 if document["mean"] < LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
