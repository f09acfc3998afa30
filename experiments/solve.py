"""Can this be done, and how? A plan for one's own scene and goal, checked step by step.

    python -m experiments.solve --scene home.yaml --goal "ON(cup, table)" [--goal "OPEN(fridge)"]
    python -m experiments.solve --task file710_2 [--robothow FOLDER]

A scene is a short YAML or JSON file (see `egjax.sim.authoring`), a graph as VirtualHome writes it,
or the name of an embedded home (cottage, flat). Objects of a goal are classes, any of which serves,
or this very one: `ON(cup (12), table)`. Prints the plan in English with the simulator's verdict on
every step. `--picture FOLDER` draws the search tree and writes it as JSON; `--moves N` searches
move by move instead, going on in the subtree of each step taken, and tells visits and value of each
move. Exit code 1 where no plan was found. Half a minute on two CPU cores, mostly compilation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from egjax.errors import EgjaxError, check_range
from egjax.evals.intervals import Figure
from egjax.evals.plans import Assignment, Verdict, judge
from egjax.search.actions import action_table
from egjax.search.household import Rewards, begin
from egjax.search.mcts import SearchConfig
from egjax.search.moves import plan
from egjax.sim.authoring import load_scenario, parse_goals
from egjax.sim.goals import Predicate, satisfied
from egjax.sim.household import home_graph
from egjax.sim.placing import Resources
from egjax.sim.replay import pad_actions, replay
from egjax.sim.robothow import Program
from egjax.sim.text import Line, bind, to_english
from egjax.train.progress import progress
from experiments import collect
from experiments.common import emit, note, run_main
from experiments.data import HouseTask, assignments, make_task, programs

__all__ = ["Config", "own_task"]

_HOMES = ("cottage", "flat")


@dataclass(frozen=True)
class Config:
    """Where, what, and how to search."""

    scene: str = ""
    """Scene file, graph file, or an embedded home: cottage, flat."""
    goal: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What shall hold at the end, e.g. "ON(cup, table)"; may be given several times. The scene
    file's own goals where absent."""
    task: str = ""
    """A RobotHow task by name, in place of scene and goal."""
    resources: Path | None = None
    """Folder with VirtualHome's properties_data.json, for classes of a scene file."""
    robothow: Path | None = None
    """Folder in RobotHow's layout or of `experiments.place`; the installed data where absent."""
    goals: str = "core"
    """Goal set of `--task`: `core` (without CLOSE) or `e2wm` (with it)."""
    seed: int = 0
    """Of the search."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """Tree search."""
    rewards: Rewards = field(default_factory=Rewards)
    """Rewards of a step."""
    instances: int = 6
    """Objects of a class in the action table, at most."""
    moves: int = 0
    """Search move by move, so many at most, and keep the subtree; 0: one search for all."""
    per_move: int = 64
    """New simulations before a move; `--search.simulations` is the size of the tree."""
    picture: Path | None = None
    """Folder for a picture and a JSON file of the tree (of the last one with `--moves`)."""
    json: Annotated[bool, tyro.conf.arg(help="print plan and figures as JSON lines")] = False


def own_task(scene: str, goals: Sequence[str], resources: Path | None = None) -> HouseTask:
    """A task of a scene and goals of the user's own.

    Args:
        scene: scene file, graph file, or an embedded home.
        goals: goals as text; those of the scene file where absent.
        resources: folder of VirtualHome's resources, for properties of further classes.

    Raises:
        EgjaxError: a scene or goal that is not understood.
    """
    if scene in _HOMES:
        graph, own = home_graph(scene), ()
    else:
        known = Resources.load(resources).properties if resources else None
        graph, own = load_scenario(scene, properties=known)
    predicates = parse_goals(list(goals or own), graph)
    text = "; ".join(map(str, predicates))
    name = f"{Path(scene).stem}: {text}"
    return HouseTask(Program(name, text, text, (), graph, graph, scene), predicates, "own")


def main(config: Config) -> int:
    task = _task(config)
    assignment = assignments([task])[0]
    missing = [p for p, held in zip(task.predicates, _held_after(assignment, [])) if not held]
    lines: list[Line] = []
    simulations = 0
    if missing:
        _check_reach(task, missing, config)
        # Rounded: what is compiled for one goal serves the next.
        problem = collect.Problem([task], config.instances, rounded=True)
        assignment = problem.assignments[0]
    if missing and config.moves:
        lines, simulations = _move_by_move(problem, config)
    elif missing:
        searched = collect.Config(
            search=config.search,
            rewards=config.rewards,
            seed=config.seed,
            batch=1,
            picture=config.picture,
        )
        found = collect.find_plans(problem, searched, labels=False)[0]
        lines, simulations = found.plan, found.report.simulations
        if found.report.solved:
            lines = _without_needless(assignment, lines)
    verdict = judge([assignment], [lines], batch=1)[0]
    holds = _held_after(assignment, lines)
    solved = bool(np.all(holds))
    _print(task, lines, verdict, holds, as_json=config.json)
    emit(
        Figure("solved", float(solved), "tasks", n=1, seed=config.seed),
        Figure("plan_length", len(lines), "steps", n=1, seed=config.seed),
        Figure("simulations", simulations, "simulations", n=1, seed=config.seed),
        json=config.json,
    )
    return 0 if solved else 1


def _check_reach(task: HouseTask, missing: Sequence[Predicate], config: Config) -> None:
    """Refuses goals that no action is there for; of some among others says so."""
    check_range(config.instances, "[1, inf)", where="--instances")
    init = task.program.init
    if not any(edge["relation_type"].upper() == "BETWEEN" for edge in init["edges"]):
        # The simulator finds ways along doors only, even within a room.
        note("no door joins rooms (BETWEEN) in this scene, so nothing can be walked to")
    if not action_table(init, task.predicates, instances=config.instances):
        raise EgjaxError("no action can bring that about", where="; ".join(map(str, missing)))
    for goal in missing:
        if not action_table(init, [goal], instances=config.instances):
            note(f"no action by itself brings about {goal}")


def _move_by_move(problem: collect.Problem, config: Config) -> tuple[list[Line], int]:
    """The moves of a search that keeps the subtree of each step, and its simulations in all."""
    tasks = problem.stack([0])
    key = jax.random.key(config.seed)
    with progress("moves", config.moves) as update:
        played = plan(
            collect.shared_world(config.rewards),
            config.search,
            tasks,
            jax.vmap(begin)(tasks),
            jax.random.split(key, 1),
            moves=config.moves,
            simulations=config.per_move,
            progress=lambda done, solved: update(done, "solved" if solved.all() else ""),
        )
    actions = [int(a) for a in played.actions[:, 0] if a >= 0]
    lines = collect.to_lines(actions, problem.tables[0], problem.assignments[0].names)
    for number, (line, action) in enumerate(zip(lines, actions)):
        visits, value = played.visits[number, 0], played.values[number, 0]
        note(
            f"move {number + 1}: {line}, {visits[action]} of {visits.sum()} visits, "
            f"{played.simulations[number]} new simulations, mean return {value:+.2f}"
        )
    if config.picture is not None:
        collect.draw(problem, 0, played.search, 0, config.picture)
    return lines, int(played.simulations.sum())


def _task(config: Config) -> HouseTask:
    if bool(config.task) == bool(config.scene):
        raise EgjaxError(
            "either a scene or a task", remedy="--scene FILE --goal GOAL, or --task NAME"
        )
    if config.task:
        (program,) = programs(config.robothow, [config.task])
        task = make_task(program, config.goals, "own")
        if config.goal:
            predicates = parse_goals(config.goal, program.init)
            task = HouseTask(program, predicates, "own")
        if not task.predicates:
            raise EgjaxError(f"{config.task} has no goal", remedy="try --goals e2wm")
        return task
    return own_task(config.scene, config.goal, config.resources)


def _without_needless(assignment: Assignment, lines: list[Line]) -> list[Line]:
    """A plan without the steps that it can do without, the last ones tried first."""
    place = len(lines) - 1
    while place >= 0:
        shorter = lines[:place] + lines[place + 1 :]
        if judge([assignment], [shorter], batch=1)[0].solved:
            lines = shorter
        place -= 1
    return lines


def _held_after(assignment: Assignment, lines: Sequence[Line]) -> list[bool]:
    """Which goals hold at the end of a plan."""
    scene, state = assignment.scene, assignment.state
    if lines:
        actions = [bind(scene, state, assignment.names, line) for line in lines]
        states, _ = jax.device_get(replay(scene, state, pad_actions(actions, len(actions))))
        state = jax.tree.map(lambda leaf: leaf[-1], states)
    held = np.asarray(satisfied(scene, state, assignment.goal))
    return [bool(h) for h, real in zip(held, np.asarray(assignment.goal.mask)) if real]


def _print(
    task: HouseTask,
    lines: Sequence[Line],
    verdict: Verdict,
    holds: Sequence[bool],
    *,
    as_json: bool,
) -> None:
    goals = [{"goal": str(p), "holds": h} for p, h in zip(task.predicates, holds)]
    if as_json:
        steps = [
            {"text": s.text, "script": str(line), "accepted": s.accepted, "reason": s.reason}
            for s, line in zip(verdict.steps, lines)
        ]
        row = {"name": "plan", "task": task.name, "plan": to_english(lines), "steps": steps}
        print(json.dumps({**row, "goals": goals}), flush=True)
        return
    if not lines:
        note("nothing has to be done" if all(holds) else "no step was found")
    for number, (step, line) in enumerate(zip(verdict.steps, lines), start=1):
        said = "accepted" if step.accepted else f"refused: {step.reason or 'not tried'}"
        print(f"{number:3d}  {step.text:<36} {said:<10} {line}")
    for goal in goals:
        print(f"     {goal['goal']:<36} {'holds' if goal['holds'] else 'does not hold'}")


if __name__ == "__main__":
    run_main(main, Config)
