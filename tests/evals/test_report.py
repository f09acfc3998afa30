"""The page, its sentences, the plots and the table on the terminal."""

import dataclasses
import io
import re

import pytest
from rich.console import Console

from egjax.evals.claims import Verdict, headline, judge_difference, points
from egjax.evals.intervals import Figure
from egjax.evals.plots import DARK, LIGHT, draw_all
from egjax.evals.report import render, write
from egjax.evals.results import Comparison, Results, load
from egjax.evals.table import number, print_summary


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    write(results, path)
    return path


@pytest.fixture(scope="module")
def page(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_writes_page_plots_results_and_manifest(folder, results):
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    plots = {f"plots/{name}.png" for name in ("success", "steps", "probes", "training", "search")}
    assert names == {"report.html", "results.json", "manifest.json"} | plots
    assert load(folder / "results.json") == results


def test_the_page_needs_nothing_else(page):
    assert not re.search(r"""(?:src|href|srcset)=["'](?!#|data:)""", page)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert page.count('src="data:image/png;base64,') == 5


def test_every_row_and_section_is_on_the_page(page, results):
    for model in results.models:
        assert model.name in page
    for text in ("Questions", "Search", "What did not work", results.manifest.command, "file710_2"):
        assert text in page
    assert page.count("<tr><td>distilled + DPO</td>") == 2  # seen and unseen
    assert "kept from an earlier run, by code fedcba987654+<" in page
    assert "<b>" not in page


def test_what_the_simulator_said_stands_beside_its_step(page):
    assert '<li class="no">Put milk in fridge.<span class="reason">fridge is closed</span>' in page
    assert '<li class="untried">Close fridge.' in page
    assert '<li class="ok">Walk to kitchen.' in page


def test_text_from_a_model_cannot_become_markup(results):
    sly = dataclasses.replace(results.examples[0], activity="<script>alert(1)</script>")
    changed = dataclasses.replace(results, examples=(sly,))
    assert "<script" not in render(changed, light={}, dark={})


def test_a_bare_run_renders(results):
    bare = Results(title="nothing yet", manifest=results.manifest)
    text = render(bare, light=draw_all(bare, LIGHT), dark=draw_all(bare, DARK))
    assert "nothing yet" in text
    assert "Questions" not in text
    assert "<img" not in text


def test_light_and_dark_plots_are_images_and_differ(results, folder):
    only = Results(title="t", manifest=results.manifest, search=results.search)
    light, dark = draw_all(only, LIGHT)["search"], draw_all(only, DARK)["search"]
    assert light.startswith(b"\x89PNG")
    assert light != dark
    assert light == (folder / "plots" / "search.png").read_bytes()


def difference(low: float, value: float, high: float) -> Figure:
    return Figure("d", value, "fraction", 100, low, high, 0)


@pytest.mark.parametrize(
    ("figure", "verdict"),
    [
        (difference(0.01, 0.05, 0.1), Verdict.BETTER),
        (difference(-0.1, -0.05, -0.01), Verdict.WORSE),
        (difference(-0.01, 0.05, 0.1), Verdict.UNDECIDED),
        (difference(0.0, 0.05, 0.1), Verdict.UNDECIDED),
        (Figure("d", 0.5, "fraction", 1), Verdict.UNDECIDED),
    ],
)
def test_a_verdict_needs_the_whole_interval(figure, verdict):
    assert judge_difference(figure) is verdict


@pytest.mark.parametrize(
    ("expert", "large", "verdict", "text"),
    [
        ((0.01, 0.1, 0.2), (0.3, 0.4, 0.5), "better", "helps: +10.0 points [+1.0, +20.0]"),
        ((-0.2, -0.1, -0.01), (0.3, 0.4, 0.5), "worse", "does not help here, it is worse than πᴱ"),
        ((-0.1, 0.1, 0.2), (0.3, 0.4, 0.5), "undecided", "not shown to help over πᴱ small, though"),
        ((-0.1, 0.0, 0.2), (-0.3, 0.0, 0.5), "undecided", "over πᴱ small and πᴸ large: "),
    ],
)
def test_the_headline_is_chosen_by_the_data(results, expert, large, verdict, text):
    name = "π̄ by decoding"
    pairs = tuple(
        Comparison(name, theirs, "success", "all", difference(*ends))
        for theirs, ends in (("πᴱ small", expert), ("πᴸ large", large))
    )
    other = Comparison(name, "πᴱ small", "rouge_l", "all", difference(0.5, 0.6, 0.7))
    (claim,) = headline(dataclasses.replace(results, comparisons=(*pairs, other)))
    assert claim.verdict == verdict
    assert text in claim.text
    assert claim.text.startswith(name)
    assert "n = 100" in claim.text.replace("\u00a0", " ")


def test_the_copy_is_told_on_every_set_of_tasks(results):
    pairs = tuple(
        Comparison("πᴱ small", "nearest plan", "success", split, difference(*ends))
        for split, ends in (("seen", (0.1, 0.2, 0.3)), ("unseen", (-0.3, -0.2, -0.1)))
    )
    seen, unseen = headline(dataclasses.replace(results, comparisons=pairs))
    assert seen.text.startswith("πᴱ small is better than nearest plan in success on seen activ")
    assert (seen.verdict, unseen.verdict) == (Verdict.BETTER, Verdict.WORSE)


def test_numbers_as_people_read_them():
    assert number(Figure("x", 0.6134, "fraction", 9, 0.52, 0.701)) == "61.3 % [52.0, 70.1]"
    assert number(Figure("x", 1204.4, "steps/s", 9)) == "1,204 steps/s"
    assert number(Figure("x", 0.923, "ratio", 9, 0.9, 1.0), interval=False) == "0.92×"
    assert number(Figure("x", -0.5, "fraction", 9), unit=False) == "−50.0"
    assert number(None) == "–"
    assert points(difference(-0.01, 0.052, 0.114)) == "+5.2 points [−1.0, +11.4]"


def test_the_table_fits_a_terminal(results):
    console = Console(file=io.StringIO(), width=80)
    print_summary(results, console=console)
    text = console.file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "55.8 [46.7, 65.0]" in text
    assert "distilled helps: +16.7 points" in text
