"""What would the models do, and why? A plan from π̄ or one model, token by token.

    python -m experiments.chat --run runs/quick    # asks for tasks, prompts
    python -m experiments.chat --run runs/quick --task file710_2 --picture why.png
    python -m experiments.chat --large-from L --expert-from E --base-from N --prompt "Q: ...\\nA:"

Shows at every token what πᴸ, πᴱ and πᴺ and their composition π̄ think likeliest, then the plan; of a
task (or `--scene` with `--goal`, as in `experiments.solve`) also the simulator's verdict on every
step. At the prompt, `task NAME` takes a RobotHow task, `task` alone one that the run held out of
training, and anything else is a text to go on from.
`--legal` allows only steps that the simulator accepts at that point. Models are those of a finished
run, or Hugging Face folders of one tokenizer. Half a minute on two CPU cores, mostly compilation.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

from egjax.errors import EgjaxError, require
from egjax.evals.manifest import write_atomic
from egjax.evals.plans import Assignment, Verdict, judge
from egjax.evals.tokens import Step, as_html, as_png, as_table, side_by_side
from egjax.lm.constrain import Sentences, Vocabulary, constrained
from egjax.lm.ensemble import Combine, Models, check_vocabularies, first
from egjax.lm.generate import Generation, completions, generate, pad_prompts
from egjax.lm.ratio import ratio_combine
from egjax.lm.speculate import speculate
from egjax.lm.stops import Stops, cut, stop_table
from egjax.lm.tokenizer import Tokenizer
from egjax.sim.phrases import LegalSteps
from experiments.common import atomic_path, finished, note, run_main
from experiments.data import HouseTask, assignments, make_task, programs
from experiments.distill import Ratio
from experiments.evaluate import NAMES
from experiments.models import asked, cut_to, described, for_decoding, load
from experiments.own import Start, unused
from experiments.solve import own_task
from experiments.training import MODEL

__all__ = ["Config", "main"]

_STAGES = {"large": "pretrain_large", "expert": "sft", "base": "pretrain_small"}
_STAGES |= {"distilled": "distill", "preferred": "dpo"}
_THREE = ("large", "expert", "base")


@dataclass(frozen=True)
class Config:
    """Which models, and what to ask them."""

    run: Path = Path("runs/quick")
    """Run directory with the models."""
    seed: int = 0
    """Of the run's models, and of what is drawn."""
    model: Literal["ratio", "large", "expert", "base", "distilled", "preferred"] = "ratio"
    """What decodes; `ratio` is π̄."""
    large_from: Path | None = None
    """Hugging Face folder of πᴸ, or a stage's folder of a run, in place of the run's models. Alone,
    it decodes by itself."""
    expert_from: Path | None = None
    """The same of πᴱ."""
    base_from: Path | None = None
    """The same of πᴺ."""
    prompt: str = ""
    """A text to go on from; "\\n" is a line end. One turn, then the end."""
    task: str = ""
    """A RobotHow task to plan. One turn, then the end."""
    scene: str = ""
    """Scene of a task of one's own, with `--goal`. One turn, then the end."""
    goal: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What shall hold at the end, e.g. "ON(cup, table)"."""
    goals: str = "core"
    """Goal set of a RobotHow task: `core` (without CLOSE) or `e2wm` (with it)."""
    robothow: Path | None = None
    """Folder in RobotHow's layout or of `experiments.place`; the installed data where absent."""
    ratio: Ratio = field(default_factory=Ratio)
    """π̄."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Draws from the likeliest tokens of this probability in all."""
    max_new_tokens: int = 96
    """Longest completion in tokens."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text that ends a completion, or a special token such as "<eos>"; "\\n" is a line end. May be
    given several times."""
    legal: bool = False
    """Allow only steps that the simulator accepts; for tasks."""
    drafts: int = 0
    """Tokens that πᴱ drafts in a round of speculation (the same tokens, sooner); 0: none."""
    top: int = 3
    """Tokens shown of each model."""
    picture: Path | None = None
    """Writes the table as a picture: .png or .html. One turn only."""
    json: Annotated[bool, tyro.conf.arg(help="print each turn as a JSON line")] = False


