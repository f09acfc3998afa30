"""Llama checkpoints in Hugging Face's layout, in and out: `config.json` and safetensors.

Both ways one matrix of one layer at a time is on the host, and of that only what its own devices
keep, so host memory does not grow with the model. Neither torch nor pickle is used, and nothing
from a checkpoint is executed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from egjax.errors import EgjaxError, require
from egjax.lm.config import LlamaConfig, read_ids
from egjax.lm.params import Params, Spec, num_inputs, shardings, table

__all__ = [
    "SHARD_BYTES",
    "Files",
    "Place",
    "load",
    "read_config",
    "read_json",
    "read_tensors",
    "save",
    "write",
]

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_OWN = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
SHARD_BYTES = 5 * 10**9
"""Largest file that `save` writes; larger models become several files and an index."""

# Types of weights as safetensors names them. What else there is (integers, 8-bit floats) is
# quantised, and its scales lie elsewhere.
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}

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
class Place:
    """How one of our tensors lies in a Hugging Face file.

    Attributes:
        names: its name there; a stacked tensor has one per layer.
        stacked: it has a leading axis of layers.
        shape: shape of one layer of it (or of it) here.
        inputs: how many of these axes come first; they are one axis in the file, the rest another.
        transposed: in the file it is [out, in], here [in, out].
    """

    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    inputs: int
    transposed: bool

    @property
    def outer(self) -> tuple[int, ...]:
        """Its shape in the file."""
        sizes = tuple(math.prod(shape) for shape in self._groups(self.shape))
        return sizes[::-1] if self.transposed else sizes

    def read(self, part: Callable[[tuple[slice, ...]], np.ndarray], index: Any) -> np.ndarray:
        """A part of one layer of it.

        Args:
            part: reads slices of the file's tensor.
            index: slices of our shape.
        """
        spans = [range(*cut.indices(size)) for cut, size in zip(index, self.shape, strict=True)]
        cuts = [slice(span.start, span.stop) for span in spans]
        slabs, shape = [], []
        for sizes, group in zip(self._groups(self.shape), self._groups(cuts), strict=True):
            # Of the axes that are one in the file the first is cut there, the others here.
            inner = math.prod(sizes[1:])
            slabs.append(slice(group[0].start * inner, group[0].stop * inner))
            shape += [group[0].stop - group[0].start, *sizes[1:]]
        array = part(tuple(slabs[::-1] if self.transposed else slabs))
        array = (array.T if self.transposed else array).reshape(shape)
        firsts = (0, self.inputs)
        return array[tuple(slice(None) if i in firsts else cut for i, cut in enumerate(cuts))]

    def outward(self, array: np.ndarray) -> np.ndarray:
        """From our shape of one layer to the file's."""
        if self.transposed:
            array = array.reshape(self.outer[::-1]).T
        return np.ascontiguousarray(array.reshape(self.outer))

    def _groups(self, items: Sequence[Any]) -> list[Sequence[Any]]:
        """Items of our axes by the axis of the file that they belong to."""
        return [group for group in (items[: self.inputs], items[self.inputs :]) if len(group)]


def _places(config: LlamaConfig) -> dict[tuple[str, ...], Place]:
    """Where each tensor of the table lies, by its path in the parameters."""
    places = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(table(config)):
        keys = tuple(part.key for part in path)
        name, stacked = keys[-1], keys[0] == "layers"
        if stacked:
            layers = range(config.num_layers)
            names = tuple(f"model.layers.{layer}.{_INSIDE[name]}" for layer in layers)
        else:
            names = (_OUTSIDE[keys],)
        shape = spec.shape[stacked:]
        if name.endswith(("_norm", "_bias")):
            inputs, transposed = len(shape), False
        elif stacked:
            inputs, transposed = num_inputs(spec), True
        else:
            inputs, transposed = 1, name == "unembedding"
        places[keys] = Place(names, stacked, shape, inputs, transposed)
    return places


