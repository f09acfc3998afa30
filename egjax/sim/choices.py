"""The legal actions of a whole scene, counted and drawn as they are needed; batch with vmap.

A house has some 263,000 grounded actions, nearly all of them pairs of objects: no table holds them.
But the two-argument verbs ask of the first argument that it be held, so their legal actions are
(held things) × targets, and those of the others are one row of objects a verb.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from egjax.sim.rules import Rules
from egjax.sim.vocab import VERBS, Flag
from egjax.sim.world import REFERENCE, legal
from egjax.types import ActionTable, Scene, State

__all__ = ["HELD", "Choices", "contains", "draw", "legal_choices"]

HELD = 4
"""Held things that may be put or poured, at most; a character has two hands, but a graph may put
several things into one."""

_ARITY = np.array([verb.arity for verb in VERBS], np.int32)
_NONE, _ONE, _PAIRS = (np.flatnonzero(count == _ARITY).astype(np.int32) for count in range(3))
_PAIR_ROW = np.maximum(np.cumsum(_ARITY == 2, dtype=np.int32) - 1, 0)


@struct.dataclass
class Choices:
    """All legal grounded actions of one state. V verbs, P of them with two arguments.

    Attributes:
        count: int32[V]. Legal actions of each verb.
        objects: bool[V, N]. Legal first arguments of the verbs with one argument; of a verb with
            none, True in column 0 if it is legal; False for verbs with two.
        held: int32[HELD]. Things held, lowest node first; -1 for none.
        targets: bool[P, HELD, N]. Legal second arguments of the verbs with two, a held thing.
    """

    count: Array
    objects: Array
    held: Array
    targets: Array


def legal_choices(scene: Scene, state: State, rules: Rules = REFERENCE) -> Choices:
    """The legal actions of a scene's state, as `egjax.sim.world.legal` has them: FIND of something
    far away is legal where walking there is.

    Args:
        scene, state: one scene and state.
        rules: rule set; its two-argument verbs must ask that the first be held.
    """
    scene, state = jax.tree.map(jnp.asarray, (scene, state))
    nodes = jnp.arange(scene.ids.shape[0], dtype=jnp.int32)

    def row(verb: Array, obj: Array, target: Array) -> Array:
        """Legality of one verb on rows of arguments; facts about the nodes are computed once."""
        verb, obj, target = jnp.broadcast_arrays(verb, obj, target)
        slots = jnp.maximum(obj, 0), jnp.maximum(target, 0)
        table = ActionTable(verb, obj, target, jnp.ones(obj.shape, bool), nodes, *slots)
        return legal(scene, state, table, rules)

    none = jnp.full((1,), -1, jnp.int32)
    one = jax.vmap(lambda verb: row(verb, nodes, none))(jnp.asarray(_ONE, jnp.int32))
    alone = row(jnp.asarray(_NONE, jnp.int32), none, none)
    objects = jnp.zeros((len(VERBS), nodes.shape[0]), bool)
    objects = objects.at[_ONE].set(one).at[_NONE, 0].set(alone)
    is_held = (state.nodes & (Flag.HOLDS_RH | Flag.HOLDS_LH).value) != 0
    (held,) = jnp.nonzero(is_held, size=HELD, fill_value=-1)
    held = held.astype(jnp.int32)
    pairs = jax.vmap(lambda verb: jax.vmap(lambda thing: row(verb, thing, nodes))(held))
    targets = pairs(jnp.asarray(_PAIRS, jnp.int32)) & (held >= 0)[:, None]
    count = jnp.sum(objects, -1, dtype=jnp.int32)
    count = count.at[_PAIRS].set(jnp.sum(targets, (-1, -2), dtype=jnp.int32))
    return Choices(count, objects, held, targets)


def draw(key: Array, choices: Choices, *, verb_first: bool = True) -> Array:
    """A legal action at random.

    Args:
        key: consumed.
        choices: of one state.
        verb_first: draw among the verbs that have a legal action, then among its actions; else all
            legal actions are alike, and walking, legal almost everywhere, is drawn nearly always.

    Returns:
        int32[3]: verb and node indices of the arguments, -1 for none.
    """
    verb_key, place_key = jax.random.split(key)
    weight = choices.count > 0 if verb_first else choices.count
    verb = jax.random.categorical(verb_key, jnp.log(weight.astype(jnp.float32))).astype(jnp.int32)
    most = jnp.maximum(choices.count[verb], 1)
    nth = jax.random.randint(place_key, (), 0, most, dtype=jnp.int32)

    def place(row: Array) -> Array:
        return jnp.searchsorted(jnp.cumsum(row, dtype=jnp.int32), nth + 1).astype(jnp.int32)

    arity = jnp.asarray(_ARITY)[verb]
    nodes = choices.objects.shape[-1]
    single = place(choices.objects[verb])
    pair = place(choices.targets[jnp.asarray(_PAIR_ROW)[verb]].reshape(-1))
    obj = jnp.where(arity == 2, choices.held[pair // nodes], jnp.where(arity == 1, single, -1))
    target = jnp.where(arity == 2, pair % nodes, -1)
    return jnp.stack([verb, obj, target]).astype(jnp.int32)


def contains(choices: Choices, action: Array) -> Array:
    """Whether a grounded action int32[3] (verb, object, target; -1 for none) is legal, bool[]."""
    verb, obj, target = action
    arity = jnp.asarray(_ARITY)[verb]
    given = (obj >= 0).astype(jnp.int32) + (target >= 0).astype(jnp.int32)
    single = choices.objects[verb, jnp.maximum(obj, 0)]
    pair = choices.targets[jnp.asarray(_PAIR_ROW)[verb], :, jnp.maximum(target, 0)]
    pair = (pair & (choices.held == obj) & (obj >= 0)).any()
    return jnp.where(arity == 2, pair, single) & (given == arity)
