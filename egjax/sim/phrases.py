"""The legal steps of a plan in English, one after the other: what a planner may say next."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax

from egjax.errors import EgjaxError
from egjax.sim.choices import Choices, legal_choices
from egjax.sim.graph import Names
from egjax.sim.rules import Rules
from egjax.sim.text import Line, bind, parse_english, resolve_name, to_english
from egjax.sim.vocab import VERBS
from egjax.sim.world import REFERENCE, step
from egjax.types import Scene, State

__all__ = ["LegalSteps", "legal_lines"]

Action = tuple[int, int, int]


def legal_lines(scene: Scene, state: State, names: Names, choices: Choices) -> dict[Action, Line]:
    """Steps that name classes and are legal, by what they mean: verb, object, target.

    A name means what `egjax.sim.text.bind` takes it for, so of several objects of a class only the
    held, near or lowest one can be asked for.

    Args:
        scene, state, names: one scene in one state.
        choices: its legal actions, on the host.
    """
    classes = sorted({entry["class_name"] for entry in names.nodes})
    nodes = {name: resolve_name(scene, state, names, name) for name in classes}
    held = [int(node) for node in choices.held]
    lines: dict[Action, Line] = {}
    pair = 0
    for number, verb in enumerate(VERBS):
        if verb.arity == 0:
            if choices.objects[number, 0]:
                lines[number, -1, -1] = Line(verb.name)
        elif verb.arity == 1:
            for name, node in nodes.items():
                if choices.objects[number, node]:
                    lines[number, node, -1] = Line(verb.name, ((name, None),))
        else:
            for place, thing in enumerate(held):
                first = names.class_name(thing) if thing >= 0 else ""
                if nodes.get(first) != thing:
                    continue
                for name, node in nodes.items():
                    if choices.targets[pair, place, node]:
                        arguments = ((first, None), (name, None))
                        lines[number, thing, node] = Line(verb.name, arguments)
            pair += 1
    return lines


_legal = jax.jit(legal_choices, static_argnums=2)
_step = jax.jit(step, static_argnums=5)


class LegalSteps:
    """The sentences that may come next in a plan for one task, by the simulator.

    Called with the sentences said so far, each of them legal when it was said; a plan that goes on
    from an earlier call costs one step of the simulator, on the host's request.

    Args:
        scene, state, names: the task, at its start.
        within: actions (verb, object, target) that may be used at all; None for every legal one.
        rules: rule set of the simulator.
    """

    def __init__(
        self,
        scene: Scene,
        state: State,
        names: Names,
        *,
        within: Collection[Action] | None = None,
        rules: Rules = REFERENCE,
    ):
        self._scene, self._names, self._rules = scene, names, rules
        self._within = within
        self._states: dict[tuple[str, ...], State] = {(): state}

    def __call__(self, said: Sequence[str] = ()) -> list[str]:
        """Sentences such as "Grab cup.", sorted.

        Raises:
            EgjaxError: a sentence that was said is none, or the simulator refuses it.
        """
        state = self._after(tuple(said))
        choices = jax.device_get(_legal(self._scene, state, self._rules))
        lines = legal_lines(self._scene, state, self._names, choices)
        kept = (a for a in lines if self._within is None or a in self._within)
        return sorted(to_english([lines[action]]) for action in kept)

    def _after(self, said: tuple[str, ...]) -> State:
        if said not in self._states:
            before = self._after(said[:-1])
            (line,) = parse_english(said[-1])
            action = bind(self._scene, before, self._names, line)
            state, code = jax.device_get(_step(self._scene, before, *action, self._rules))
            if code:
                raise EgjaxError(f"the simulator refuses {said[-1]!r}", where=f"step {len(said)}")
            self._states[said] = state
        return self._states[said]