class Files:
    """The tensors of safetensors files, opened at once and read when asked for.

    Args:
        paths: the files.
        stack: closes them.
        index: name of the file that holds a tensor, by the tensor's name, where several might.

    Raises:
        EgjaxError: a file is missing, cut short or otherwise unreadable.
    """

    def __init__(
        self, paths: Sequence[Path], stack: ExitStack, index: Mapping[str, str] | None = None
    ):
        safetensors = require("safetensors", "lm")
        self._folder = paths[0].parent
        self._handles: dict[str, Any] = {}
        for path in paths:
            if not path.is_file():
                raise EgjaxError("file is missing", where=str(path), remedy=_why_missing(path))
            try:
                # This compares the file's size with what its header promises, too.
                handle = stack.enter_context(safetensors.safe_open(path, "np"))
            except Exception as error:  # SafetensorError and OSError have no common base
                raise EgjaxError(
                    f"cannot be read: {error}", where=str(path), remedy="download it again"
                ) from error
            for name in handle.keys():  # noqa: SIM118
                if (index or {}).get(name, path.name) == path.name:
                    self._handles[name] = (path, handle)

    def names(self) -> list[str]:
        """All tensors."""
        return list(self._handles)

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        return str(self._handles[name][0]) if name in self._handles else str(self._folder)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises `EgjaxError` unless a tensor is there, in this shape, in a type of floats."""
        if name not in self._handles:
            raise EgjaxError(f"tensor {name} is missing", where=self.where(name), remedy=_MISMATCH)
        entry = self._handles[name][1].get_slice(name)
        if tuple(entry.get_shape()) != shape:
            raise EgjaxError(
                f"tensor {name} has shape {list(entry.get_shape())}, expected {list(shape)}",
                where=self.where(name),
                remedy=_MISMATCH,
            )
        if entry.get_dtype() not in _DTYPES.values():
            raise EgjaxError(
                f"tensor {name} is of type {entry.get_dtype()}",
                where=self.where(name),
                remedy="quantised weights are not read; give the model in float32 or bfloat16",
            )

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, a copy of its own."""
        return self._handles[name][1].get_slice(name)[slices]


_MISMATCH = "the configuration and the weights do not belong together"


def _why_missing(path: Path) -> str:
    """What to do about a missing file of weights."""
    pickled = sorted(file.name for file in path.parent.glob("*.bin"))
    if pickled:
        return f"{pickled[0]} is a pickle and never read; convert it to safetensors"
    return "weights are read from safetensors only"


