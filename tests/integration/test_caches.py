"""Inductor's caches across processes: warm for the same program, never stale for another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# One compilation, forward and backward, compared with stock eager. Options: what goes to torch.compile, and a digest to
# put in the place of that of dorafx's sources.
PROGRAM = """
import json, sys
import torch
from torch._dynamo.utils import counters
from integration_support import call, dora_sites, peft_perceptron, run
from dorafx import rewrite_log
from dorafx._compat import inductor

settings = json.loads(sys.argv[1])
if settings["source_hash"]:
    inductor.source_hash = lambda: settings["source_hash"]
model = peft_perceptron().train()
expected = run(model, lambda: call(model, model))
found = []
for options in settings["options"]:
    torch._dynamo.reset()
    counters.clear()
    rewrite_log().clear()
    compiled = torch.compile(model, backend="dorafx", fullgraph=True, options={"dorafx.strict": True, **options})
    actual = run(model, lambda: call(compiled, model))
    error = max(
        [(actual.output - expected.output).abs().max().item()]
        + [(actual.gradients[n] - g).abs().max().item() / g.abs().max().item() for n, g in expected.gradients.items()]
    )
    found.append({
        "error": error,
        "aot": {k: v for k, v in counters["aot_autograd"].items() if "cache" in k},
        "inductor": {k: v for k, v in counters["inductor"].items() if "fxgraph_cache" in k},
        "sites": sorted(r.site for r in rewrite_log().rewrites),
        "algorithms": sorted({r.norm_algorithm for r in rewrite_log().rewrites}),
        "expected_sites": dora_sites(model),
    })
print("RESULT" + json.dumps(found))
"""


def _process(cache: Path, *options: dict[str, Any], source_hash: str = "") -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[1] / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    settings = json.dumps({"options": list(options) or [{}], "source_hash": source_hash})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, settings], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.rsplit("RESULT", 1)[1])
    for result in results:
        assert result["error"] <= 1e-5
        assert result["sites"] == result["expected_sites"], "the log of a warm start is as complete as of a cold one"
    return results


@pytest.fixture(scope="module")
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that one process has filled."""
    folder = tmp_path_factory.mktemp("inductor")
    (cold,) = _process(folder)
    assert cold["aot"] == {"autograd_cache_miss": 1, "autograd_cache_saved": 1}
    assert not cold["inductor"].get("fxgraph_cache_hit")
    assert not cold["inductor"].get("fxgraph_cache_bypass")
    return folder


def test_second_process_hits_both_caches(warm_cache: Path) -> None:
    (warm,) = _process(warm_cache)
    assert warm["aot"] == {"autograd_cache_hit": 1}
    # Forward and backward both.
    assert warm["inductor"]["fxgraph_cache_hit"] == 2
    assert not warm["inductor"].get("fxgraph_cache_miss")


def test_changed_sources_miss_both_caches(warm_cache: Path) -> None:
    """The caches cannot see that an operator's backward or decomposition was edited."""
    (edited,) = _process(warm_cache, source_hash="edited since")
    assert not edited["aot"].get("autograd_cache_hit")
    assert edited["aot"]["autograd_cache_miss"] == 1
    assert not edited["inductor"].get("fxgraph_cache_hit")


def test_changed_options_are_never_stale(warm_cache: Path) -> None:
    """The norm's algorithm is the prologue's affair; how the low-rank product is added changes the graph itself."""
    other = {"dorafx.norm": "factored", "dorafx.compose": "epilogue"}
    options = [other, {"dorafx.norm": "tiled", "dorafx.compose": "accumulated"}, other]
    factored, tiled, again = _process(warm_cache, *options)
    assert [r["algorithms"] for r in (factored, tiled, again)] == [["factored"], ["tiled"], ["factored"]]
    assert factored["aot"].get("autograd_cache_miss") == 1
    # The second is what the first process chose by itself, and the third was compiled a moment ago.
    assert tiled["aot"] == again["aot"] == {"autograd_cache_hit": 1}
