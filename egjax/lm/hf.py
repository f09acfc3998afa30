"""Llama checkpoints in Hugging Face's layout, in and out: `config.json` and safetensors.

One tensor at a time is read and put where its part of the stacked parameters belongs, so a host
needs memory for one tensor and for the shards of its own devices. Neither torch nor pickle is
used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from egjax.errors import EgjaxError, require
from egjax.lm.config import LlamaConfig
from egjax.lm.params import Params, Spec, shardings, table

__all__ = ["load", "save"]

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_OUTSIDE = {
    ("embedding",): "model.embed_tokens.weight",
    ("final_norm",): "model.norm.weight",
    ("unembedding",): "lm_head.weight",
}
_INSIDE = {
    "attention_norm": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "mlp_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "query_bias": "self_attn.q_proj.bias",
    "key_bias": "self_attn.k_proj.bias",
    "value_bias": "self_attn.v_proj.bias",
    "output_bias": "self_attn.o_proj.bias",
    "gate_bias": "mlp.gate_proj.bias",
    "up_bias": "mlp.up_proj.bias",
    "down_bias": "mlp.down_proj.bias",
}


@dataclass(frozen=True)
class _Place:
    """How one of our tensors lies in a Hugging Face file.

    Attributes:
        names: its name there; a stacked tensor has one per layer.
        stacked: it has a leading axis of layers.
        shape: shape of one layer of it (or of it) here.
        outer: its shape there.
        transposed: there it is [out, in], here [in, out].
    """

    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    outer: tuple[int, ...]
    transposed: bool

    def inward(self, array: np.ndarray) -> np.ndarray:
        """From the file's shape to ours."""
        return (array.T if self.transposed else array).reshape(self.shape)

    def outward(self, array: np.ndarray) -> np.ndarray:
        """From our shape to the file's."""
        if self.transposed:
            array = array.reshape(self.outer[::-1]).T
        return np.ascontiguousarray(array.reshape(self.outer))


def _places(config: LlamaConfig) -> dict[tuple[str, ...], _Place]:
    """Where each tensor of the table lies, by its path in the parameters."""
    places = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(table(config)):
        keys = tuple(part.key for part in path)
        stacked = keys[0] == "layers"
        if stacked:
            layers = range(config.num_layers)
            names = tuple(f"model.layers.{layer}.{_INSIDE[keys[1]]}" for layer in layers)
        else:
            names = (_OUTSIDE[keys],)
        shape = spec.shape[stacked:]
        places[keys] = _Place(names, stacked, shape, *_outer(keys[-1], shape, spec.axes[stacked:]))
    return places


def _outer(name: str, shape: tuple[int, ...], axes: tuple[str, ...]):
    """The file's shape of a tensor, and whether it is transposed there."""
    if name.endswith(("_norm", "_bias")):
        return (int(np.prod(shape)),), False
    if name == "embedding":
        return shape, False
    # Of a matrix the axes around `embed` are its inputs or its outputs, all of them.
    inputs = 1 if axes[0] == "embed" else len(shape) - 1
    return (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs]))), True


class _Files:
    """The tensors of a checkpoint's files, opened once and read when asked for."""

    def __init__(self, folder: Path, stack: ExitStack):
        safetensors = require("safetensors", "lm")
        self._handles: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                handle = stack.enter_context(safetensors.safe_open(path, "np"))
            except Exception as error:  # SafetensorError and OSError have no common base
                raise EgjaxError(f"cannot be read: {error}", where=str(path)) from error
            self._handles.update({name: (path, handle) for name in handle.keys()})  # noqa: SIM118
        self._folder = folder

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return str(self._handles[name][0]) if name in self._handles else str(self._folder)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as stored.

        Raises:
            EgjaxError: no file holds it.
        """
        if name not in self._handles:
            raise EgjaxError(
                f"tensor {name} is missing",
                where=str(self._folder),
                remedy="the configuration and the weights do not belong together",
            )
        return tuple(self._handles[name][1].get_slice(name).get_shape())

    def rows(self, name: str, count: int) -> np.ndarray:
        """The first rows of a tensor."""
        return self._handles[name][1].get_slice(name)[:count]


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    index = folder / INDEX
    if index.is_file():
        weights = _json(index).get("weight_map")
        if not isinstance(weights, dict):
            raise EgjaxError("has no weight_map", where=str(index))
        paths = [folder / name for name in sorted(set(weights.values()))]
    else:
        paths = [folder / SINGLE]
    for path in paths:
        if not path.is_file():
            raise EgjaxError(
                "file is missing", where=str(path), remedy="weights are read from safetensors only"
            )
    return paths


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of a file."""
    if not path.is_file():
        raise EgjaxError("file is missing", where=str(path), remedy="give a model's folder")
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise EgjaxError(f"not JSON: {error}", where=str(path)) from error
    if not isinstance(fields, dict):
        raise EgjaxError("not a JSON object", where=str(path))
    return fields