def _weights(folder: Path, stack: ExitStack) -> Files:
    """The tensors of a checkpoint; as in transformers a single file goes before an index."""
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return Files([folder / SINGLE], stack)
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise EgjaxError("has no weight_map", where=str(index))
    names = sorted({str(name) for name in weights.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise EgjaxError(
                f"names {name!r}, which is no safetensors file of this folder", where=str(index)
            )
    return Files([folder / name for name in names], stack, weights)


def _refuse_others(files: Files, config: LlamaConfig, known: set[str]) -> None:
    """Refuses tensors that the configuration does not account for: the model they are of computes
    something else."""
    # Old checkpoints have the rotary wavelengths, which follow from the configuration.
    others = {name for name in files.names() if not name.endswith("rotary_emb.inv_freq")} - known
    head, embedding = _OUTSIDE[("unembedding",)], _OUTSIDE[("embedding",)]
    if config.tie_embeddings and head in others:
        others.remove(head)
        shape = (config.vocab_size, config.hidden_size)
        files.check(head, shape)
        # Some thousand rows at a time: neither is small.
        for start in range(0, config.vocab_size, 4096):
            rows = (slice(start, min(start + 4096, config.vocab_size)),)
            if not np.array_equal(files.read(head, rows), files.read(embedding, rows)):
                raise EgjaxError(
                    f"tensor {head} is not the embedding, with which the configuration ties it",
                    where=files.where(head),
                    remedy='"tie_word_embeddings": false in config.json, if it is to count',
                )
    if others:
        first, *more = sorted(others)
        told = f" and {len(more)} more" if more else ""
        raise EgjaxError(
            f"tensor {first}{told} is not of the model that the configuration describes",
            where=files.where(first),
            remedy=_MISMATCH,
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file."""
    if not path.is_file():
        raise EgjaxError("file is missing", where=str(path), remedy="give a model's folder")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EgjaxError(f"not JSON: {error}", where=str(path)) from error
    if not isinstance(fields, dict):
        raise EgjaxError("not a JSON object", where=str(path))
    return fields


def read_config(folder: str | Path) -> LlamaConfig:
    """The config of a Hugging Face folder. Ids that end a text are those of `config.json` and, as
    transformers decodes by them, of `generation_config.json`.

    Raises:
        EgjaxError: as for `load`.
    """
    path, decoding = Path(folder) / CONFIG, Path(folder) / GENERATION
    fields = read_json(path)
    config = LlamaConfig.from_hf(fields, where=str(path))
    if not decoding.is_file():
        return config
    more = read_ids(read_json(decoding), "eos_token_id", config.vocab_size, where=str(decoding))
    # Without the default where the first file names none.
    own = () if more and fields.get("eos_token_id") is None else config.eos_ids
    return replace(config, eos_ids=tuple(dict.fromkeys((*own, *more))))


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
        EgjaxError: a file is missing or unreadable, the architecture is not a Llama or has a
            feature that is not supported, a tensor is missing, of the wrong shape or not finite,
            or there is one that the configuration does not account for.
    """
    folder = Path(folder)
    config = read_config(folder)
    if dtype is not None:
        config = replace(config, dtype=dtype)
    padded = config
    if vocab_size is not None:
        config = config.cut(vocab_size)
    placement = None if mesh is None else shardings(config, mesh)
    with ExitStack() as stack:
        files = _weights(folder, stack)
        # The files' shapes are those before a padded vocabulary is cut.
        outer = {n: place.outer for place in _places(padded).values() for n in place.names}
        for name, shape in outer.items():
            files.check(name, shape)
        _refuse_others(files, padded, set(outer))
        return config, read_tensors(files, table(config), _places(config), placement)


def read_tensors(
    files: Files,
    specs: dict[str, Any],
    places: dict[tuple[str, ...], Place],
    placement: Params | None = None,
) -> Params:
    """Reads the tensors of a table layer by layer, each straight to its devices.

    Args:
        files: hold them, checked.
        specs: the table.
        places: where each lies, by its path in the table.
        placement: shardings like the table; None for the default device.

    Raises:
        EgjaxError: a tensor holds NaN or infinite values.
    """
    device = SingleDeviceSharding(jax.local_devices()[0])
    if placement is None:
        placement = jax.tree.map(lambda _: device, specs)

    def fetch(path, spec: Spec, sharding: Sharding) -> jax.Array:
        place = places[tuple(part.key for part in path)]
        if place.stacked and isinstance(sharding, NamedSharding):
            one: Any = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        else:
            one = sharding
        # Nothing to fill where there is one tensor only: it is what the file's becomes.
        size = spec.shape if place.stacked else (0,)
        result = jnp.zeros(size, spec.dtype, device=sharding if place.stacked else None)
        for layer, name in enumerate(place.names):
            value = jax.make_array_from_callback(
                place.shape, one, partial(place.read, partial(files.read, name))
            )
            result, finite = _put(sharding, place.stacked)(result, value, layer)
            # Waits, too: otherwise reading would run ahead and fill the host's memory.
            if not bool(finite):
                raise EgjaxError(
                    f"tensor {name} holds NaN or infinite values",
                    where=files.where(name),
                    remedy="the checkpoint is broken, or its numbers do not fit the dtype",
                )
        return result

    return jax.tree_util.tree_map_with_path(fetch, specs, placement)


@cache
def _put(sharding: Sharding, stacked: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiles the writing of a layer into its stack, in place, and the check that it is finite."""

    def put(stack: jax.Array, value: jax.Array, layer: int) -> tuple[jax.Array, jax.Array]:
        value = value.astype(stack.dtype)
        finite = jnp.isfinite(value).all()
        if not stacked:
            return value, finite
        return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0), finite

    everywhere = sharding
    if isinstance(sharding, NamedSharding):
        everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    donated = (0,) if stacked else ()
    return jax.jit(put, donate_argnums=donated, out_shardings=(sharding, everywhere))


def save(
    folder: str | Path, config: LlamaConfig, params: Params, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes a checkpoint that transformers loads as `LlamaForCausalLM`.

    Args:
        folder: made if need be. Weights are written beside those already there, which are
            replaced once all are written, so that a full disk leaves the old ones.
        config: the model.
        params: its parameters, on devices of this process.
        shard_bytes: largest file of weights; more become several files and an index.

    Raises:
        EgjaxError: the files cannot be written, or the parameters are not those of the config
            alone: with an adapter attached, in eight bits, with their layers apart.
    """
    folder = Path(folder)
    tensors = _Tensors(config, params)
    shards: list[list[str]] = [[]]
    for name in tensors.names():
        full = sum(map(tensors.nbytes, shards[-1])) + tensors.nbytes(name) > shard_bytes
        if full and shards[-1]:
            shards.append([])
        shards[-1].append(name)
    count = len(shards)
    files = (
        [SINGLE]
        if count == 1
        else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    texts = {CONFIG: config.to_hf()}
    if count > 1:
        texts[INDEX] = {
            "metadata": {"total_size": sum(map(tensors.nbytes, tensors.names()))},
            "weight_map": {n: file for file, shard in zip(files, shards) for n in shard},
        }
    parts = [folder / f"{name}.part" for name in (*files, *texts)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, shard in zip(parts, shards):
            write(path, {name: tensors.entry(name) for name in shard}, tensors.value)
        for path, fields in zip(parts[count:], texts.values()):
            path.write_text(json.dumps(fields, indent=2) + "\n")
        for path in parts:
            path.replace(path.with_suffix(""))
        # Weights of an earlier model in other files would be read in place of these.
        for path in list(folder.iterdir()):
            if _OWN.fullmatch(path.name) and path.name not in (*files, *texts):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise EgjaxError(f"cannot be written: {error}", where=str(folder)) from error
    finally:
        for path in parts:
            path.unlink(missing_ok=True)


class _Tensors:
    """The tensors of a model as a file names and shapes them, one at a time."""

    def __init__(self, config: LlamaConfig, params: Params):
        _check_params(config, params)
        self._where: dict[str, tuple[Place, Any, int]] = {}
        for keys, place in _places(config).items():
            node: Any = params
            for key in keys:
                node = node[key]
            self._where |= {name: (place, node, i) for i, name in enumerate(place.names)}

    def names(self) -> list[str]:
        """Layer by layer, what is outside the layers first."""
        return sorted(self._where, key=lambda name: self._where[name][2] + ("layers" in name))

    def nbytes(self, name: str) -> int:
        place, array, _ = self._where[name]
        return math.prod(place.outer) * array.dtype.itemsize

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type and shape."""
        place, array, _ = self._where[name]
        return array.dtype.name, place.outer

    def value(self, name: str) -> np.ndarray:
        place, array, layer = self._where[name]
        return place.outward(np.asarray(jax.device_get(array[layer] if place.stacked else array)))


def _check_params(config: LlamaConfig, params: Params) -> None:
    """Refuses parameters that are not those of the table: in a file they would be another model."""
    given = dict(jax.tree_util.tree_leaves_with_path(params))
    wanted = dict(jax.tree_util.tree_leaves_with_path(table(config)))
    names = {jax.tree_util.keystr(path) for path in given}
    reasons = {
        "_lora_": ("an adapter is attached", "merge it first: egjax.lm.lora.merge"),
        "_scale'": ("the matrices are in eight bits", "save the model before int8.quantize"),
        "['layers'][0]": ("the layers are apart", "save the model before params.unstacked"),
    }
    for sign, (what, remedy) in reasons.items():
        if any(sign in name for name in names):
            raise EgjaxError(f"not saved: {what}", remedy=remedy)
    for path, spec in wanted.items():
        name = jax.tree_util.keystr(path)
        if path not in given:
            raise EgjaxError(f"not saved: there is no {name}", remedy=_MISMATCH)
        array = given.pop(path)
        if array.shape != spec.shape:
            raise EgjaxError(
                f"not saved: {name} has shape {list(array.shape)}, expected {list(spec.shape)}",
                remedy=_MISMATCH,
            )
        if array.dtype.name not in _DTYPES:
            raise EgjaxError(f"not saved: {name} is of type {array.dtype.name}")
    if given:
        name = jax.tree_util.keystr(next(iter(given)))
        raise EgjaxError(f"not saved: the config has no {name}", remedy=_MISMATCH)


def write(
    path: Path,
    entries: dict[str, tuple[str, tuple[int, ...]]],
    value: Callable[[str], np.ndarray],
) -> None:
    """Writes a safetensors file, one tensor after the other (safetensors' own writer takes all).

    Layout: the header's length as 8 bytes, little-endian; the header, JSON; the tensors' bytes.

    Args:
        path: the file.
        entries: type and shape of each tensor.
        value: gives a tensor by its name.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8, as readers map them
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in entries:
            file.write(np.ascontiguousarray(value(name)).view(np.uint8).data)
