"""Small worlds with known answers."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import jax.numpy as jnp

from egjax.search.mcts import World

SIDE = 4


class Arms(NamedTuple):
    """Params of the bandit: pay of each arm and which arms exist."""

    pay: jnp.ndarray
    legal: jnp.ndarray


def _pull(params, pulled, action):
    return pulled + 1, params.pay[action], jnp.zeros((), bool), jnp.ones((), bool)


bandit = World(lambda params, pulled: params.legal, _pull)
"""One pull, then it is over."""

# Rooms of a 4 × 4 grid; a key at `key`, a locked door at `door` that needs it. Actions: four moves,
# then "take".
_MOVES = jnp.array([[0, 1], [0, -1], [1, 0], [-1, 0]])


class Maze(NamedTuple):
    """Params of the puzzle: cells as x · 4 + y, and whether nothing may be done at all."""

    key: jnp.ndarray
    door: jnp.ndarray
    stuck: jnp.ndarray


def _maze_legal(params, state):
    x, y, has_key = state[0], state[1], state[2]
    to = jnp.stack([x, y]) + _MOVES
    inside = jnp.all((to >= 0) & (to < SIDE), axis=1)
    open_ = (to[:, 0] * SIDE + to[:, 1] != params.door) | (has_key > 0)
    take = (x * SIDE + y == params.key) & (has_key == 0)
    return jnp.append(inside & open_, take) & ~params.stuck


def _maze_step(params, state, action):
    move = _MOVES[jnp.minimum(action, 3)] * (action < 4)
    x, y = state[0] + move[0], state[1] + move[1]
    has_key = jnp.maximum(state[2], action == 4)
    solved = x * SIDE + y == params.door
    gained = solved.astype(jnp.float32) + (has_key > state[2])
    reward = jnp.where(gained > 0, 2.0 * gained, -0.1).astype(jnp.float32)
    after = jnp.stack([x, y, has_key]).astype(jnp.int32)
    return after, reward, solved, jnp.zeros((), bool)


maze = World(_maze_legal, _maze_step)
"""Fetch the key, go through the door."""


def shortest(key: int, door: int, start: tuple[int, int, int]) -> int:
    """Brute force: the number of steps of the shortest solution of the puzzle."""
    queue, seen = deque([(start, 0)]), {start}
    while queue:
        (x, y, has_key), steps = queue.popleft()
        if x * SIDE + y == door:
            return steps
        for dx, dy in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            to = (x + dx, y + dy, has_key)
            if not (0 <= to[0] < SIDE and 0 <= to[1] < SIDE):
                continue
            if to[0] * SIDE + to[1] == door and not has_key:
                continue
            if to not in seen:
                seen.add(to)
                queue.append((to, steps + 1))
        if x * SIDE + y == key and not has_key and (x, y, 1) not in seen:
            seen.add((x, y, 1))
            queue.append(((x, y, 1), steps + 1))
    raise AssertionError("no solution")
