"""The JSON: what is written is read again, and what is wrong is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dorafx.bench.results import SCHEMA, Metric, Results, Row


def sample() -> Results:
    ours = Row("norm", "8x8 r2", "dorafx", {"d_out": 8}, {"time": Metric("s", [[1e-3, 3e-3], [2e-3]], 4e6, 1e3)})
    stock = Row("norm", "8x8 r2", "peft", {"d_out": 8}, {"time": Metric("s", [[4e-3]], 4e6, 1e3)}, facts={"graphs": 1})
    broken = Row("norm", "8x8 r2", "dense", {"d_out": 8}, {}, "OutOfMemoryError: of memory")
    ceilings = {"copy": Metric("B/s", [[1e6, 2e6]]), "matmul": Metric("FLOP/s", [[4e9]])}
    environment = {
        "device": "a chip",
        "threads": 2,
        "dorafx": "0",
        "commit": "abc",
        "versions": {"torch": "2", "x": ""},
    }
    return Results({"dtype": "float32", "rounds": 2}, environment, ceilings, [ours, stock, broken])


def test_round_trip() -> None:
    results = sample()
    again = Results.from_json(results.to_json())
    assert again == results
    assert again.to_json() == results.to_json()
    document = json.loads(results.to_json())
    assert document["schema"] == SCHEMA
    assert document["rows"][0]["metrics"]["time"]["median"] == 2e-3
    assert document["rows"][0]["metrics"]["time"]["rounds"] == [[1e-3, 3e-3], [2e-3]]


def test_figures() -> None:
    results = sample()
    time = results.rows[0].metrics["time"]
    assert time.quartiles == (1.5e-3, 2.5e-3)
    assert Metric("s", [[2.0]]).quartiles == (2.0, 2.0)
    # 4e6 FLOPs at 4e9 FLOP/s take longer than 1e3 bytes at the best of the copies.
    assert results.limit(time) == pytest.approx(1e-3)
    assert results.limit(Metric("s", [[1.0]], 0, 4e6)) == pytest.approx(2.0)
    assert results.limit(Metric("s", [[1.0]])) == 0
    assert results.reference(results.rows[1], "time") is time
    assert results.reference(results.rows[1], "other") is None


def changed(path: list[Any], value: Any) -> str:
    document = json.loads(sample().to_json())
    place = document
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["kind"], "other", "not the JSON of a bench run"),
        (["schema"], 99, f"schema 99 is not {SCHEMA}"),
        (["schema"], None, "schema None is not"),
        (["rows"], None, "the field rows is missing"),
        (["rows"], {}, "rows must be of the type list, not dict"),
        (["rows", 1], 5, r"rows\[1\] must be of the type dict, not int"),
        (["rows", 0, "suite"], None, r"rows\[0\].suite is missing"),
        (["rows", 0, "facts"], None, r"rows\[0\].facts is missing"),
        (["rows", 0, "name"], 3, r"rows\[0\].name must be of the type str, not int"),
        (["rows", 0, "metrics", "time"], 3, r"rows\[0\].metrics.time must be of the type dict"),
        (["rows", 0, "metrics", "time", "unit"], "h", r"rows\[0\].metrics.time.unit: 'h' is not one of s, B"),
        (
            ["rows", 0, "metrics", "time", "rounds"],
            [["a"]],
            r"rows\[0\].metrics.time.rounds must hold lists of numbers",
        ),
        (["rows", 0, "metrics", "time", "rounds"], [[]], "and one at least"),
        (["rows", 0, "metrics", "time", "flops"], True, r"metrics.time.flops must be a number"),
        (["ceilings", "copy", "rounds"], None, "ceilings.copy.rounds is missing"),
    ],
)
def test_wrong_fields_are_named(path: list[Any], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Results.from_json(changed(path, value))


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense"])
def test_other_files_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not the JSON of a bench run"):
        Results.from_json(text)
