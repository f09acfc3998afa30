"""Pictures of trees: what is shown, what is summed up, and that nothing is lost."""

from __future__ import annotations

import pytest

from egjax.errors import EgjaxError
from egjax.evals.trees import draw_tree, outline


def node(number, parent, action, visits, *, depth=1, solved=False, closed=False):
    return {
        "id": number,
        "parent": parent,
        "action": action,
        "depth": depth,
        "visits": visits,
        "value": number / 10,
        "closed": closed,
        "solved": solved,
    }


def wide(children=100):
    """A root with many children; the last and least visited one leads to the solution."""
    nodes = [node(0, None, None, 1000, depth=0)]
    nodes += [
        node(i, 0, f"[WALK] <thing> ({i})", 2 * (children - i) + 1) for i in range(1, children + 1)
    ]
    goal = node(children + 1, children, "[GRAB] <cup> (7)", 1, depth=2, solved=True, closed=True)
    best = [nodes[-1]["action"], goal["action"]]
    return {"nodes": [*nodes, goal], "best": best, "solved": True}


def test_a_hundred_children_take_a_few_lines_and_none_is_lost():
    tree = wide()
    rows = outline(tree, children=7)
    assert len(rows) == 1 + 7 + 1 + 1 + 1  # root, children, the way's child and goal, the rest
    assert [row.text for row in rows[1:8]] == [f"[WALK] <thing> ({i})" for i in range(1, 8)]
    rest = next(row for row in rows if row.kind == "more")
    assert rest.text == "+ 92 more"
    assert rows[rest.above].text == "start"
    at_root = [row for row in rows if row.above == 0]
    assert sum(row.visits for row in at_root) == sum(n["visits"] for n in tree["nodes"][1:101])


def test_the_way_to_the_solution_has_its_lines_even_without_room():
    rows = outline(wide(), rows=1, children=1)
    assert [row.text for row in rows if row.way] == [
        "start",
        "[WALK] <thing> (100)",
        "[GRAB] <cup> (7)",
    ]
    assert [row.mark for row in rows if row.text.startswith("[GRAB]")] == ["solved"]
    assert [row.text for row in rows if row.kind == "more"] == ["+ 99 more"]


def test_rest_of_the_best_trajectory_is_told():
    tree = wide()
    tree["best"] = [tree["nodes"][1]["action"], "[OPEN] <box> (3)", "[GRAB] <cup> (7)"]
    rows = outline(tree)
    tail = next(row for row in rows if row.kind == "rollout")
    assert tail.text == "rollout: [OPEN] <box> (3), [GRAB] <cup> (7)"
    assert rows[tail.above].text == tree["nodes"][1]["action"]


def test_lines_stand_below_their_parents():
    tree = wide()
    tree["nodes"] += [node(200 + i, 1, f"[FIND] <x> ({i})", 3, depth=2) for i in range(4)]
    rows = outline(tree)
    for place, row in enumerate(rows):
        assert row.above < place
        assert row.depth == (0 if row.above < 0 else rows[row.above].depth + 1)


def test_picture_is_the_same_each_time_and_holds_the_labels():
    tree = wide()
    tree["nodes"][1]["action"] = (
        "[PUTBACK] <a_very_long_name_of_a_thing> (1000) <another_long_name> (1)"
    )
    png = draw_tree(tree, title="Set up table")
    assert png.startswith(b"\x89PNG")
    assert png == draw_tree(tree, title="Set up table")
    svg = draw_tree(tree, title="Set up table", format="svg").decode()
    for text in ("Set up table", "a_very_long_name", "+ 91 more", "✔ solved"):
        assert text in svg


def test_root_alone_can_be_drawn():
    tree = {"nodes": [node(0, None, None, 0, depth=0)], "best": [], "solved": False}
    assert len(outline(tree)) == 1
    assert draw_tree(tree).startswith(b"\x89PNG")


def test_bad_arguments_are_refused():
    with pytest.raises(EgjaxError, match="picture format"):
        draw_tree(wide(), format="gif")
    with pytest.raises(EgjaxError, match="at least 1"):
        outline(wide(), rows=0)
