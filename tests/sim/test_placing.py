from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.sim.graph import encode
from egjax.sim.household import home_graph
from egjax.sim.placing import (
    NEW_ID,
    PLACED,
    Home,
    Resources,
    Source,
    apply_edits,
    draw,
    load_homes,
    load_placed,
    placed_row,
    read_sources,
    write_placed,
)
from egjax.sim.repair import Failed, Placed, place
from egjax.sim.replay import final_graph, same_graph
from egjax.sim.text import parse_script

RESOURCES = Resources(
    other_names={"larder": frozenset({"fridge"}), "tap": frozenset({"faucet"})},
    placing={
        "mug": (("INSIDE", "cupboard", None), ("ON", "table", None)),
        "juice": (("INSIDE", "larder", None),),
    },
    states={"mug": frozenset({"dirty", "clean"})},
    properties={
        "mug": ("GRABBABLE", "RECIPIENT"),
        "juice": ("GRABBABLE", "DRINKABLE", "POURABLE"),
        "lamp": ("HAS_SWITCH", "HAS_PLUG"),
        "statue": (),
    },
)


@pytest.fixture(scope="module")
def cottage():
    return Home(home_graph("cottage"), RESOURCES)


def source(*steps: str, name: str = "cottage/made/one") -> Source:
    return Source(name, "Try", "Try it.", tuple(parse_script("\n".join(steps))), "cottage")


def run(home: Home, *sources: Source, **options) -> list[Placed | Failed]:
    return place(sources, {"cottage": home}, batch=4, **options)


def replayed(home: Home, found: Placed) -> tuple[dict, dict, int | None]:
    """Initial graph, and what a replay of its own makes of it."""
    init = apply_edits(home.graph, found.layout.edits())
    graph, refused = final_graph(*encode(init), found.layout.script)
    return init, graph, refused


def edges(graph) -> set[tuple[int, str, int]]:
    return {(e["from_id"], e["relation_type"], e["to_id"]) for e in graph["edges"]}


def test_missing_objects_are_placed_as_the_resources_say(cottage):
    program = source(
        "[WALK] <kitchen> (999)",  # no such id: bound by class
        "[FIND] <juice> (1000)",
        "[GRAB] <juice> (1000)",  # INSIDE the closed fridge: it has to be open
        "[FIND] <mug> (1001)",
        "[POUR] <juice> (1000) <mug> (1001)",
        "[SWITCHON] <tap> (7)",  # 7 is something else: bound to what means the same
    )
    (found,) = run(cottage, program)
    assert isinstance(found, Placed)
    init, final, refused = replayed(cottage, found)
    assert refused is None
    assert same_graph(apply_edits(init, found.final), final)
    classes = {n["id"]: n["class_name"] for n in init["nodes"]}
    assert len(classes) == len(init["nodes"]) == len(cottage.nodes) + 2
    juice = {(r, classes[b]) for a, r, b in edges(init) if a == 1000 and r != "CLOSE"}
    assert juice == {("INSIDE", "fridge"), ("INSIDE", "kitchen")}
    mug = {(r, classes[b]) for a, r, b in edges(init) if a == 1001 and r in ("ON", "INSIDE")}
    assert mug in (
        {("ON", "table"), ("INSIDE", "kitchen")},
        {("INSIDE", "cupboard"), ("INSIDE", "kitchen")},
    )
    last = found.layout.script[-1]
    assert last.arguments[0][0] == "faucet"
    made = next(n for n in init["nodes"] if n["id"] == 1000)
    assert set(made["properties"]) == {"GRABBABLE", "DRINKABLE", "POURABLE"}


def test_initial_states_are_those_that_the_program_needs(cottage):
    program = source(
        "[WALK] <lamp> (1000)",
        "[PLUGIN] <lamp> (1000)",
        "[SWITCHON] <lamp> (1000)",
        "[FIND] <cupboard> (9)",
        "[CLOSE] <cupboard> (9)",
    )
    (found,) = run(cottage, program)
    assert isinstance(found, Placed)
    init, _, refused = replayed(cottage, found)
    assert refused is None
    states = {n["id"]: set(n["states"]) for n in init["nodes"]}
    assert {"OFF", "PLUGGED_OUT"} <= states[1000]
    assert found.tries == 1  # known before anything was refused
    cupboard = found.layout.script[-1].arguments[0][1]
    assert "OPEN" in states[cupboard]
    assert "CLOSED" not in states[cupboard]


