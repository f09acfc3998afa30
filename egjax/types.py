"""The nouns of egjax: array-only pytrees that every floor of the house shares.

Shapes are those of a single item; `jax.vmap` adds the batch. Symbols: N nodes (padded), D doors,
R rooms, P parents, X overlay edges, G goal predicates, K instances that may satisfy them,
A actions of a task's table, M objects that they name. Strings stay on the host.
"""

from __future__ import annotations

from flax import struct
from jax import Array

__all__ = ["ActionTable", "Goal", "Scene", "State", "Task"]


@struct.dataclass
class Scene:
    """What never changes in an episode. Nodes are addressed by index 0..N-1, not by graph id.

    Attributes:
        edges: uint32[N, N/4]. Initial edges that do not touch the character, from both ends: row
            `o` has a byte for every x, with the edges o→x (ON, INSIDE, CLOSE, FACING) in bits 0-3
            and those x→o in bits 4-7. Byte k of word w is that of x = k·N/4 + w.
        inside: int32[N, P]. Nodes that a node is initially INSIDE (as in `edges`), then -1.
        ids: int32[N]. Graph id of each node; padding has -1.
        rank, by_rank: int32[N]. Rank of each node by id, and the node of each rank.
        props: uint32[N]. Properties and other fixed traits, see `egjax.sim.vocab.Trait`.
        sit_capacity, lie_capacity: int32[N]. How many things may be ON a seat or bed.
        room: int32[N]. Room number 0..R-1, in the order of ids, of a node that is a room, else -1.
        room_node: int32[R]. Node index of each room, -1 for padding.
        character: int32[]. Node index of the character.
        door_node: int32[D]. Node index of each door or doorjamb, -1 for padding.
        door_rooms: int32[D, 2]. The two room numbers that it connects, -1 where it connects none.
        door_between: uint32[D]. Bit mask of the rooms it is BETWEEN.
        door_path: int32[R, R, D]. Doors (indices into `door_node`) on the reference's breadth-first
            path from a room to another, in walking order, -1 after its end.
        connected: bool[R, R]. Whether such a path exists.
    """

    edges: Array
    inside: Array
    ids: Array
    rank: Array
    by_rank: Array
    props: Array
    sit_capacity: Array
    lie_capacity: Array
    room: Array
    room_node: Array
    character: Array
    door_node: Array
    door_rooms: Array
    door_between: Array
    door_path: Array
    connected: Array


@struct.dataclass
class State:
    """What changes in an episode; a search tree stores one a node, so it is kept small.

    Attributes:
        nodes: uint32[N]. Flags of each node x. Bits 0-3: edges character→x (ON, INSIDE, CLOSE,
            FACING); bits 4-7: x→character; bit 8, 9: held in the right, left hand; bits 10-13:
            initial edges of that relation at x are cut; bits 14-23: object states.
        added: uint32[X]. Edges between objects that were added, a pair (a, b) a slot: `a·2^20 +
            b·2^8` + the byte of edges that row a of `Scene.edges` would have for b; 0 for a free
            slot.
        grabbed: int16[N]. Where a held object was taken from: `y·4 + relation`, -1 for nowhere.
        overflow: bool[]. An edge had no free slot; the state is no longer exact.
    """

    nodes: Array
    added: Array
    grabbed: Array
    overflow: Array


@struct.dataclass
class Goal:
    """Predicates that must all hold. By class: any of the acceptable objects serves.

    Attributes:
        subject: int32[K]. A node that may satisfy a predicate, for all predicates in one list; -1
            for padding.
        predicate: int32[K]. The predicate that it may satisfy.
        bit: int32[G]. Object state: its bit in `State.nodes` (14-23). Relation: its bit in the
            subject's row of edges (0-3 outgoing ON, INSIDE, CLOSE, FACING, 4-7 incoming; 8, 9
            held in the right, left hand).
        others: uint8[G, N]. Relation: 255 at acceptable far ends, else 0; unused for states.
        mask: bool[G]. True for a real predicate.
    """

    subject: Array
    predicate: Array
    bit: Array
    others: Array
    mask: Array


@struct.dataclass
class ActionTable:
    """The grounded actions a task may use; search sees their index.

    Attributes:
        verb: int32[A]. Verb number, see `egjax.sim.vocab.VERBS`.
        obj: int32[A]. Node index of the first argument, -1 where the verb takes none.
        target: int32[A]. Node index of the second argument, -1 where the verb takes none.
        mask: bool[A]. True for a real action.
        objects: int32[M]. Every node the table names, once; -1 for padding.
        obj_slot, target_slot: int32[A]. Where `obj` and `target` stand in `objects`, 0 for none.
    """

    verb: Array
    obj: Array
    target: Array
    mask: Array
    objects: Array
    obj_slot: Array
    target_slot: Array


@struct.dataclass
class Task:
    """A scene, where it starts, what is wanted and what may be done. Arrays only."""

    scene: Scene
    state: State
    goal: Goal
    actions: ActionTable
