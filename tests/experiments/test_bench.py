"""The benchmark suite: it finds every script, and names what got slower, and only that."""

from __future__ import annotations

import copy

import pytest

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
    manifest = {"hardware": hardware, "commit": "abc", "started": "2026-01-01"}
    return {"manifest": manifest, "runs": list(runs)}


def slower(old, new, tolerance=0.15):
    return [change.name for change in bench.compare(old, new, tolerance) if change.slower]


def test_every_benchmark_is_found_by_its_name():
    assert {"bench_sim", "bench_search", "bench_losses"} <= set(bench.scripts())


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
    panels = bench._panels(now)["bench_sim"]
    assert [x for x, _, _ in panels["steps, batch n [1/s]"]] == [64, 256]


def test_an_unknown_benchmark_is_refused():
    with pytest.raises(Exception, match="no benchmark 'bench_x'"):
        bench.main(bench.Config(only=("bench_x",)))