def test_a_seated_character_finds_its_things_beside_the_seat(cottage):
    program = source(
        "[WALK] <couch> (99)",
        "[SIT] <couch> (99)",
        "[SWITCHON] <lamp> (1000)",  # cannot be walked to from a seat
        "[WATCH] <television> (98)",  # the couch has to face it
    )
    (found,) = run(cottage, program)
    assert isinstance(found, Placed)
    assert found.tries > 1
    assert replayed(cottage, found)[2] is None


def test_what_does_not_run_is_listed_with_step_and_reason(cottage):
    impossible = source("[WALK] <statue> (1000)", "[GRAB] <statue> (1000)", name="cottage/made/two")
    possible = source("[WALK] <statue> (1000)", "[TOUCH] <statue> (1000)")
    first, second = run(cottage, impossible, possible, seeds=2)
    assert isinstance(first, Failed)
    assert (first.step, first.line) == (1, "[GRAB] <statue> (1000)")
    assert first.reason == "<statue> (1000) is not grabbable"
    assert isinstance(second, Placed)


def test_a_layout_is_drawn_from_its_seed(cottage):
    program = source("[WALK] <mug> (1000)", "[GRAB] <mug> (1000)", "[FIND] <light> (500)")

    def layouts(seeds):
        return [draw(program, cottage, np.random.default_rng(s)).edits() for s in seeds]

    assert layouts(range(8)) == layouts(range(8))
    assert len({json.dumps(edit) for edit in layouts(range(8))}) > 1


def test_placed_programs_are_kept_and_read_as_tasks(cottage, tmp_path):
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    (scenes / "cottage.json").write_text(json.dumps(home_graph("cottage")))
    program = source("[WALK] <mug> (1000)", "[WASH] <mug> (1000)")
    (found,) = run(cottage, program)
    assert isinstance(found, Placed)
    row = placed_row(found.source, found.layout, found.seed, found.final)
    write_placed(tmp_path / "out", [row], scenes)
    (read,) = load_placed(tmp_path / "out")
    init, final, _ = replayed(cottage, found)
    assert same_graph(read.init, init)
    assert same_graph(read.final, final)
    assert read.script == found.layout.script
    assert (read.name, read.title) == (program.name, "Try")
    with pytest.raises(EgjaxError, match="no program 'other'"):
        load_placed(tmp_path / "out", ["other"])
    (tmp_path / "out" / PLACED).write_text('{"name": "x"}\n')
    with pytest.raises(EgjaxError, match=r"placed\.jsonl:1: not a placed program"):
        load_placed(tmp_path / "out")


def test_programs_come_from_a_folder_or_a_tar_file(tmp_path):
    folder = tmp_path / "programs" / "home" / "people"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("Wash\nwash it\n\n\n[WALK] <mug> (1.1000)\n")
    (folder / "b.txt").write_text("Bad\nbad\n\n\n[WINK] <mug> (1.1000)\n")
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "programs", "programs")
    for path in (tmp_path / "programs", tmp_path / "all.tar.gz"):
        found, unread = read_sources(path)
        assert [(s.name, s.title, s.scene) for s in found] == [("home/people/a", "Wash", "home")]
        assert unread == {"home/people/b": "unknown verb 'WINK'"}
    with pytest.raises(EgjaxError, match="cannot read the programs"):
        read_sources(folder.parent / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EgjaxError, match="no programs"):
        read_sources(tmp_path / "empty")


def test_three_quarters_of_the_archive_run(shared_data):
    """A sample of RobotHow's archive; the whole of it is `experiments.place`."""
    data = shared_data / "virtualhome"
    sources, unread = read_sources(data / "programs_scenes1-4.tar.gz")
    assert (len(sources), unread) == (2685, {})
    resources = Resources.load(data / "resources")
    homes = load_homes(data / "scenes", {s.scene for s in sources}, resources)
    short = [s for s in sources if 4 <= len(s.script) <= 8]
    chosen = short[:: len(short) // 32][:32]
    found = place(chosen, homes, seeds=1, batch=8)
    placed = [f for f in found if isinstance(f, Placed)]
    assert len(placed) >= 0.75 * len(found)
    for one in placed[::10]:
        home = homes[one.source.scene]
        init, final, refused = replayed(home, one)
        assert refused is None
        assert same_graph(apply_edits(init, one.final), final)
        # The script says the same, the scene's own things are where they were.
        assert [s.verb for s in one.layout.script] == [s.verb for s in one.source.script]
        assert {n["id"] for n in init["nodes"]} - home.nodes.keys() == set(one.layout.made)
        assert all(i >= NEW_ID for i in one.layout.made)
        assert len(home.known - edges(init)) <= 3 * len(one.layout.freed)