class Party(NamedTuple):
    """Who decodes, and with which words.

    Attributes:
        models, combine: as `egjax.lm.generate.generate` takes them.
        names: columns of the table: the models, and π̄ where there are three.
        tokenizer: of all of them.
        stops: stop strings, or None.
        words: the tokens by their bytes, with `--legal`.
    """

    models: Models
    combine: Combine
    names: tuple[str, ...]
    tokenizer: Tokenizer
    stops: Stops | None
    words: Vocabulary | None


class Turn(NamedTuple):
    """One question and what came of it."""

    prompt: str
    completion: str
    steps: list[Step]
    verdict: Verdict | None
    task: HouseTask | None
    told: str


def main(config: Config) -> None:
    once = sum(map(bool, (config.prompt, config.task, config.scene)))
    if once > 1:
        raise EgjaxError("one of --prompt, --task and --scene")
    if config.picture is not None and (
        not once or config.picture.suffix.lower() not in (".png", ".html")
    ):
        raise EgjaxError(
            "a picture is of one turn, in PNG or HTML",
            where="--picture",
            remedy="e.g. --task NAME --picture why.png",
        )
    _check(config)
    # As in a prompt; what a shell passes as "\\n" is a line end.
    config = dataclasses.replace(config, stop=tuple(_unescaped(text) for text in config.stop))
    party = _party(config)
    if once:
        turn = _turn(config, party, _unescaped(config.prompt), _task(config, config.task))
        _show(turn, config)
        if config.picture is not None:
            _picture(turn, config.picture)
        return
    note("task NAME plans a RobotHow task, task alone one that is held out of training")
    note("anything else is a text to go on from; an empty line leaves")
    drawn = _held_out(config)
    while (line := _asked()) is not None:
        try:
            word, _, rest = line.partition(" ")
            named = (rest.strip() or next(drawn)) if word == "task" else ""
            text = "" if named else _unescaped(line)
            _show(_turn(config, party, text, _task(config, named)), config)
        except EgjaxError as error:
            note(f"error: {error}")


def _check(config: Config) -> None:
    """Refuses options out of range, and such as would have no effect."""
    for name, least in (("top", 1), ("max_new_tokens", 1), ("drafts", 0)):
        if getattr(config, name) < least:
            raise EgjaxError(
                f"{getattr(config, name)}, at least {least}", where=f"--{name.replace('_', '-')}"
            )
    if config.legal and config.prompt:
        raise EgjaxError("a prompt has no simulator", where="--legal", remedy="give a task")
    if config.legal and (config.stop or config.drafts):
        raise EgjaxError("without --stop and --drafts", where="--legal")
    if not config.scene:
        unused(config, "goal", when="without --scene")
    if any((config.large_from, config.expert_from, config.base_from)):
        unused(config, "model", when="with --large-from")
    if (config.large_from and not config.expert_from) or config.model != "ratio":
        unused(config, "ratio", "drafts", when="with one model")


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n")


