from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from egjax.errors import EgjaxError
from egjax.sim.graph import Sizes, decode, edge_bits, encode, load_graph, sizes_of
from egjax.sim.household import home_graph
from egjax.sim.replay import same_graph


@pytest.mark.parametrize("home", ["cottage", "flat"])
def test_graph_to_arrays_to_graph_is_the_identity(home):
    graph = home_graph(home)
    scene, state, names = encode(graph)
    assert same_graph(decode(scene, state, names), graph)
    kept = [{k: v for k, v in node.items() if k != "states"} for node in graph["nodes"]]
    back = decode(scene, state, names)["nodes"]
    assert [{k: v for k, v in node.items() if k != "states"} for node in back] == kept


def test_every_kind_of_edge_survives():
    graph = home_graph("cottage")
    ids = {node["class_name"]: node["id"] for node in graph["nodes"]}
    me, cup, couch = ids["character"], ids["cup"], ids["couch"]
    for a, relation, b in (
        (me, "HOLDS_RH", cup),
        (me, "HOLDS_LH", cup),
        (cup, "ON", me),
        (me, "FACING", me),
        (couch, "FACING", ids["television"]),
        (couch, "FACING", me),
        (cup, "CLOSE", cup),
        (couch, "HOLDS_RH", cup),
    ):
        graph["edges"].append({"from_id": a, "relation_type": relation, "to_id": b})
    assert same_graph(decode(*encode(graph)), graph)


def test_padding_never_matters_for_edges():
    graph = home_graph("flat")
    small, state, _ = encode(graph)
    large, padded, _ = encode(graph, Sizes(nodes=128, doors=7, rooms=9, parents=5, added=8))
    n = len(graph["nodes"])
    assert not edge_bits(large, padded)[n:].any()
    assert not edge_bits(large, padded)[:, n:].any()
    np.testing.assert_array_equal(edge_bits(large, padded)[:n, :n], edge_bits(small, state)[:n, :n])


def _broken(change):
    graph = copy.deepcopy(home_graph("cottage"))
    change(graph)
    return graph


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g["edges"][0].update(relation_type="BESIDE"), "unknown relation 'BESIDE'"),
        (lambda g: g["nodes"][5]["states"].append("HOT"), "unknown state 'HOT'"),
        (lambda g: g["nodes"][5]["properties"].append("BLUE"), "unknown property 'BLUE'"),
        (lambda g: g["edges"][0].update(to_id=999), "the id 999"),
        (lambda g: g["nodes"].pop(), "0 characters"),
        (lambda g: g["nodes"].append(dict(g["nodes"][3])), "occurs twice"),
    ],
)
def test_a_malformed_graph_is_told_in_one_line(change, message):
    with pytest.raises(EgjaxError, match=message) as error:
        encode(_broken(change), where="home.json")
    assert str(error.value).startswith("home.json")
    assert "\n" not in str(error.value)


def test_graph_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "graph.json"
    with pytest.raises(EgjaxError, match="no such graph file"):
        load_graph(path)
    path.write_text('{"nodes": [\n}')
    with pytest.raises(EgjaxError, match=r"graph\.json:2: not a JSON graph"):
        load_graph(path)
    path.write_text("[]")
    with pytest.raises(EgjaxError, match="expected an object"):
        load_graph(path)
    path.write_text(json.dumps(home_graph("flat")))
    assert same_graph(load_graph(path), home_graph("flat"))


def test_sizes_hold_every_graph():
    graphs = [home_graph("cottage"), home_graph("flat")]
    sizes = sizes_of(graphs)
    assert sizes.nodes % 32 == 0
    for graph in graphs:
        encode(graph, sizes)
