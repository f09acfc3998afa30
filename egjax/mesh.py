"""Device meshes, and placement of parameters and batches on them, over one process or many.

Every array names its axes logically ("vocab", "heads", "batch", ...); one table of rules says which
mesh axis each name is split over. The axes of a mesh are `data` (batch, and fully sharded
parameters) and `model` (tensor parallelism).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from egjax.errors import EgjaxError

__all__ = [
    "ONE_CORE",
    "RULES",
    "batch_of",
    "batch_sharding",
    "check_divides",
    "constrain",
    "local_rows",
    "make_mesh",
    "mesh_in_use",
    "place",
    "sharding",
]

ONE_CORE: Mapping[str, bool] = MappingProxyType({"xla_cpu_multi_thread_eigen": False})
"""Compiler options of `jax.jit` for programs of many small operations that run side by side, such
as a batch of households: a CPU device then keeps to one core. Splitting each operation over two
cores brings little (measured: 1.2 times one core's rate, two such programs 1.9 times)."""

RULES: Mapping[str, str] = MappingProxyType(
    {
        "batch": "data",
        "length": "model",
        "embed": "data",
        "vocab": "model",
        "heads": "model",
        "kv_heads": "model",
        "mlp": "model",
    }
)
"""Mesh axis of each logical axis; a name that is not listed is never split."""


def make_mesh(*, data: int | None = None, model: int = 1, devices: Sequence[Any] | None = None):
    """Builds the mesh with axes `("data", "model")`.

    Args:
        data: devices along `data`; None takes all that `model` leaves.
        model: devices along `model`.
        devices: devices to use; None takes all of them.

    Returns:
        A `Mesh` of `data · model` devices whose axes are `AxisType.Auto`: the default, Explicit,
        refuses embedding lookups and optax's integer cross-entropy on a sharded vocabulary.

    Raises:
        EgjaxError: the sizes do not fit the number of devices.
    """
    found = list(jax.devices() if devices is None else devices)
    if model < 1 or (data is not None and data < 1):
        raise EgjaxError(f"mesh of data={data}, model={model}", remedy="give sizes of at least 1")
    rows = len(found) // model if data is None else data
    if rows == 0 or rows * model > len(found) or (data is None and rows * model != len(found)):
        raise EgjaxError(
            f"a mesh of data={data}, model={model} does not fit {len(found)} devices",
            remedy="choose sizes whose product is at most the number of devices",
        )
    shape, names, types = (rows, model), ("data", "model"), (AxisType.Auto, AxisType.Auto)
    chosen = found[: rows * model]
    try:
        return jax.make_mesh(shape, names, axis_types=types, devices=chosen)
    except NotImplementedError:
        # Of a torus of 4 × 4 × 4, say, axes of 8 × 8 take one dimension apart.
        laid = mesh_utils.create_device_mesh(shape, chosen, allow_split_physical_axes=True)
        return Mesh(laid, names, axis_types=types)


def sharding(
    mesh: Mesh | AbstractMesh,
    axes: Sequence[str | None],
    shape: Sequence[int],
    rules: Mapping[str, str] = RULES,
) -> NamedSharding:
    """Placement of one array.

    Args:
        mesh: the mesh.
        axes: logical name of each dimension, None for one that is never split.
        shape: size of each dimension.
        rules: mesh axis of each logical name.

    Returns:
        The sharding. A dimension that its mesh axis does not divide stays whole, and a mesh axis
        is used once, by the first dimension that asks for it.
    """
    used: set[str] = set()
    spec: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        axis = rules.get(name) if name else None
        fits = axis is not None and axis not in used and size % mesh.shape[axis] == 0
        spec.append(axis if fits else None)
        if fits and axis is not None:
            used.add(axis)
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Placement of a batch: its leading axis is split over `data`, the rest is whole."""
    return NamedSharding(mesh, PartitionSpec("data"))


def mesh_in_use() -> AbstractMesh | None:
    """The mesh that code is being traced for (`jax.set_mesh`), if it has our axes; else None."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = mesh.axis_names == ("data", "model") and set(mesh.axis_types) == {AxisType.Auto}
    return mesh if ours else None


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pins where an intermediate array lies on the mesh in use; without one it does nothing.

    What the compiler is left to choose it may choose badly: the rows of an embedding, say, lie
    split along their width, and so would all that is computed from them.

    Args:
        x: an array.
        axes: logical name of each dimension, None for one that is whole on every device.
    """
    mesh = mesh_in_use()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape))


def place(tree: Any, shardings: Any) -> Any:
    """Puts arrays that every process holds whole onto a mesh that may span processes.

    Args:
        tree: pytree of arrays, equal on all processes.
        shardings: pytree of `NamedSharding` alike.

    Returns:
        Global arrays; each process has sent its devices' parts only.
    """

    def put(array: Any, to: NamedSharding) -> jax.Array:
        if to.is_fully_addressable:
            return jax.device_put(array, to)
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, to, lambda part: whole[part])

    return jax.tree.map(put, tree, shardings)


def local_rows(sharding: NamedSharding, rows: int) -> np.ndarray:
    """int[r]: which rows of a batch of `rows` this process' devices hold, in order."""
    numbers = np.arange(rows)
    parts = sharding.addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([numbers[part] for part in parts if part is not None]))


def batch_of(local: Any, sharding: NamedSharding, rows: int) -> Any:
    """A global batch of `rows` rows from each process' `local_rows` of it."""

    def gather(part: Any) -> jax.Array:
        shape = (rows, *part.shape[1:])
        return jax.make_array_from_process_local_data(sharding, part, shape)

    return jax.tree.map(gather, local)


def check_divides(mesh: Mesh, batch: int) -> None:
    """Raises `EgjaxError` unless a batch of this size splits evenly over `data`."""
    rows = mesh.shape["data"]
    if batch % rows:
        raise EgjaxError(
            f"a batch of {batch} does not split over {rows} devices",
            remedy=f"use a multiple of {rows}, e.g. {math.ceil(batch / rows) * rows}",
        )
