"""The Embodied Agent Interface's own functions on plans. Run by its own interpreter, see `eai`.

    PYTHON experiments/eai_judge.py tasks OUT.json
    PYTHON experiments/eai_judge.py judge PLANS.json OUT.json

`tasks` writes what the interface tells everybody about each of its tasks: the objects that its
prompt lists, the order in which its evaluator takes the wanted actions (it puts them into a set, so
PYTHONHASHSEED decides), and whether the stored final graph passes its own goals (only then is the
task scored). `judge` executes plans ({identifier: ["[WALK] <couch> (352)", ...]}) and evaluates
their goals by calling the evaluator's functions. PYTHON has eai-eval 1.0.5; egjax is not needed.
"""

import argparse
import importlib
import json
import logging
import os


def load(wanted=None):
    """Yields each task: identifier, functions, planner, its goals and the objects it lists."""
    logging.disable(logging.CRITICAL)
    package = importlib.import_module("virtualhome_eval")
    root = os.path.dirname(str(package.__file__))
    tools = importlib.import_module("virtualhome_eval.simulation.evolving_graph.eval_utils")
    resources = os.path.join(root, "resources", "virtualhome")
    with open(os.path.join(resources, "task_state_LTL_formula_accurate.json")) as file:
        goals = json.load(file)["scene_1"]
    with open(os.path.join(resources, "id2task.json")) as file:
        titles = json.load(file)
    data = os.path.join(root, "dataset", "programs_processed_precond_nograb_morepreconds")
    for identifier, title in titles.items():
        if wanted is not None and identifier not in wanted:
            continue
        goal = goals[title][identifier]["vh_goal"]
        nodes = tools.remove_duplicate_dicts([g for g in goal["goal"] if "id" in g])
        edges = tools.remove_duplicate_dicts([g for g in goal["goal"] if "from_id" in g])
        actions = list(set(goal["actions"]))
        planner = tools.construct_planner(None, None, None, script_id=identifier, dataset_root=data)
        yield identifier, tools, planner[0], nodes, edges, actions


def tell(out):
    """Writes what the interface says about each task."""
    found = {}
    for identifier, tools, planner, nodes, edges, actions in load():
        listed = planner.get_symbolic_goal_nl(nodes, edges, action_goals=actions)[-1]
        final, me = planner.final_state_dict, planner.acting_char_id
        scored = tools.scene_evaluate_wID(final, nodes, edges, me)[3]
        found[identifier] = {
            "objects": sorted(listed.values()),
            "actions": actions,
            "scored": bool(scored),
            "verbs": sorted(tools.valid_actions),
        }
    with open(out, "w") as file:
        json.dump(found, file)


def judge(plans, out):
    """Writes for each plan whether every step was executed and every goal holds."""
    with open(plans) as file:
        wanted = json.load(file)
    found = {}
    for identifier, tools, planner, nodes, edges, actions in load(wanted):
        planner.reset()
        steps = wanted[identifier]
        done = []
        for step in steps:
            if not planner.my_execute_primitive_action_eval(step)[0]:
                break
            done.append(step)
        result = tools.scene_evaluate_wID(
            planner.env_state.to_dict(),
            nodes,
            edges,
            planner.acting_char_id,
            action_seq=done,
            action_goals=actions,
        )
        executed = len(done) == len(steps) > 0
        found[identifier] = {"executed": executed, "success": executed and bool(result[3])}
    with open(out, "w") as file:
        json.dump(found, file)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tasks").add_argument("out")
    one = commands.add_parser("judge")
    one.add_argument("plans")
    one.add_argument("out")
    given = parser.parse_args()
    if given.command == "tasks":
        tell(given.out)
    else:
        judge(given.plans, given.out)


if __name__ == "__main__":
    main()
