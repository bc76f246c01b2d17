"""Other people's DoRA from a folder: found by the files that only they have, and run in the place of the installed PEFT."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dorafx.bench import norms
from dorafx.bench.peers import find_peers, use_peer
from dorafx.errors import DorafxError

_KERNEL = """
from .quantize import dequantize

def triton_dora_scale(W, W_quant, A, B, s, magnitude, dtype):
    dense = dequantize(W.t(), W_quant).t().contiguous().to(dtype)
    return magnitude / (dense + s * (B @ A)).norm(dim=1)
"""


def fork(folder: Path) -> Path:
    """The installed PEFT under another path, with the file by which the fork is known."""
    import peft

    installed = Path(peft.__file__).parent
    place = folder / "vendor" / "some-peft" / "src" / "peft"
    for level in (".", "tuners", "tuners/lora"):
        (place / level).mkdir(parents=True)
        for entry in (installed / level).iterdir():
            if entry.name not in ("tuners", "lora", "__pycache__") or level == "tuners/lora":
                (place / level / entry.name).symlink_to(entry)
    (place / "tuners" / "lora" / "dora_fused.py").write_text("")
    return place.parent


def axolotl(folder: Path) -> Path:
    place = folder / "src" / "axolotl" / "kernels"
    place.mkdir(parents=True)
    (place / "dora.py").write_text(_KERNEL)
    return folder / "src"


def test_they_are_found_there_and_below(tmp_path: Path) -> None:
    there, other = fork(tmp_path / "a"), axolotl(tmp_path / "b")
    assert find_peers([tmp_path / "a", tmp_path / "b"]) == {"paper": there, "axolotl": other}
    assert find_peers([there, other]) == {"paper": there, "axolotl": other}
    assert find_peers([tmp_path]) == {"axolotl": other}  # a folder of checkouts; the fork lies deeper
    assert find_peers([]) == {}
    with pytest.raises(ValueError, match=r"has neither peft/tuners/lora/dora_fused\.py nor axolotl/kernels/dora\.py"):
        find_peers([tmp_path / "a" / "vendor" / "some-peft" / "src" / "peft"])


_RUN = """
import sys
from pathlib import Path
from dorafx.bench.worker import configuration
where = Path(sys.argv[1])
size = {"hidden": 64, "layers": 1, "rank": 4, "tokens": 8}
answer = configuration(
    {"name": "paper", "suite": "regime", "parameters": {"size": size}, "peer": str(where), "dtype": "bfloat16", "device": "cpu",
     "seconds": 0.0, "threads": 1, "mode": "default", "codegen": "inductor", "compose": "auto", "scope": "model",
     "checkpointing": False, "micro_batches": 1, "autocast": False},
    lambda what: None,
)
import peft
assert Path(peft.__file__).is_relative_to(where), peft.__file__
assert set(answer["figures"]) == {"prefill", "training step", "peak"}
assert "dorafx.backend" not in sys.modules
"""


@pytest.mark.slow
def test_the_fork_takes_the_place_of_peft(tmp_path: Path) -> None:
    where = fork(tmp_path)
    subprocess.run([sys.executable, "-c", _RUN, str(where)], check=True)


def test_it_must_come_first(tmp_path: Path) -> None:
    import peft  # noqa: F401

    with pytest.raises(DorafxError, match="another PEFT is imported in this process already"):
        use_peer("paper", fork(tmp_path))


def test_the_kernel_of_the_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "NORMS", norms.NORMS)
    monkeypatch.setitem(norms.NORMS, "axolotl", norms.dense)  # so that it is taken out again
    for name in ("axolotl_kernels", "axolotl_kernels.quantize", "axolotl_kernels.dora"):
        monkeypatch.setitem(sys.modules, name, None)
    use_peer("axolotl", axolotl(tmp_path))
    assert norms.NORMS["axolotl"] is not norms.dense
    weight, left, right = torch.randn(6, 9), torch.randn(6, 2), torch.randn(2, 9)
    torch.testing.assert_close(norms.NORMS["axolotl"](weight, left, right, 0.7), norms.dense(weight, left, right, 0.7))


def test_a_kernel_that_cannot_be_used_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("axolotl_kernels", "axolotl_kernels.quantize", "axolotl_kernels.dora"):
        monkeypatch.setitem(sys.modules, name, None)
    where = axolotl(tmp_path)
    (where / "axolotl" / "kernels" / "dora.py").write_text("import nothing_of_this_name")
    with pytest.raises(
        DorafxError, match=r"dora.py cannot be used: ModuleNotFoundError: No module named 'nothing_of_this"
    ):
        use_peer("axolotl", where)
