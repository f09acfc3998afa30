import random

from egjax.experience.prompts import mentions, plan_prompt, plan_sample, wanted
from egjax.sim.goals import Predicate
from egjax.sim.household import home_graph, home_programs

GOAL = [
    Predicate("ON", "milk", "table"),
    Predicate("SITTING", "character"),
    Predicate("CLOSE", "chair", "character"),
    Predicate("HOLDS_LH", "character", "cup"),
]


def test_the_prompt_says_where_things_are_and_what_is_wanted():
    assert plan_prompt("Have_A drink", GOAL, home_graph("cottage")) == (
        "Q: How to have a drink? The kitchen has chair, cup, cupboard, fridge, milk, table. "
        "The cup is in the cupboard. The milk is in the fridge. The cupboard is closed. "
        "The fridge is closed. You are in the kitchen. "
        "Wanted: holding cup in left hand, sitting, close to chair, milk on table.\nA:"
    )


def test_the_goal_can_be_left_out_and_the_title_too():
    graph = home_graph("cottage")
    plain = plan_prompt(None, GOAL, graph, goals=False)
    assert plain.startswith("Q: How to do this? The kitchen has")
    assert "Wanted" not in plain
    radio = [Predicate("ON", "radio")]
    assert "The radio is off." in plan_prompt("x", radio, graph, goals=False)
    assert "The radio is plugged out." in plan_prompt("x", radio, graph, goals=False)


def test_order_of_the_input_does_not_show_and_a_seed_only_shuffles():
    graph = home_graph("flat")
    mixed = {"nodes": graph["nodes"][:], "edges": graph["edges"][:]}
    rng = random.Random(0)
    rng.shuffle(mixed["nodes"])
    rng.shuffle(mixed["edges"])
    prompt = plan_prompt("x", GOAL, graph)
    assert plan_prompt("x", GOAL[::-1], mixed) == prompt
    shuffled = [plan_prompt("x", GOAL, graph, seed=seed) for seed in range(8)]
    assert shuffled[0] == plan_prompt("x", GOAL, graph, seed=0)
    assert len(set(shuffled)) > 1

    def words(text):
        return sorted(text.replace(",", "").replace(".", "").split())

    assert all(words(text) == words(prompt) for text in shuffled)


def test_of_this_very_cup_the_class_is_told():
    graph = home_graph("cottage")
    number = {node["class_name"]: node["id"] for node in graph["nodes"]}["cup"]
    this = [Predicate("ON", f"cup ({number})", "table")]
    assert plan_prompt("x", this, graph) == plan_prompt(
        "x", [Predicate("ON", "cup", "table")], graph
    )


def test_facts_are_told_once():
    assert wanted([*GOAL, *GOAL]) == wanted(GOAL)


def test_sample_of_a_program_hides_the_program():
    program = home_programs()[0]
    sample = plan_sample("Wait.", program.title, [Predicate("SITTING", "character")], program.init)
    assert sample.task_type == "plan"
    assert sample.completion == "Wait."
    assert sample.prompt.endswith("\nA:")
    assert len(sample.prompt) < 120


def test_mentions():
    titles = ["Work", "Drink milk"]
    assert mentions("Q: How to work? You are", titles) == "Work"
    assert mentions("Q: What is this activity?\nA: work", titles) == "Work"
    assert mentions("Walk to workbench. Grab work.", titles) is None
    assert mentions("Grab milk. Drink Milk. Stand up.", titles) == "Drink milk"
    assert mentions("Drink milkshake.", titles) is None
