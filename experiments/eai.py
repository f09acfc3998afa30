"""What does the Embodied Agent Interface's own evaluator say about plans found by search?

    python -m experiments.eai --judge PYTHON

Plans for the 342 annotated tasks of VirtualHome's action sequencing (arXiv 2410.07166) by tree
search under the rules `eai`: goals from the interface's files, actions by backward relevance among
the objects that its prompt lists, never the human program. They are judged in the interface's own
environment (eai-eval 1.0.5, PYTHONHASHSEED=0) twice: by calling its functions, and by its official
command, which counts a plan equal to the human program as failed; so the first action is written
twice there. Rows `direct_*`, `official_*`: share of the 305 tasks that it scores (the goals of the
others fail on its own final graphs). `foretold`: share on which our own verdict is the one of the
direct calls. `--human` judges the human programs instead. Expected: 1, 0.987 (four tasks need
PLUGIN, which the command does not know), 1. Hardware: two busy CPU cores, five minutes of search
and seven of judging.

PYTHON is the interpreter of an environment made once:

    python3 -m venv eai && eai/bin/pip install --no-deps eai-eval==1.0.5
    eai/bin/pip install lark networkx numpy fire pyyaml scipy pddlgym
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from egjax.errors import EgjaxError
from egjax.evals.intervals import Figure
from egjax.evals.manifest import write_atomic
from egjax.files import here
from egjax.search.actions import Grounded, action_table, encode_actions, table_sizes
from egjax.search.household import Rewards, begin, household
from egjax.search.mcts import SearchConfig, search
from egjax.sim import eai, goals
from egjax.sim.goals import Deed, GoalSizes, encode_goal
from egjax.sim.graph import Names, encode, sizes_of
from egjax.sim.replay import pad_actions
from egjax.sim.robothow import Program
from egjax.sim.rules import RULES
from egjax.sim.text import Line, bind, parse_line
from egjax.sim.world import step
from egjax.train.progress import progress
from egjax.types import Task
from experiments.common import emit, note, run_main
from experiments.data import programs

__all__ = ["Config", "main"]

_JUDGE = Path(__file__).with_name("eai_judge.py")
_BEST_MODEL = ("Mistral Large", 0.784)  # official command, arXiv 2410.07166
_HUMAN = ("human programs", 0.88)  # official command, first action written twice
_LONGEST = 128  # steps of a judged plan
_RULES = RULES["eai"]


@dataclass(frozen=True)
class Config:
    """What to search and who judges."""

    judge: Path | None = None
    """Interpreter of an environment with eai-eval 1.0.5."""
    out: Path = Path("runs/eai")
    """Directory for the plans and the evaluator's files."""
    human: bool = False
    """Judge the human programs instead of searching."""
    limit: int = 0
    """Only the first so many tasks; 0 for all."""
    seed: int = 0
    """Of the search."""
    search: SearchConfig = field(
        default_factory=lambda: SearchConfig(simulations=512, rollouts=4, seconds=120.0)
    )
    """Tree search; a first round with an eighth of the simulations, a second for what is left."""
    rewards: Rewards = field(default_factory=Rewards)
    """Rewards of a step."""
    batch: int = 19
    """Tasks searched at once."""
    instances: int = 6
    """Objects of a class, or of a wanted action, in an action table at most."""
    json: Annotated[bool, tyro.conf.arg(help="print figures as JSON lines")] = False


def _run(judge: Path, *command: str | Path, where: Path | None = None) -> None:
    """Runs the evaluator's interpreter; the order of its sets must not be left to chance."""
    done = subprocess.run(
        [str(judge), *map(str, command)],
        capture_output=True,
        text=True,
        cwd=where,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EgjaxError("the evaluator failed", where=str(judge), remedy=last)


def _interpreter(judge: Path | None) -> Path:
    if judge is None or not judge.is_file():
        raise EgjaxError(
            "no interpreter with eai-eval 1.0.5" if judge is None else "no such interpreter",
            where="--judge" if judge is None else str(judge),
            remedy="python3 -m venv eai && eai/bin/pip install --no-deps eai-eval==1.0.5 && "
            "eai/bin/pip install lark networkx numpy fire pyyaml scipy pddlgym; "
            "then --judge eai/bin/python",
        )
    return judge.absolute()  # a link into an environment must stay one


class Problem:
    """The tasks as arrays of equal sizes, with their action tables."""

    def __init__(
        self,
        tasks: Sequence[eai.Annotated],
        sources: Sequence[Program],
        told: Mapping[str, Any],
        instances: int,
    ):
        sizes = sizes_of(source.init for source in sources)
        worlds = [encode(s.init, sizes, where=s.name) for s in sources]
        self.names: list[Names] = [names for _, _, names in worlds]
        # The evaluator takes the wanted actions in an order of its own. A task that wants nothing
        # still needs a plan: any walk.
        self.deeds = [
            [Deed(tuple(text.split("|"))) for text in told[t.identifier]["actions"]]
            or [Deed(("WALK",))] * (not t.facts)
            for t in tasks
        ]
        self.tables = [
            _table(task, deeds, source, names, told[task.identifier], instances)
            for task, deeds, source, names in zip(
                tasks, self.deeds, sources, self.names, strict=True
            )
        ]
        common = GoalSizes(
            max(len(task.facts) for task in tasks),
            max(1, *(len(task.facts) for task in tasks)),
            max(map(len, self.deeds)),
        )
        size, objects = table_sizes(self.tables)
        self.arrays = [
            Task(
                scene,
                state,
                encode_goal(
                    task.facts,
                    names,
                    deeds=deeds,
                    nodes=sizes.nodes,
                    sizes=common,
                    where=task.identifier,
                ),
                encode_actions(table, names.index, size=size, objects=objects),
            )
            for task, deeds, table, (scene, state, names) in zip(
                tasks, self.deeds, self.tables, worlds, strict=True
            )
        ]

    def stack(self, rows: Sequence[int]) -> Task:
        """Tasks as a batch."""
        return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *(self.arrays[i] for i in rows))