def load(
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: str | None = None,
    vocab_size: int | None = None,
) -> tuple[LlamaConfig, Params]:
    """Reads a Llama from a Hugging Face folder.

    Args:
        folder: holds `config.json` and `model.safetensors`, or an index and its shards.
        mesh: where to put the parameters; None for the default device.
        dtype: of the parameters; None for that of the file's configuration.
        vocab_size: keep this many tokens, for a file whose vocabulary is padded beyond its
            tokenizer's; None keeps all.

    Returns:
        The config and the parameters.

    Raises:
        EgjaxError: a file is missing or unreadable, the architecture is not a Llama, a tensor is
            missing or of the wrong shape.
    """
    folder = Path(folder)
    config = LlamaConfig.from_hf(_json(folder / CONFIG), where=str(folder / CONFIG))
    if dtype is not None:
        config = replace(config, dtype=dtype)
    stored_vocab = config.vocab_size
    if vocab_size is not None:
        if vocab_size > stored_vocab:
            raise EgjaxError(
                f"the model has {stored_vocab} tokens, {vocab_size} are wanted",
                where=str(folder / CONFIG),
                remedy="the tokenizer belongs to another model",
            )
        config = replace(config, vocab_size=vocab_size)
    device = SingleDeviceSharding(jax.local_devices()[0])
    placements = (
        jax.tree.map(lambda _: device, table(config)) if mesh is None else shardings(config, mesh)
    )
    places = _places(config)
    with ExitStack() as stack:
        files = _Files(folder, stack)
        _check_shapes(files, places, stored_vocab - config.vocab_size)

        def fetch(path, spec: Spec, placement) -> jax.Array:
            place = places[tuple(part.key for part in path)]
            return jax.make_array_from_callback(
                spec.shape, placement, lambda index: _part(files, place, spec, index)
            )

        return config, jax.tree_util.tree_map_with_path(fetch, table(config), placements)


def _check_shapes(files: _Files, places: dict[tuple[str, ...], _Place], cut: int) -> None:
    """Raises unless every tensor is there in its shape; `cut` rows of the vocabulary will go."""
    for keys, place in places.items():
        expected = place.outer
        if keys[0] in ("embedding", "unembedding"):
            expected = (expected[0] + cut, *expected[1:])
        for name in place.names:
            shape = files.shape(name)
            if shape != expected:
                raise EgjaxError(
                    f"tensor {name} has shape {list(shape)}, expected {list(expected)}",
                    where=files.where(name),
                    remedy="the configuration and the weights do not belong together",
                )


def _part(files: _Files, place: _Place, spec: Spec, index: Any) -> np.ndarray:
    """One device's part of a tensor, read layer by layer."""
    dtype = jnp.dtype(spec.dtype)
    if not place.stacked:
        whole = place.inward(files.rows(place.names[0], place.outer[0]))
        return whole[index].astype(dtype)
    parts = [
        place.inward(files.rows(name, place.outer[0]))[index[1:]].astype(dtype)
        for name in place.names[index[0]]
    ]
    return np.stack(parts)


def save(folder: str | Path, config: LlamaConfig, params: Params) -> None:
    """Writes a checkpoint that transformers loads as `LlamaForCausalLM`.

    Args:
        folder: made if need be; `config.json` and `model.safetensors` in it are replaced, each in
            one step, so that a full disk leaves the old ones.
        config: the model.
        params: its parameters.

    Raises:
        EgjaxError: the files cannot be written.
    """
    numpy_io = require("safetensors.numpy", "lm")
    folder = Path(folder)
    tensors = dict(_tensors(config, params))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(
            folder / SINGLE,
            lambda path: numpy_io.save_file(tensors, path, metadata={"format": "pt"}),
        )
        text = json.dumps(config.to_hf(), indent=2) + "\n"
        _replace(folder / CONFIG, lambda path: path.write_text(text))
    except OSError as error:
        raise EgjaxError(f"cannot be written: {error}", where=str(folder)) from error


def _tensors(config: LlamaConfig, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of the file's tensors."""
    for (*parents, last), place in _places(config).items():
        node = params
        for parent in parents:
            node = node[parent]
        array = np.asarray(jax.device_get(node[last]))
        for name, value in zip(place.names, array if place.stacked else [array]):
            yield name, place.outward(value)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside a file, then puts the new one in its place."""
    beside = path.with_name(path.name + ".part")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
