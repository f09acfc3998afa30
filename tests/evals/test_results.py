"""results.json: round trip, and what it refuses."""

import dataclasses
import json

import pytest

from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.evals.results import Results, from_json, load, to_json


def test_round_trip(results):
    assert from_json(to_json(results)) == results
    assert to_json(from_json(to_json(results))) == to_json(results)


def test_a_run_without_any_section_is_valid(results):
    bare = Results(title="t", manifest=results.manifest)
    assert from_json(to_json(bare)) == bare


def broken(results, change):
    tree = json.loads(to_json(results))
    change(tree)
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("manifest"), "field 'manifest' is missing"),
        (lambda t: t.update(colour="red"), "unknown field 'colour'"),
        (lambda t: t["models"][1].update(role="oracle"), r"models\[1\].role: 'oracle' is none of"),
        (lambda t: t["models"][0].update(name=3), r"models\[0\].name: needs str, found int"),
        (lambda t: t["models"][1].update(name=t["models"][0]["name"]), "stands there twice"),
        (lambda t: t["models"][0]["scores"][0]["success"].update(low=0.9), "starts above"),
        (lambda t: t["models"][0]["scores"][0]["success"].update(high=0.0), "ends below"),
        (
            lambda t: t["questions"][0]["accuracy"].update(value=28.6, low=None, high=None),
            "no frac",
        ),
        (lambda t: t["questions"][0]["accuracy"].update(n=-1), "n is -1"),
        (lambda t: t["comparisons"][0].update(theirs="nobody"), "no model is named 'nobody'"),
        (lambda t: t["training"][0]["values"].pop(), "differ in length"),
        (lambda t: t["search"]["tasks"][0].update(solved="yes"), "needs bool, found str"),
        (lambda t: t["probes"][0].update(accuracy={}), "needs tuple"),
    ],
)
def test_says_where_it_is_wrong(results, change, message):
    with pytest.raises(EgjaxError, match=message) as caught:
        from_json(broken(results, change), where="results.json")
    assert str(caught.value).startswith("results.json: ")
    assert "\n" not in str(caught.value)


def test_says_the_line_that_is_no_json():
    with pytest.raises(EgjaxError, match=r"r\.json:2: not JSON"):
        from_json('{"title": "t",\n oops}', where="r.json")


def test_load_names_a_file_that_is_not_there(tmp_path, results):
    with pytest.raises(EgjaxError, match="cannot read"):
        load(tmp_path / "absent.json")
    path = tmp_path / "results.json"
    path.write_text(to_json(results), encoding="utf-8")
    assert load(path) == results


def test_an_impossible_figure_is_refused_when_made(results):
    score = results.questions[0]
    bad = dataclasses.replace(score, accuracy=Figure("x", 0.5, "fraction", 10, 0.6, 0.7))
    with pytest.raises(EgjaxError, match=r"results\.questions\[0\]\.accuracy"):
        dataclasses.replace(results, questions=(bad,))
