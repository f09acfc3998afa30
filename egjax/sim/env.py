"""The household as an environment for reinforcement learning, in gymnax's manner.

`reset(key, params)` and `step(key, state, action, params)` are pure functions of one environment;
`params` is a `Task`. They can be jitted, vmapped over keys, states and tasks, and scanned:

    import jax, jax.numpy as jnp
    from egjax.sim.env import Household

    env = Household(max_steps=32)

    def rollout(key, task, length=128):
        def body(carry, key):
            obs, state = carry
            act, world = jax.random.split(key)
            logits = jnp.where(obs.legal, 0.0, -jnp.inf)  # a policy takes the place of the 0.0
            action = jax.random.categorical(act, logits)
            obs, state, reward, done, info = env.step(world, state, action, task)
            return (obs, state), (reward, done, info["solved"])

        first, rest = jax.random.split(key)
        start = env.reset(first, task)
        return jax.lax.scan(body, start, jax.random.split(rest, length))[1]

    rollouts = jax.jit(jax.vmap(rollout, in_axes=(0, None)))
    rewards, dones, solved = rollouts(keys, task)  # [batch, length]

An action is an index into `params.actions`, or int32[3] (verb, object, target; -1 for none), any
grounded action of the scene: `egjax.sim.choices` draws legal ones. An illegal action changes
nothing and costs a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from egjax.sim.goals import all_performed, perform, satisfied
from egjax.sim.rules import Rules
from egjax.sim.vocab import STATE_SHIFT, STATES, Trait
from egjax.sim.world import REFERENCE, legal, step
from egjax.types import State, Task

__all__ = ["EnvState", "Household", "Observation", "observe"]

_FLAGS = STATE_SHIFT + len(STATES)


@struct.dataclass
class EnvState:
    """An episode under way.

    Attributes:
        state: of the household.
        achieved: bool[G]. Goal predicates that have held at some time in this episode.
        held: bool[G]. Goal predicates that hold now.
        performed: int32[]. How many of the wanted actions have been performed, in order.
        time: int32[]. Steps taken.
    """

    state: State
    achieved: Array
    held: Array
    performed: Array
    time: Array


@struct.dataclass
class Observation:
    """What a policy sees by default; see `observe`.

    Attributes:
        nodes: float32[N, F]. Bits of each node: the 24 flags of `State.nodes` (edges to and from
            the character, hands, cuts, object states), then the traits of `Trait`; F is 50.
        room: float32[N]. 1 for the room that the character is in, and for what the scene has INSIDE
            it at the start.
        goals: float32[G, 2]. Whether a goal predicate holds, and whether it is a real one.
        legal: bool[A]. Which actions of the task's table may be taken now.
        time: float32[]. Share of the episode's steps that are spent.
    """

    nodes: Array
    room: Array
    goals: Array
    legal: Array
    time: Array


def observe(state: EnvState, params: Task, env: Household) -> Observation:
    """Flags, traits, goals and the action mask of one environment.

    Edges between two objects are left out: they are 4·N² bits, of which the task's goals say what
    matters. A policy that wants them reads `params.scene.edges` and `state.state.added`.

    Args:
        state, params: where an episode stands, and its task.
        env: the environment, for the length of its episodes and its rules.
    """
    flags, props = state.state.nodes, params.scene.props

    def bits(words: Array, count: int) -> Array:
        return (words[:, None] >> jnp.arange(count, dtype=jnp.uint32)) & 1

    nodes = jnp.concatenate([bits(flags, _FLAGS), bits(props, len(Trait))], -1)
    here = ((flags >> 1) & 1).astype(bool) & (params.scene.room >= 0)
    parents = params.scene.inside
    within = ((parents >= 0) & here[jnp.maximum(parents, 0)]).any(-1)
    return Observation(
        nodes=nodes.astype(jnp.float32),
        room=(within | here).astype(jnp.float32),
        goals=jnp.stack([state.held, params.goal.mask], -1).astype(jnp.float32),
        legal=legal(params.scene, state.state, params.actions, env.rules),
        time=(state.time / env.max_steps).astype(jnp.float32),
    )


@dataclasses.dataclass(frozen=True)
class Household:
    """Environment of household tasks.

    Reward as in "Growing Through Experience" (arXiv 2506.01312), section 3.1; fields as in
    `egjax.search.household.Rewards`, so `Household(*rewards)` searches and learns alike.

    Attributes:
        gain: for each goal predicate that holds for the first time in the episode, and each wanted
            action that is performed.
        cost: of a step that brings none (negative).
        change: for each predicate that holds again, and its negative for each that holds no more.
        max_steps: an episode ends after so many steps, solved or not.
        observe: `(EnvState, Task, Household) -> observation`, any pytree.
        rules: rule set of the household.
    """

    gain: float = 2.0
    cost: float = -0.1
    change: float = 0.0
    max_steps: int = 64
    observe: Callable[[EnvState, Task, Household], Any] = observe
    rules: Rules = REFERENCE

    def num_actions(self, params: Task) -> int:
        """Size of a task's action table."""
        return params.actions.verb.shape[-1]

    def reset(self, key: Array, params: Task) -> tuple[Any, EnvState]:
        """The start of a task; nothing about it is random.

        Args:
            key: unused.
            params: the task.

        Returns:
            Observation and state.
        """
        del key
        params = jax.tree.map(jnp.asarray, params)
        held = satisfied(params.scene, params.state, params.goal)
        # Buffers of its own: who donates a state to a step must not lose the task's with it.
        start = jax.tree.map(jnp.copy, params.state)
        state = EnvState(start, jnp.copy(held), held, jnp.int32(0), jnp.int32(0))
        return self.observe(state, params, self), state

    def step(
        self, key: Array, state: EnvState, action: Array, params: Task
    ) -> tuple[Any, EnvState, Array, Array, dict[str, Array]]:
        """One step; where it ends the episode, observation and state are those of the next one.

        Args:
            key: consumed by the next episode's `reset`.
            state: where the episode stands.
            action: int32[], index into the task's table, or int32[3], a grounded action.
            params: the task.

        Returns:
            Observation, state, reward float32[], done bool[], and `info`: `solved` (all goals
            hold), `truncated` (the steps were spent), `legal` (the action was accepted), `code`
            (error number of `egjax.sim.world.step`), `discount` (0 where solved, else 1: the value
            of what follows counts after a mere time limit).
        """
        params = jax.tree.map(jnp.asarray, params)
        after, reward, done, info = self._advance(state, action, params)
        _, fresh = self.reset(key, params)
        new = jax.tree.map(lambda a, b: jnp.where(done, a, b), fresh, after)
        return self.observe(new, params, self), new, reward, done, info

    def step_env(
        self, key: Array, state: EnvState, action: Array, params: Task
    ) -> tuple[Any, EnvState, Array, Array, dict[str, Array]]:
        """As `step`, but the episode is not started anew."""
        del key
        params = jax.tree.map(jnp.asarray, params)
        after, reward, done, info = self._advance(state, action, params)
        return self.observe(after, params, self), after, reward, done, info

    def _advance(
        self, state: EnvState, action: Array, params: Task
    ) -> tuple[EnvState, Array, Array, dict[str, Array]]:
        table, action = params.actions, jnp.asarray(action)
        if action.ndim == 0:
            at = jnp.clip(action, 0, table.verb.shape[-1] - 1)
            chosen = (table.verb[at], table.obj[at], table.target[at])
            real = table.mask[at] & (action == at)
        else:
            chosen, real = (action[0], action[1], action[2]), jnp.bool_(True)
        moved, code = step(params.scene, state.state, *chosen, self.rules)
        accepted = real & (code == 0)
        moved = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), moved, state.state)
        held = satisfied(params.scene, moved, params.goal)
        performed = perform(params.goal, state.performed, chosen[0], chosen[1], accepted)
        count = partial(jnp.sum, dtype=jnp.float32)
        gained = count(held & ~state.achieved) + (performed - state.performed).astype(jnp.float32)
        kept = count(held & ~state.held & state.achieved) - count(state.held & ~held)
        reward = jnp.where(gained > 0, self.gain * gained, self.cost) + self.change * kept
        after = EnvState(moved, state.achieved | held, held, performed, state.time + 1)
        solved = jnp.all(held) & all_performed(params.goal, performed)
        late = after.time >= self.max_steps
        info = {
            "solved": solved,
            "truncated": (late | moved.overflow) & ~solved,
            "legal": accepted,
            "code": code,
            "discount": 1 - solved.astype(jnp.float32),
        }
        return after, reward.astype(jnp.float32), solved | late | moved.overflow, info
