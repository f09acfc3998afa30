"""A trace read by hand: what lies in what, who was busy, and when."""

import gzip
import json

import pytest

from egjax.errors import EgjaxError
from experiments import profiles


def row(name, start, length, lane=1, program=""):
    args = {"hlo_module": program, "hlo_op": name} if program else {}
    return {
        "ph": "X",
        "pid": 7,
        "tid": lane,
        "name": name,
        "ts": start,
        "dur": length,
        "args": args,
    }


def told(what, value, lane=None):
    key = "sort_index" if what == "thread_sort_index" else "name"
    return {"ph": "M", "pid": 7, "tid": lane, "name": what, "args": {key: value}}


ROWS = [
    told("process_name", "/host:CPU"),
    told("thread_name", "python", 1),
    told("thread_sort_index", 2, 1),
    told("thread_name", "pool/-123", 2),
    told("thread_sort_index", 1, 2),
    told("thread_name", "pool/456", 3),
    told("thread_sort_index", 3, 3),
    {},
    row("call", 0.0, 3e6),
    # A loop of 4 s that holds two products (the second right behind the first) and a copy in one.
    row("while.5", 1e6, 4e6, 2, "jit_step"),
    row("dot.1", 1e6, 1e6, 2, "jit_step"),
    row("dot.12", 2e6, 2e6, 2, "jit_step"),
    row("copy", 2.5e6, 0.5e6, 2, "jit_step"),
    row("wait", 0.0, 1e6, 3),
    row("wait", 5e6, 1e6, 3),
]


@pytest.fixture
def folder(tmp_path):
    def make(rows=ROWS):
        file = tmp_path / "plugins" / "perfetto_trace.json.gz"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(gzip.compress(json.dumps({"traceEvents": rows}).encode()))
        return tmp_path

    return make


def test_lanes_are_in_perfettos_order_and_events_know_their_own_time(folder):
    lanes = profiles.read(folder())
    assert [lane.name for lane in lanes] == ["pool", "python", "pool 2"]
    own = {event.name: event.own for event in lanes[0].events}
    assert own == {"while.5": 1.0, "dot.1": 1.0, "dot.12": 1.5, "copy": 0.5}
    assert [profiles.busy(lane.events) for lane in lanes] == [4.0, 3.0, 2.0]


def test_figures_are_by_lane_program_and_operation(folder):
    found = {f.name: (f.value, f.n) for f in profiles.figures(profiles.read(folder()), top=2)}
    assert found == {
        "lane/pool": (4.0, 4),
        "lane/python": (3.0, 1),
        "lane/pool 2": (2.0, 2),
        "program/jit_step": (4.0, 4),
        "self/jit_step/dot": (2.5, 2),
        "self/jit_step/while": (1.0, 1),
    }


def test_the_picture_is_drawn_whole_and_close_up(folder, tmp_path, capsys):
    picture = tmp_path / "new" / "p.png"
    profiles.main(profiles.Config(folder(), picture=picture, close=(2.0, 3.0), json=True))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(capsys.readouterr().out.splitlines()[0])["name"] == "lane/pool"
    part = profiles._part(profiles.read(folder())[1], (2.0, 3.0))
    assert part is not None
    assert [event.name for event in part.events] == ["call"]
    assert profiles._part(profiles.read(folder())[2], (2.0, 3.0)) is None


def test_what_is_no_trace_is_told(tmp_path, folder):
    with pytest.raises(EgjaxError, match=r"no perfetto_trace.*--profile FOLDER"):
        profiles.read(tmp_path)
    file = next(folder().rglob("*.gz"))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(EgjaxError, match="not a whole trace"):
        profiles.read(tmp_path)
