"""How much of [tokens, vocabulary] exists at once, by platform, and loops over what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

__all__ = [
    "SIZES",
    "Sizes",
    "alike_mapped",
    "beside",
    "columns_at_once",
    "cut",
    "even",
    "fold",
    "indices",
    "loop",
    "moves_bits",
    "rounded",
    "rounded_to",
    "sizes",
    "split",
]

Array = jax.Array
T = TypeVar("T")
Start = Array | int


class Sizes(NamedTuple):
    """How much of [tokens, vocabulary] exists at once.

    Attributes:
        tokens: whose logits do, where they are formed a few tokens at a time. More are faster, at
            4·V bytes each an array.
        scored: whose teacher's scores do where they have arrays of their own and the student's
            logits lie in the gradient's place. Fewer are never worked on there.
        columns: of the vocabulary that are multiplied at once there; half as many of a matrix of 32
            bits, but on a CPU.
        block: the same a few tokens at a time.
        alone: logits that are summed over at once. Few stay in a CPU's cache.
        summed: the same in the gradient's place beside a teacher's scores, where arrays that XLA
            makes of what two sums read would be the only ones of their size.
        turned: logits that are turned into gradients at once, in the gradient's place.
        together: a teacher's scores lie there, too, where it is a `Head` or a `Ratio`.
    """

    tokens: int
    scored: int
    columns: int
    block: int
    alone: int
    summed: int
    turned: int
    together: bool


_ALL = 2**62
SIZES = {
    "cpu": Sizes(64, 64, 1024, 1024, 2**18, 2**18, 2**18, together=False),
    # A matrix is read from memory once for each chunk of tokens, and the float32 sum of its
    # gradient read and written: 2048 tokens make that an eighth of the time of the products.
    "gpu": Sizes(2048, 64, 3072, _ALL, _ALL, 2**21, 2**22, together=True),
    "tpu": Sizes(1024, 64, 4096, _ALL, 2**22, 2**22, 2**22, together=True),
}
"""By platform."""


def sizes() -> Sizes:
    """Of the platform that programs are traced for."""
    return SIZES.get(jax.default_backend(), SIZES["gpu"])


def columns_at_once(matrix: Array) -> int:
    """Columns of a matrix that are multiplied at once in the gradient's place."""
    wide = matrix.dtype.itemsize > 2 and jax.default_backend() != "cpu"
    return sizes().columns // (2 if wide else 1)


def rounded_to(dtype: Any) -> Any:
    """As what gradients of logits are multiplied with hidden states and matrix of a type: a CPU
    multiplies float32 fastest, accelerators 16 bits."""
    small = dtype.itemsize == 2 and jax.default_backend() != "cpu"
    return dtype if small else jnp.dtype(jnp.float32)


def moves_bits() -> bool:
    """Whether arrays of bfloat16 are cut and put together without being converted to float32 on the
    way, as XLA does on a CPU since JAX 0.11."""
    return jax.default_backend() == "cpu" and jax.__version_info__ >= (0, 11)


def rounded(x: Array, like: Array) -> Array:
    """Gradients as they are multiplied with hidden states or a matrix; see `rounded_to`."""
    return x.astype(rounded_to(like.dtype))


def alike_mapped(*trees: Any) -> Any:
    """The same, varying over the same axes of a `shard_map`.

    What comes back from a backward pass has the type of what went in, e.g. of weights that all
    devices share, and so has what a loop carries.
    """

    def varying(x: Any) -> frozenset[str]:
        typed = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
        return typed.manual_axis_type.varying if typed.manual_axis_type else frozenset()

    axes = frozenset[str]().union(*map(varying, jax.tree.leaves(trees)))

    def widen(x: Any) -> Any:
        missing = tuple(sorted(axes - varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(widen, trees)


def even(size: int, width: int) -> int:
    """At most `width`, and a divisor of `size` if there is one above half of that."""
    least = max(1, math.ceil(size / max(1, width)))
    count = next((n for n in range(least, 2 * least) if size % n == 0), least)
    return math.ceil(size / count)


def _start(index: Array, width: int) -> Array:
    """Of a block, in 32 bits: an index has 64 where JAX's numbers do, and they do not mix."""
    return index.astype(jnp.int32) * width


def indices(*starts: Start) -> Sequence[Any]:
    """Starts along several axes as XLA wants them, all of one type."""
    number = jnp.dtype("int32").type  # NumPy's: one of JAX's would be computed by the program
    return [number(x) if isinstance(x, int) else x for x in starts]


def loop(size: int, width: int, body: Callable[[Start, int, T], T], carry: T) -> T:
    """Goes through the blocks of an axis.

    Args:
        size: of the axis.
        width: of a block; the last one is as wide as what is left.
        body: (start, width of the block, carry) -> carry.
        carry: what the first block is given.
    """
    width = max(1, min(size, width))
    count, left = divmod(size, width)
    if count == 1:
        carry = body(0, width, carry)
    else:
        carry = jax.lax.fori_loop(0, count, lambda i, c: body(_start(i, width), width, c), carry)
    if left:
        # Not a constant: else the compiler cuts the last block out before it is needed.
        start, carry = jax.lax.optimization_barrier((jnp.int32(size - left), carry))
        carry = body(start, left, carry)
    return carry


def fold(
    size: int,
    width: int,
    block: Callable[[Start, int], Any],
    join: Callable[[Array, Array], Array],
    first: float,
) -> Any:
    """Joins arrays over the vocabulary of which only blocks exist.

    Args:
        size: of the axis.
        width: of a block.
        block: (start, width) -> arrays [n, ..., width].
        join: of two values, `jnp.add` or `jnp.maximum`.
        first: its neutral element.

    Returns:
        Of each array what all values of a row are joined to, [n].
    """
    width = max(1, min(size, width))
    count, left = divmod(size, width)

    def rows(lanes: Any) -> Any:
        over = jnp.sum if join is jnp.add else jnp.max
        return jax.tree.map(lambda x: over(x, axis=tuple(range(1, x.ndim))), lanes)

    # On a CPU a value for each lane, joined at the end: so every step is elementwise.
    late = jax.default_backend() == "cpu"

    def add(index: Array, total: Any) -> Any:
        part = block(_start(index, width), width)
        return jax.tree.map(join, total, part if late else rows(part))

    if count == 1:
        total = rows(block(0, width))
    else:
        shapes = jax.eval_shape(lambda: block(0, width))
        shapes = shapes if late else jax.eval_shape(rows, shapes)
        nothing = jax.tree.map(
            lambda x: alike_mapped(jnp.full(x.shape, first, x.dtype), x)[0], shapes
        )
        total = jax.lax.fori_loop(0, count, add, nothing)
        total = rows(total) if late else total
    return jax.tree.map(join, total, rows(block(size - left, left))) if left else total


def split(x: Array, axis: int, shards: int) -> Array:
    """Gives an axis of V columns an axis of devices in front, if there are several."""
    if shards == 1:
        return x
    return x.reshape(*x.shape[:axis], shards, x.shape[axis] // shards, *x.shape[axis + 1 :])


def cut(x: Array, start: Start, width: int) -> Array:
    """Columns `start` to `start + width`."""
    return jax.lax.dynamic_slice_in_dim(x, start, width, axis=x.ndim - 1)


def beside(x: Array, like: Array) -> Array:
    """One value a token, [n], shaped to go with [n, ...]."""
    return x.reshape(-1, *(1,) * (like.ndim - 1))
