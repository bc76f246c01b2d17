"""What is said of versions is said alike everywhere; a version that nobody tested is announced, and dorafx tests itself there."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_support import peft_perceptron
from packaging.requirements import Requirement
from packaging.version import Version

import dorafx
from dorafx import self_check, versions
from dorafx.graphs import operators
from dorafx.self_check import announce_untested_versions, check_recognition
from dorafx.versions import PYTHON, VERSIONS, minor

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
REQUIRED = [
    Requirement(text)
    for texts in (PROJECT["project"]["dependencies"], PROJECT["project"]["optional-dependencies"]["peft"])
    for text in texts
]


@pytest.mark.parametrize("name", ["torch", "peft", "transformers"])
def test_requirements_have_the_minimum_and_no_upper_bound(name: str) -> None:
    (required,) = [r for r in REQUIRED if r.name == name]
    assert str(required.specifier) == f">={VERSIONS[name].minimum}"


def test_the_pinned_versions_are_tested_ones() -> None:
    pinned = {r.name: r for r in map(Requirement, PROJECT["project"]["optional-dependencies"]["test"])}
    for name, known in VERSIONS.items():
        (version,) = [s.version for s in pinned[name].specifier]
        assert version in known.tested


def test_the_matrix_runs_the_oldest_and_the_newest() -> None:
    environments = PROJECT["tool"]["tox"]["env"]
    runs = [
        {r.name: str(r.specifier) for r in map(Requirement, e["deps"])} for e in environments.values() if "deps" in e
    ]
    pinned = {r.name: str(r.specifier) for r in map(Requirement, PROJECT["project"]["optional-dependencies"]["test"])}
    assert {run["torch"].removeprefix("==") for run in (*runs, pinned)} == set(VERSIONS["torch"].tested)
    assert {e["base_python"][0].removeprefix("python") for e in environments.values()} == set(PYTHON)


def test_readme_guide_and_classifiers_agree() -> None:
    """README says what is needed, the guide also what was tested."""
    prefix = "Programming Language :: Python :: 3."
    named = [
        c.removeprefix("Programming Language :: Python :: ") for c in PROJECT["project"]["classifiers"] if prefix in c
    ]
    assert tuple(named) == PYTHON
    assert PROJECT["project"]["requires-python"] == f">={PYTHON[0]}"
    readme, page = (
        " ".join((ROOT / path).read_text(encoding="utf-8").split())
        for path in ("README.md", "examples/guide/versions.md")
    )
    packages = {name: VERSIONS[name.lower()] for name in ("torch", "PEFT", "transformers")}
    needed = ", ".join(f"{name} {known.minimum} or newer" for name, known in packages.items())
    for text in (readme, page):
        assert f"Python {PYTHON[0]} to {PYTHON[-1]}, {needed}" in text
    for name, known in packages.items():
        assert f"{name} {known.range}" in page, name


def test_order_and_parts() -> None:
    for known in VERSIONS.values():
        assert [Version(v) for v in known.tested] == sorted(map(Version, known.tested))
        assert minor(known.minimum) <= minor(known.tested[0])
    assert [minor(v) for v in ("2.13.0+cpu", "2.12rc1", "5", "x")] == [(2, 13), (2, 12), (5, 0), (0, 0)]
    known = versions.Versions("2.11", ("2.11.0", "2.15.0"))
    assert known.range == "2.11 to 2.15"
    assert [known.is_too_old(v) for v in ("2.10.1", "2.11rc1")] == [True, False]
    assert [known.is_untested(v) for v in ("2.15.3+cu130", "2.16.0", "3")] == [False, True, True]


def test_this_installation_is_a_tested_one() -> None:
    assert minor(torch.__version__) in [minor(v) for v in VERSIONS["torch"].tested]
    assert not VERSIONS["peft"].is_untested(importlib.metadata.version("peft"))


def test_the_canonical_layer_is_recognised() -> None:
    before = torch.get_rng_state()
    assert check_recognition() == self_check.SelfCheck(True)
    assert torch.equal(torch.get_rng_state(), before)
    assert not dorafx.rewrite_log().records


@pytest.fixture
def untested_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch that is installed is newer than what was tested, and no graph was compiled yet."""
    old = dataclasses.replace(VERSIONS["torch"], tested=("2.9.0", "2.10.0"))
    monkeypatch.setitem(VERSIONS, "torch", old)
    monkeypatch.setattr(self_check, "_announced", False)


def forget_transposes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a release of torch does that renames an operator which nothing tells of any more."""
    monkeypatch.setattr(operators, "_looked_up", lambda node: None)
    monkeypatch.setattr(
        operators, "_FUNCTIONS", {f: n for f, n in operators._FUNCTIONS.items() if n not in ("getattr", "t")}
    )
    monkeypatch.setattr(
        operators, "_BY_NAME", {f: n for f, n in operators._BY_NAME.items() if n not in ("getattr", "t")}
    )


def warnings_of_two_graphs() -> list[str]:
    model, x = peft_perceptron(), torch.randn(3, 24)
    wanted = model(x)
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for tokens in (x, torch.randn(5, 7, 24)):
            got = compiled(tokens)
        torch.testing.assert_close(compiled(x), wanted)
    assert got.shape[:2] == (5, 7)
    return [str(w.message) for w in caught if issubclass(w.category, dorafx.DorafxWarning)]


@pytest.mark.usefixtures("untested_torch")
def test_an_untested_torch_is_announced_once() -> None:
    (said,) = warnings_of_two_graphs()
    assert (
        f"torch {torch.__version__.partition('+')[0]} (2.9 to 2.10); a test layer is rewritten as it should be" in said
    )
    assert said in dorafx.rewrite_log().notes
    assert dorafx.rewrite_log().rewrites
    assert all(r.site for r in dorafx.rewrite_log().records)  # none of the self-check's own


@pytest.mark.usefixtures("untested_torch")
def test_an_operator_under_a_new_name_announces_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_transposes(monkeypatch)
    (said,) = warnings_of_two_graphs()
    assert "a test layer is not rewritten (" in said
    assert "stands between the low-rank product and the norm" in said
    assert f"install torch {VERSIONS['torch'].tested[-1]} or a newer dorafx" in said
    assert not dorafx.rewrite_log().rewrites


@pytest.mark.usefixtures("untested_torch")
def test_a_self_check_that_fails_does_not_stop_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise AttributeError("nothing is where it was")

    monkeypatch.setattr(self_check, "layer", broken)
    (said,) = warnings_of_two_graphs()
    assert "a test layer is not rewritten (it fails: " in said
    assert dorafx.rewrite_log().rewrites


def test_a_tested_torch_is_not_tested_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "_announced", False)
    monkeypatch.setattr(self_check, "check_recognition", lambda: pytest.fail("the self-check ran"))
    announce_untested_versions()
    assert warnings_of_two_graphs() == []


def test_the_doctor_says_what_is_untested_and_fails_for_what_is_not_recognised(
    monkeypatch: pytest.MonkeyPatch, untested_torch: None
) -> None:
    from dorafx.cli import doctor

    line = doctor._version("torch")
    assert line.passed
    assert line.detail.endswith("newer than tests ran with 2.9 to 2.10")
    assert doctor._recognition().passed
    forget_transposes(monkeypatch)
    failed = doctor._recognition()
    assert not failed.passed
    assert "stands between" in failed.detail
    monkeypatch.setitem(VERSIONS, "torch", versions.Versions("9.0", ("9.0.0",)))
    assert not doctor._version("torch").passed
