"""The benchmark suite: it finds every script, and names what got slower, and only that."""

from __future__ import annotations

import copy
import json

import pytest

from egjax.errors import EgjaxError
from experiments import bench


def run(script="bench_sim", size="small", *, number=64, rate=100.0, seconds=2.0, ratio=3.0):
    return {
        "script": script,
        "size": size,
        "number": number,
        "arguments": [],
        "seconds": 9.0,
        "compile_seconds": 1.0,
        "compilations": 4,
        "peak_bytes": 1e9,
        "figures": [
            {"name": f"steps, batch {number}", "value": rate, "unit": "1/s", "n": 5},
            {
                "name": "time",
                "value": seconds,
                "unit": "s",
                "n": 5,
                "ratio": ratio,
                "peer_value": 1,
            },
            {"name": "solved", "value": 3, "unit": "tasks", "n": 5},
        ],
    }


def results(*runs, cpu="a"):
    hardware = {"cpu": cpu, "cores": 2, "devices": ["cpu"]}
    manifest = {"hardware": hardware, "commit": "abc", "dirty": True, "started": "2026-01-01"}
    return {"manifest": manifest, "runs": list(runs)}


def slower(old, new, tolerance=0.15):
    return [change.name for change in bench.compare(old, new, tolerance) if change.slower]


def test_every_benchmark_is_found_by_its_name():
    found = set(bench.scripts())
    assert {"bench_sim", "bench_search", "bench_losses", "bench_train", "bench_decode"} <= found
    assert not any(name.endswith("_peer") for name in found)
    assert set(bench.SIZES) <= found


def test_what_got_slower_is_named_and_nothing_else():
    old = results(run())
    assert slower(old, copy.deepcopy(old)) == []
    assert slower(old, results(run(rate=90.0, seconds=2.2))) == []  # within the tolerance
    assert slower(old, results(run(rate=80.0))) == ["bench_sim, small: steps, batch 64"]
    assert slower(old, results(run(seconds=2.5))) == ["bench_sim, small: time"]
    assert slower(old, results(run(rate=500.0, seconds=0.1))) == []  # better is not worse
    assert slower(old, results(run(size="large", rate=1.0))) == []  # nothing to compare with


def test_memory_has_a_tolerance_of_its_own():
    more = run()
    more["peak_bytes"] *= 1.12
    assert slower(results(run()), results(more), tolerance=0.5) == ["bench_sim, small: peak memory"]


def test_on_another_machine_ratios_to_the_peer_are_compared():
    old = results(run())
    assert slower(old, results(run(rate=1.0, seconds=99.0), cpu="b")) == []
    assert slower(old, results(run(ratio=4.0), cpu="b")) == ["bench_sim, small: time"]


def test_the_page_shows_cost_against_size_and_escapes():
    now = results(run(), run(size="large", number=256, seconds=8.0))
    old = results(run(seconds=1.0))
    text = bench.page(now, bench.compare(old, now, 0.15), "<last>")
    assert "data:image/png;base64," in text
    assert "&lt;last&gt;" in text
    assert "class=slower" in text
    assert "commit abc+, 2 × a" in text
    panels = {panel.name: panel for panel in bench._panels(now)["bench_sim"]}
    assert [point.size for point in panels["steps, batch n"].points] == [64, 256]
    assert [point.peer for point in panels["time"].points] == [1, 1]
    assert "solved" not in panels  # neither time nor memory
    assert set(bench._GROWS) == set(bench.SIZES)


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(Exception, match="no benchmark 'bench_x'"):
        bench.main(bench.Config(only=("bench_x",)))


@pytest.fixture
def no_runs(monkeypatch, tmp_path):
    """Every script takes no time; those in the set that is given fail."""
    failing = set()

    def fake(script, size, number, arguments):
        if script in failing:
            raise EgjaxError("left with 1: out of luck", where=f"{script}, {size}")
        return run(script, size, number=number)

    monkeypatch.setattr(bench, "_run", fake)
    monkeypatch.setattr(bench, "_COMMITTED", tmp_path / "committed")
    manifest = bench.describe(seeds=())
    made = {"commit": "abc", "dirty": False}
    monkeypatch.setattr(
        bench, "describe", lambda seeds: bench.dataclasses.replace(manifest, **made)
    )
    return failing, made


def kept(tmp_path):
    found = json.loads((tmp_path / "bench.json").read_text())["runs"]
    return [(run["script"], run["size"]) for run in found]


def test_a_benchmark_may_be_made_in_pieces(no_runs, tmp_path):
    def call(*only, **more):
        return bench.main(bench.Config(only=only, out=tmp_path, **more))

    assert call("bench_sim", sizes=("large",)) == 0
    assert call("bench_decode", sizes=("small",)) == 0
    assert call("bench_sim", sizes=("small", "large"), keep="now") == 0
    pieces = [("bench_decode", "small"), ("bench_sim", "small"), ("bench_sim", "large")]
    assert kept(tmp_path) == pieces
    committed = json.loads((tmp_path / "committed" / "now.json").read_text())
    assert len(committed["runs"]) == 3
    no_runs[1]["commit"] = "def"  # other code: what it made does not go with this
    assert call("bench_sim", sizes=("small",)) == 0
    assert kept(tmp_path) == [("bench_sim", "small")]
    no_runs[1]["dirty"] = True  # may be other code
    assert call("bench_sim", sizes=("large",)) == 0
    assert kept(tmp_path) == [("bench_sim", "large")]


def test_a_benchmark_that_fails_is_named_and_the_others_run(no_runs, tmp_path, capsys):
    no_runs[0].add("bench_losses")
    config = bench.Config(
        only=("bench_losses", "bench_sim"), sizes=("small",), out=tmp_path, keep="never", json=True
    )
    assert bench.main(config) == 1
    assert kept(tmp_path) == [("bench_sim", "small")]
    out = capsys.readouterr()
    assert "failed: bench_losses, small: left with 1: out of luck" in out.err
    figures = {row["name"]: row["value"] for row in map(json.loads, out.out.splitlines())}
    assert (figures["benchmarks"], figures["benchmarks_failed"]) == (1, 1)
    assert not (tmp_path / "committed").exists()