def _asked() -> str | None:
    """A line from the person, None at the end."""
    print("> " if sys.stdin.isatty() else "", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip() or None


def _held_out(config: Config) -> Iterator[str]:
    """Names of tasks in random order, without end: those that the run held out, else any."""
    record = config.run / "tasks" / "tasks.json"
    if record.is_file():
        rows = json.loads(record.read_text(encoding="utf-8"))["tasks"]
        names = [row["name"] for row in rows if row["split"] != "train"]
    else:
        names = [program.name for program in programs(config.robothow)]
    rng = np.random.default_rng(config.seed)
    while True:
        yield str(rng.choice(names))


def _party(config: Config) -> Party:
    folders = {"large": config.large_from, "expert": config.expert_from, "base": config.base_from}
    given = {name: folder for name, folder in folders.items() if folder is not None}
    if given:
        wanted = tuple(given)
        if wanted not in (_THREE, ("large",)):
            raise EgjaxError(
                "π̄ needs three models", remedy="--large-from, --expert-from and --base-from"
            )
        starts = {name: Start.at(folder) for name, folder in given.items()}
        # Before any weights are read. A prompt is a text, so chat templates do not matter.
        check_vocabularies(
            {NAMES[name]: start.tokenizer.vocab_size for name, start in starts.items()},
            {NAMES[name]: start.tokenizer.fingerprint for name, start in starts.items()},
        )
        loaded = {name: start.load(cut=True) for name, start in starts.items()}
        tokenizer = starts["large"].tokenizer
    else:
        wanted = _THREE if config.model == "ratio" else (config.model,)
        stages = {name: f"seed{config.seed}/{_STAGES[name]}" for name in wanted}
        paths = {
            name: finished(config.run, stage, made_by="pipeline").path / MODEL
            for name, stage in stages.items()
        }
        text = finished(config.run, "text", made_by="text")
        tokenizer = Tokenizer.load(text.path / "tokenizer")
        spoken = {NAMES[name]: described(path)[1] for name, path in paths.items()}
        check_vocabularies({}, {**spoken, "the run's text": tokenizer.fingerprint})
        size = tokenizer.vocab_size
        loaded = {name: cut_to(load(path), size) for name, path in paths.items()}
    loaded = {name: for_decoding(model) for name, model in loaded.items()}
    models = [(loaded[name].params, loaded[name].config) for name in wanted]
    three = len(wanted) == 3
    names = tuple(NAMES[name] for name in wanted) + ((NAMES["ratio"],) if three else ())
    stops, words = None, None
    if config.stop:
        # A special token is no text: it ends a completion by its id.
        special = {text: tokenizer.special_id(text) for text in config.stop}
        texts = [text for text, token in special.items() if token is None]
        params, own = models[0]
        if texts:
            stops = stop_table(texts, tokenizer.token_bytes(), own.vocab_size)
        ends = (*own.eos_ids, *(token for token in special.values() if token is not None))
        models[0] = params, dataclasses.replace(own, eos_ids=tuple(dict.fromkeys(ends)))
    if config.legal:
        own = models[0][1]
        words = Vocabulary(tokenizer.token_bytes(), own.vocab_size, own.eos_ids)
    combine = ratio_combine(**vars(config.ratio)) if three else first
    return Party(models, combine, names, tokenizer, stops, words)


def _task(config: Config, name: str) -> HouseTask | None:
    if name:
        (program,) = programs(config.robothow, [name])
        return make_task(program, config.goals, "own")
    return own_task(config.scene, config.goal) if config.scene else None


def _turn(config: Config, party: Party, prompt: str, task: HouseTask | None) -> Turn:
    assignment = None
    if task is not None:
        # A goal of one's own belongs to no activity; models have read of such, too (`hindsight`).
        prompt, (assignment,) = task.prompt(titled=not config.scene), assignments([task])
    own = party.models[0][1]
    tokenizer = party.tokenizer
    asked_ = asked(own, tokenizer.encode(prompt))
    found, told = _decoded(config, party, asked_, assignment)
    mask = jax.device_get(found.mask)[0]
    ids = [int(token) for token in jax.device_get(found.tokens)[0][mask]]
    text = tokenizer.decode(completions(found, own.eos_ids)[0])
    completion = cut(text, config.stop)
    steps = side_by_side(
        party.models,
        party.names,
        tokenizer,
        asked_,
        ids,
        combine=party.combine if len(party.models) > 1 else None,
        top=config.top,
    )
    verdict = None
    if assignment is not None:
        (verdict,) = judge([assignment], [completion], batch=1)
    return Turn(prompt, completion, steps, verdict, task, told)


def _decoded(
    config: Config, party: Party, prompt: Sequence[int], assignment: Assignment | None
) -> tuple[Generation, str]:
    """The completion, and a remark on how it was decoded."""
    own = party.models[0][1]
    room = min(c.max_seq_len for _, c in party.models) - config.max_new_tokens
    bucket = 64 if -(-len(prompt) // 64) * 64 <= room else len(prompt)
    batch = pad_prompts([prompt], pad_id=own.pad_id or 0, bucket=bucket)
    key = jax.random.key(config.seed)
    options: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "combine": party.combine,
        "temperature": config.temperature,
        "top_p": config.top_p,
    }
    if party.words is not None:
        if assignment is None:
            raise EgjaxError("a prompt has no simulator", where="--legal", remedy="give a task")
        steps = Sentences(
            party.words, LegalSteps(assignment.scene, assignment.state, assignment.names)
        )
        return constrained(party.models, batch, key, [steps], **options), ""
    if config.drafts and len(party.models) > 1:
        found = speculate(
            party.models, batch, key, draft=1, drafts=config.drafts, stops=party.stops, **options
        )
        told = f"{int(found.accepted[0])} of {int(found.drafted[0])} drafts of πᴱ kept"
        return found.generation, told
    return generate(party.models, batch, key, stops=party.stops, **options), ""


def _show(turn: Turn, config: Config) -> None:
    if config.json:
        print(json.dumps(_record(turn), ensure_ascii=False), flush=True)
        return
    console = require("rich.console", "cli").Console(
        width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 140))
    )
    if turn.task is not None:
        console.print(f"task {turn.task.name}", markup=False, highlight=False, style="bold")
    console.print(turn.prompt, markup=False, highlight=False)
    if turn.steps:
        console.print(as_table(turn.steps, width=console.width))
    for line in _outcome(turn):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _outcome(turn: Turn) -> list[str]:
    """The completion, and the verdict on every step."""
    lines = [f"→ {' '.join(turn.completion.split())}"]
    if turn.told:
        lines.append(turn.told)
    if turn.verdict is not None:
        wide = max((len(step.text) for step in turn.verdict.steps), default=0)
        for number, step in enumerate(turn.verdict.steps, start=1):
            refused = f"refused: {step.reason or 'not tried'}"
            lines.append(
                f"{number:3d}  {step.text:<{wide}} {'accepted' if step.accepted else refused}"
            )
        held = f"{turn.verdict.satisfied} of {turn.verdict.goals} goals hold"
        lines.append(f"{'solved' if turn.verdict.solved else 'not solved'}, {held}")
    return lines


