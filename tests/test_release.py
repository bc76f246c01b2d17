"""What describes the project to others says the same everywhere: version, title, addresses; CI's workflow and the forms of issues."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import dorafx
from dorafx.cli import main
from dorafx.versions import PYTHON, VERSIONS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
FORMS = sorted(p for p in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if p.name != "config.yml")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def releases() -> list[tuple[str, str]]:
    """Versions of the changelog with their dates, newest first."""
    return re.findall(r"^## \[(\d[^]]*)\] - (\d{4}-\d{2}-\d{2})$", text("CHANGELOG.md"), re.MULTILINE)


def test_one_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "dorafx.__version__"}}
    assert str(Version(dorafx.__version__)) == dorafx.__version__
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"dorafx {dorafx.__version__}\n"
    (newest, date), *_ = releases()
    citation = parsed(ROOT / "CITATION.cff")
    assert newest == citation["version"] == dorafx.__version__
    assert date == citation["date-released"]


def test_the_changelog_keeps_its_form() -> None:
    changelog = text("CHANGELOG.md")
    headings = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert headings[1:] == [f"[{version}] - {date}" for version, date in releases()]
    versions = [Version(version) for version, _ in releases()]
    assert versions == sorted(versions, reverse=True)
    dates = [datetime.date.fromisoformat(date) for _, date in releases()]
    assert dates == sorted(dates, reverse=True)
    groups = set(re.findall(r"^### (.*)$", changelog, re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    links = dict(re.findall(r"^\[(.+)\]: (https://\S+)$", changelog, re.MULTILINE))
    assert links.keys() == {"Unreleased", *(version for version, _ in releases())}
    assert all(link.startswith(PROJECT["project"]["urls"]["Source"]) for link in links.values())


def test_the_citation() -> None:
    citation = parsed(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["title"] == PROJECT["project"]["name"]
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["repository-code"] == PROJECT["project"]["urls"]["Source"]
    assert citation["authors"] == PROJECT["project"]["authors"]
    assert {"message", "abstract", "keywords"} <= citation.keys()
    papers = {r["identifiers"][0]["value"]: r for r in citation["references"]}
    assert papers.keys() == {"arXiv:2402.09353", "arXiv:2603.22276"}
    for paper in papers.values():
        assert {"type", "title", "authors", "year", "url"} <= paper.keys()
        assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])


def test_one_address() -> None:
    """Of the repository; a fork has few places to change."""
    home = PROJECT["project"]["urls"]["Homepage"]
    for path in (ROOT / "CHANGELOG.md", ROOT / "CITATION.cff", *GITHUB.rglob("*.*")):
        for found in re.findall(r"https://github\.com/[\w.-]+/[\w.-]+", path.read_text(encoding="utf-8")):
            assert found.removesuffix(".git") == home, path.name


def test_the_workflow_runs_what_ci_is() -> None:
    workflow = parsed(GITHUB / "workflows" / "ci.yml")
    triggers = workflow[True]  # YAML 1.1 takes the key `on` for a truth value
    assert triggers.keys() == {"push", "pull_request", "workflow_dispatch"}
    assert workflow["permissions"] == {"contents": "read"}
    assert "group" in workflow["concurrency"]
    (job,) = workflow["jobs"].values()
    # Longer than what .ci/run allows itself.
    (limit,) = re.findall(r"started \+ (\d+) - ", text(".ci/run"))
    assert int(limit) / 60 < job["timeout-minutes"] <= 90
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    actions = [step["uses"] for step in job["steps"] if "uses" in step]
    assert [re.sub(r"@v\d+$", "", action) for action in actions] == ["actions/checkout", "actions/setup-python"]
    checkout, setup = (step["with"] for step in job["steps"] if "uses" in step)
    assert checkout["fetch-depth"] == 0
    installed = setup["python-version"].split()
    environments = [PROJECT["tool"]["tox"]["env"][name] for name in PROJECT["tool"]["tox"]["env_list"]]
    wanted = {e["base_python"][0].removeprefix("python") for e in environments}
    assert wanted < set(installed) <= set(PYTHON)
    assert installed[-1] == PROJECT["tool"]["tox"]["env"]["torch2.13"]["base_python"][0].removeprefix("python")


@pytest.mark.parametrize("path", FORMS, ids=[p.stem for p in FORMS])
def test_a_form_asks_for_what_a_report_needs(path: Path) -> None:
    form = parsed(path)
    assert form.keys() <= {"name", "description", "title", "labels", "body"}
    assert all(form[key] for key in ("name", "description", "body"))
    assert len(form["name"]) < 60 and len(form["description"]) < 200
    fields = {entry["id"]: entry for entry in form["body"] if entry["type"] != "markdown"}
    assert len(fields) == sum(entry["type"] != "markdown" for entry in form["body"])
    for entry in form["body"]:
        attributes = entry["attributes"]
        assert entry["type"] in ("markdown", "textarea", "input", "dropdown")
        assert attributes["value"] if entry["type"] == "markdown" else attributes["label"]
    doctor = fields["doctor"]
    assert doctor["attributes"]["label"] == "`dorafx doctor`"
    assert doctor["validations"]["required"] is True
    assert re.search(r"rewrite_log\(\)", fields["record"]["attributes"]["description"])
    if path.stem != "slow":
        assert re.search(r"save_repro|DORAFX_REPRO", fields["script"]["attributes"]["description"])


def test_the_forms_name_what_there_is() -> None:
    assert {path.stem for path in FORMS} == {"wrong-result", "crash", "missed-layer", "slow"}
    everything = "".join(path.read_text(encoding="utf-8") for path in GITHUB.rglob("*.*"))
    for name in set(re.findall(r"\bdorafx\.([a-zA-Z_]\w*)\(", everything)):
        assert hasattr(dorafx, name), name
    for method in set(re.findall(r"rewrite_log\(\)\.(\w+)\(", everything)):
        assert hasattr(dorafx.RewriteLog, method), method
    for page in set(re.findall(r"examples/guide/[\w-]+\.md", everything)):
        assert (ROOT / page).is_file(), page
    config = parsed(GITHUB / "ISSUE_TEMPLATE" / "config.yml")
    assert all(link.keys() == {"name", "url", "about"} for link in config["contact_links"])


def test_the_stability_page_names_the_versions_that_are_tested() -> None:
    page = text("examples/guide/stability.md")
    for name, known in VERSIONS.items():
        title = {
            "peft": "PEFT, if you use it",
            "transformers": "transformers, if you use it",
            "triton": "Triton, if there is one",
        }
        assert f"| {title.get(name, name)} | {known.minimum} or newer | {known.range} |" in page, name
    assert f"| Python | {PYTHON[0]} or newer | {PYTHON[0]} to {PYTHON[-1]} |" in page


def test_tools_have_the_versions_that_tests_have() -> None:
    """What pre-commit runs from the environment of the tests is pinned there."""
    hooks = [hook for repo in parsed(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    pinned = {Requirement(r).name for r in PROJECT["project"]["optional-dependencies"]["test"]}
    assert {"ruff", "mypy"} <= pinned & {hook["entry"].split()[0] for hook in hooks if hook["language"] == "system"}
    for hook in hooks:
        assert all("==" in requirement for requirement in hook.get("additional_dependencies", ()))
