from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.sim.graph import encode, sizes_of
from egjax.sim.replay import (
    compare_episode,
    final_graph,
    pad_actions,
    read_episodes,
    replay,
    same_graph,
)
from egjax.sim.robothow import load_pair, load_program, load_programs, read_names
from egjax.sim.text import parse_script, to_script

GOLDEN = Path(__file__).parents[1] / "golden" / "robothow_transitions.jsonl.gz"


def test_recorded_transitions_of_the_reference(robothow):
    """Every step of the committed excerpt: verdict, message, states and edges."""
    episodes = list(read_episodes(GOLDEN))
    pairs = {
        e["graph"]: next((robothow / "init_and_final_graphs").glob(f"*/*/{e['graph']}"))
        for e in episodes
    }
    graphs = {name: load_pair(path)[0] for name, path in pairs.items()}
    sizes = sizes_of(graphs.values(), added=128)
    verbs, steps = set(), 0
    for episode in episodes:
        world = encode(graphs[episode["graph"]], sizes)
        for verb, accepted, differs in compare_episode(episode, *world):
            assert differs is None, f"{episode['graph']}: {differs}"
            verbs.add((verb, accepted))
            steps += 1
    assert steps > 500
    assert len({verb for verb, accepted in verbs if accepted}) >= 40


def test_a_wrong_transition_is_noticed(robothow):
    episode = next(iter(read_episodes(GOLDEN)))
    at = next(i for i, s in enumerate(episode["steps"]) if s["ok"] and s["added"])
    episode["steps"][at]["added"].pop()
    path = next((robothow / "init_and_final_graphs").glob(f"*/*/{episode['graph']}"))
    found = [d for _, _, d in compare_episode(episode, *encode(load_pair(path)[0])) if d]
    assert [d.step for d in found] == [at]


def test_human_programs_end_in_the_stored_graph(robothow):
    names = ["file710_2", "file124_1", "file793_2", "file957_2"]
    programs = load_programs(robothow, names)
    sizes = sizes_of(p.init for p in programs)
    for program in programs:
        scene, state, names_ = encode(program.init, sizes)
        graph, refused = final_graph(scene, state, names_, program.script)
        assert refused is None
        assert same_graph(graph, program.final)
        assert not same_graph(graph, program.init)


def test_skipped_rows_and_refusals_change_nothing(home):
    scene, state, _ = home
    actions = pad_actions([(6, 3, -1), (-1, -1, -1)], 4)  # GRAB of a wall, then nothing
    states, codes = jax.device_get(replay(scene, state, actions))
    assert codes[0] > 0
    assert not codes[1:].any()
    for new, old in zip(jax.tree.leaves(states), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new, np.broadcast_to(old, new.shape))


def _folder(root: Path, program, script: str, pair: str | None) -> Path:
    for part in ("executable_programs", "init_and_final_graphs"):
        (root / part / "Home" / "made").mkdir(parents=True)
    text = f"{program.title}\n{program.description}\n\n{script}\n"
    (root / "executable_programs/Home/made/one.txt").write_text(text, encoding="utf-8-sig")
    if pair is not None:
        (root / "init_and_final_graphs/Home/made/one.json").write_text(pair)
    return root


def test_a_folder_of_ones_own_round_trips(tmp_path, homes):
    program = homes[0][0]
    pair = json.dumps({"init_graph": program.init, "final_graph": program.final})
    root = _folder(tmp_path, program, to_script(program.script), pair)
    (loaded,) = load_programs(root)
    assert loaded.script == program.script
    assert (loaded.name, loaded.title, loaded.scene) == ("one", program.title, "Home")
    assert same_graph(loaded.final, program.final)


@pytest.mark.parametrize(
    ("script", "pair", "message"),
    [
        ("[FLY] <cup> (1)", "{}", r"one\.txt:4: unknown verb 'FLY'"),
        ("", "{}", r"one\.txt: a program without steps"),
        ("[WALK] <bed> (1)\nWALK <bed>", "{}", r"one\.txt:5: not a script line"),
        ("[WALK] <bed> (1)", None, r"one\.json: the program has no graph file"),
        ("[WALK] <bed> (1)", "{\n]", r"one\.json:2: not JSON"),
        ("[WALK] <bed> (1)", "{}", r"one\.json: expected 'init_graph'"),
    ],
)
def test_a_bad_folder_is_told_with_file_and_line(tmp_path, homes, script, pair, message):
    root = _folder(tmp_path, homes[0][0], script, pair)
    with pytest.raises(EgjaxError, match=message):
        load_programs(root)


def test_programs_of_one_name_in_two_scenes_are_two(tmp_path, homes):
    program = homes[0][0]
    pair = json.dumps({"init_graph": program.init, "final_graph": program.final})
    root = _folder(tmp_path, program, to_script(program.script), pair)
    for part in ("executable_programs", "init_and_final_graphs"):
        shutil.copytree(root / part / "Home", root / part / "Other")
    names = ["Home/made/one", "Other/made/one"]
    assert [p.name for p in load_programs(root)] == names
    assert [p.scene for p in load_programs(root, names[::-1])] == ["Other", "Home"]
    with pytest.raises(EgjaxError, match=r"no program 'one'.*there are Home/made/one, Other"):
        load_programs(root, ["one"])


def test_a_program_without_a_title_is_told(tmp_path, homes):
    root = _folder(tmp_path, homes[0][0], "[WALK] <bed> (1)", "{}")
    script = root / "executable_programs/Home/made/one.txt"
    script.write_text("[WALK] <bed> (1)\n")
    with pytest.raises(EgjaxError, match=r"one\.txt:1: a program without a title"):
        load_programs(root)


def test_missing_data_are_told(tmp_path):
    with pytest.raises(EgjaxError, match="no RobotHow programs"):
        load_programs(tmp_path)
    with pytest.raises(EgjaxError, match="cannot read the program"):
        load_program(tmp_path / "x.txt", tmp_path / "x.json")
    names = tmp_path / "names.txt"
    with pytest.raises(EgjaxError, match="cannot read the task list"):
        read_names(names)
    names.write_text("# nothing\n")
    with pytest.raises(EgjaxError, match="an empty task list"):
        read_names(names)
    names.write_text("file1_1.txt file2_1 # two\nfile3_1\n")
    assert read_names(names) == ["file1_1", "file2_1", "file3_1"]


def test_malformed_episodes_are_told(tmp_path):
    path = tmp_path / "episodes.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"graph": "a.json", "steps": []}\n{"steps": []}\n')
    with pytest.raises(EgjaxError, match=r"episodes\.jsonl\.gz:2: not an episode"):
        list(read_episodes(path))


def test_embedded_programs_replay_to_their_goals(homes):
    programs, sizes = homes
    assert len(programs) >= 12
    assert len({p.scene for p in programs}) == 2
    for program in programs:
        scene, state, names = encode(program.init, sizes)
        graph, refused = final_graph(scene, state, names, program.script)
        assert refused is None
        assert same_graph(graph, program.final)
        assert parse_script(to_script(program.script)) == list(program.script)