def _table(
    task: eai.Annotated,
    deeds: Sequence[Deed],
    source: Program,
    names: Names,
    told: Mapping[str, Any],
    instances: int,
) -> list[Grounded]:
    """Actions on the objects that the interface lists, with the verbs that it knows."""
    predicates, meant = eai.by_class(task.facts, names)
    every = action_table(
        source.init,
        predicates,
        deeds=deeds,
        meant=meant,
        told=told["objects"],
        instances=instances,
    )
    # It does not know PLUGIN, which nothing can stand in for where a plug is out.
    found = [a for a in every if a.verb == "PLUGIN" or a.verb in told["verbs"]]
    # Where everything holds from the start, a plan still needs a step.
    things = [i for i in told["objects"] if names.class_name(names.index[i]) != "character"]
    return found or [Grounded("WALK", number) for number in things]


def _lines(plan: Sequence[int], table: Sequence[Grounded], names: Names) -> list[str]:
    """A plan over a table as the interface's steps."""
    steps = []
    for index in plan:
        verb, *arguments = table[index]
        ids = [i for i in arguments if i is not None]
        steps.append(
            str(Line(verb, tuple((names.class_name(names.index[i]), int(i)) for i in ids)))
        )
    return steps


def find(problem: Problem, config: Config) -> tuple[list[list[str]], int]:
    """Plans by search, and how many of them it takes for solutions."""
    world, begins = household(config.rewards, _RULES), jax.jit(jax.vmap(begin))
    plans: dict[int, list[str]] = {}
    left = list(range(len(problem.arrays)))
    short = replace(config.search, simulations=max(config.search.simulations // 8, 1))
    for number, how in enumerate((short, config.search)):
        open_rows, left, done = left, [], 0
        with progress("search again" if number else "search", len(open_rows)) as update:
            for start in range(0, len(open_rows), config.batch):
                rows = open_rows[start : start + config.batch]
                # The last batch is filled up, so that one compilation serves.
                tasks = problem.stack(rows + [rows[0]] * (config.batch - len(rows)))
                key = jax.random.fold_in(jax.random.key(config.seed + number), start)
                keys = jax.random.split(key, config.batch)
                outcome = search(world, how, tasks, begins(tasks), keys)
                for place, row in enumerate(rows):
                    plan = outcome.actions[place][: int(outcome.length[place])].tolist()
                    plans[row] = _lines(plan, problem.tables[row], problem.names[row])
                left += [r for r, ok in zip(rows, outcome.solved, strict=False) if not ok]
                done += len(rows)
                update(done, f"{done - len(left)} solved")
    return [plans[row] for row in range(len(plans))], len(plans) - len(left)


@jax.jit
def _verdicts(tasks: Task, plans: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether all steps are accepted, and whether all goals hold then; bool[B] each.

    Args:
        tasks: a batch of B.
        plans: int32[B, T, 3]. Verb and node indices, -1 after the end.
    """

    def one(task: Task, plan: jax.Array):
        def act(carry, action):
            state, performed, fine = carry
            verb = jnp.maximum(action[0], 0)
            after, code = step(task.scene, state, verb, action[1], action[2], _RULES)
            real = action[0] >= 0
            accepted = real & fine & (code == 0)
            state = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), after, state)
            performed = goals.perform(task.goal, performed, verb, action[1], accepted)
            return (state, performed, fine & (accepted | ~real)), None

        start = (task.state, jnp.int32(0), plan[0, 0] >= 0)
        (state, performed, fine), _ = jax.lax.scan(act, start, plan)
        holds = goals.satisfied(task.scene, state, task.goal).all()
        return fine, fine & holds & goals.all_performed(task.goal, performed)

    return jax.vmap(one)(tasks, plans)


def foretell(problem: Problem, plans: Sequence[Sequence[str]]) -> list[tuple[bool, bool]]:
    """Our own verdicts on plans: executed, success."""
    found: list[tuple[bool, bool]] = []
    batch = 32
    for start in range(0, len(plans), batch):
        rows = [min(start + i, len(plans) - 1) for i in range(batch)]
        actions = []
        for row in rows:
            task, names = problem.arrays[row], problem.names[row]
            lines = [parse_line(text) for text in plans[row]]
            bound = [bind(task.scene, task.state, names, line) for line in lines]
            actions.append(pad_actions(bound, _LONGEST))
        fine, success = _verdicts(problem.stack(rows), jnp.asarray(np.stack(actions)))
        pairs = zip(np.asarray(fine).tolist(), np.asarray(success).tolist(), strict=True)
        found += list(pairs)[: len(plans) - start]
    return found


def export(steps: Sequence[str]) -> str:
    """A plan as the official command reads it: an object of verbs with class names and ids.

    A verb may stand in it several times. An empty list must hold a blank, or the command's reader
    passes it over.
    """
    entries = []
    for text in steps:
        line = parse_line(text)
        words = [word for name, number in line.arguments for word in (name, str(number))]
        entries.append(f'"{line.verb}": [{", ".join(map(json.dumps, words)) or " "}]')
    return "{" + ", ".join(entries) + "}"


def _judged(
    judge: Path, out: Path, name: str, plans: Mapping[str, list[str]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Verdicts by direct calls, and the official command's summary."""
    write_atomic(out / f"{name}.json", json.dumps(plans, indent=1) + "\n")
    direct = out / f"{name}_direct.json"
    _run(judge, _JUDGE, "judge", out / f"{name}.json", direct)
    responses = out / "responses" / name / "virtualhome" / "action_sequencing"
    responses.mkdir(parents=True, exist_ok=True)
    rows = [
        {"identifier": identifier, "llm_output": export([*steps[:1], *steps])}
        for identifier, steps in plans.items()
    ]
    write_atomic(responses / f"{name}_outputs.json", json.dumps(rows, indent=1) + "\n")
    official = out / "official" / name
    official.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    _run(
        judge,
        "-c",
        "from eai_eval.cli import main; main()",
        *("--mode", "evaluate_results", "--eval-type", "action_sequencing"),
        *("--dataset", "virtualhome", "--output-dir", official),
        *("--llm-response-path", responses.parents[1]),
        where=official,
    )
    summaries = [p for p in official.rglob("summary.json") if p.stat().st_mtime >= begun - 1]
    if len(summaries) != 1:
        raise EgjaxError("the official command left no summary", where=str(official))
    return json.loads(direct.read_text()), json.loads(summaries[0].read_text())


def main(config: Config) -> None:
    judge = _interpreter(config.judge)
    out = here(config.out, "--out").absolute()
    out.mkdir(parents=True, exist_ok=True)
    _run(judge, _JUDGE, "tasks", out / "told.json")
    told = json.loads((out / "told.json").read_text())
    tasks = eai.load_annotated()[: config.limit or None]
    sources = programs(None, [task.program for task in tasks])
    problem = Problem(tasks, sources, told, config.instances)
    begun = time.perf_counter()
    if config.human:
        plans, solved = [list(map(str, source.script)) for source in sources], 0
    else:
        plans, solved = find(problem, config)
    seconds = time.perf_counter() - begun
    foretold = foretell(problem, plans)
    name = "human" if config.human else "egjax"
    named = {task.identifier: plan for task, plan in zip(tasks, plans, strict=True)}
    direct, official = _judged(judge, out, name, named)
    scored = [task.identifier for task in tasks if told[task.identifier]["scored"]]
    for identifier in scored:
        if not direct[identifier]["success"]:
            note(f"{identifier} fails: {' '.join(named[identifier])}")
    own = {task.identifier: verdict for task, verdict in zip(tasks, foretold, strict=True)}
    agree = sum(own[i] == (direct[i]["executed"], direct[i]["success"]) for i in scored)
    goal, run = official["goal_evaluation"], official["trajectory_evaluation"]
    n = len(scored)
    rows = [
        Figure("foretold", agree / max(n, 1), "fraction", n=n),
        Figure("direct_success", _share(direct, scored, "success"), "fraction", n=n),
        Figure("direct_executed", _share(direct, scored, "executed"), "fraction", n=n),
        Figure(
            "official_success",
            goal["task_success_rate"] / 100,
            "fraction",
            n=n,
            peer=_BEST_MODEL[0],
            peer_value=_BEST_MODEL[1],
        ),
        Figure("official_executed", run["execution_success_rate"] / 100, "fraction", n=n),
        Figure("steps", float(np.mean([len(p) for p in plans])), "per plan", n=len(plans)),
    ]
    if not config.human:
        rows.insert(0, Figure("tasks_solved", solved, "tasks", n=len(tasks), seed=config.seed))
        rows.append(Figure("search_seconds", seconds, "s", n=len(tasks)))
    emit(*rows, json=config.json)


def _share(verdicts: Mapping[str, Any], scored: Sequence[str], kind: str) -> float:
    return sum(verdicts[identifier][kind] for identifier in scored) / max(len(scored), 1)


if __name__ == "__main__":
    run_main(main, Config)