def _record(turn: Turn) -> dict[str, Any]:
    """A turn as the JSON line has it."""
    record: dict[str, Any] = {
        "name": "turn",
        "prompt": turn.prompt,
        "completion": turn.completion,
        "tokens": [
            {
                "token": step.token,
                "probability": step.probability,
                "rank": step.rank,
                "choices": {
                    name: [[c.token, c.probability] for c in choices]
                    for name, choices in step.choices.items()
                },
            }
            for step in turn.steps
        ],
    }
    if turn.task is not None and turn.verdict is not None:
        record |= {
            "task": turn.task.name,
            "solved": turn.verdict.solved,
            "executable": turn.verdict.executable,
            "goals_held": turn.verdict.satisfied,
            "goals_total": turn.verdict.goals,
            "steps": [vars(step) for step in turn.verdict.steps],
        }
    return record


def _picture(turn: Turn, path: Path) -> None:
    title, footer = turn.prompt, "\n".join(_outcome(turn))
    if path.suffix.lower() == ".html":
        write_atomic(path, as_html(turn.steps, title=title, footer=footer))
    else:
        with atomic_path(path) as part:
            part.write_bytes(as_png(turn.steps, title=title, footer=footer))
    note(f"picture: {path}")


if __name__ == "__main__":
    run_main(main, Config)
