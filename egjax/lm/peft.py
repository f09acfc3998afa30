"""LoRA adapters in PEFT's layout, in and out: `adapter_config.json` and safetensors.

Keys are as PEFT writes them for `LlamaForCausalLM`:
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, [r, in], and `lora_B`, [out, r].
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from egjax.errors import EgjaxError
from egjax.lm.config import LlamaConfig
from egjax.lm.hf import Files, Place, read_json, read_tensors, write
from egjax.lm.lora import TARGETS, LoraConfig, shardings, table
from egjax.lm.params import Params

__all__ = ["load", "save"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_KEY = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")

# Fields of an adapter's configuration that say nothing of what it computes. Any other one may be
# empty, or the adapter is refused.
_WITHOUT_EFFECT = {
    "peft_type",
    "peft_version",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "target_modules",  # the tensors tell which matrices are adapted
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "qalora_group_size",
    "runtime_config",
    "ensure_weight_tying",
    "eva_config",
    "loftq_config",
}
_READ = {"r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"}
# Initialisations of A and B alone; others change the base's weights, too.
_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")


def _places(
    config: LlamaConfig, specs: dict[str, Any], targets: tuple[str, ...]
) -> dict[tuple[str, ...], Place]:
    """Where each tensor of an adapter lies in the file."""
    places = {}
    for name in targets:
        for part in ("a", "b"):
            shape = specs["layers"][name][part].shape[1:]
            stem = f"{_PROJECTIONS[name]}.lora_{part.upper()}.weight"
            names = tuple(
                f"base_model.model.model.layers.{i}.{stem}" for i in range(config.num_layers)
            )
            inputs = len(shape) - 1 if part == "a" else 1
            places["layers", name, part] = Place(names, True, shape, inputs, True)
    return places


def save(
    folder: str | Path,
    config: LlamaConfig,
    lora: LoraConfig,
    adapter: Params,
    *,
    base: str | None = None,
) -> None:
    """Writes an adapter that PEFT loads.

    Args:
        folder: made if need be; its adapter is replaced.
        config: the base model.
        lora: what the adapter was made with.
        adapter: see `egjax.lm.lora`.
        base: name or path of the base model, which PEFT notes.

    Raises:
        EgjaxError: the files cannot be written.
    """
    folder = Path(folder)
    targets = tuple(name for name in TARGETS if name in lora.targets)
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "use_rslora": lora.rank_stabilised,
        "target_modules": [_PROJECTIONS[name].split(".")[1] for name in targets],
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    entries, values = {}, {}
    for keys, place in _places(config, table(config, lora), targets).items():
        array = np.asarray(jax.device_get(adapter["layers"][keys[1]][keys[2]]))
        entries |= {name: (array.dtype.name, place.outer) for name in place.names}
        values |= {name: place.outward(value) for name, value in zip(place.names, array)}
    parts = {name: folder / f"{name}.part" for name in (WEIGHTS, CONFIG)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(parts[WEIGHTS], entries, values.__getitem__)
        parts[CONFIG].write_text(json.dumps(fields, indent=2) + "\n")
        for name, part in parts.items():
            part.replace(folder / name)
    except OSError as error:
        raise EgjaxError(f"cannot be written: {error}", where=str(folder)) from error
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def load(
    folder: str | Path, config: LlamaConfig, *, mesh: Mesh | None = None, dtype: str = "float32"
) -> tuple[LoraConfig, Params]:
    """Reads an adapter that PEFT (or `save`) wrote.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        config: the base model.
        mesh: where to put it; None for the default device.
        dtype: of the adapter.

    Raises:
        EgjaxError: a file is missing or unreadable, it is not LoRA or uses a feature that is not
            supported, it adapts other matrices or layers, or it does not fit the model.
    """
    folder = Path(folder)
    fields = read_json(folder / CONFIG)
    _check_fields(fields, str(folder / CONFIG))
    with ExitStack() as stack:
        files = Files([folder / WEIGHTS], stack)
        lora = LoraConfig(
            rank=int(fields["r"]),
            alpha=float(fields["lora_alpha"]),
            targets=_targets(files),
            rank_stabilised=bool(fields.get("use_rslora")),
            dtype=dtype,
        )
        specs = table(config, lora)
        places = _places(config, specs, lora.targets)
        for place in places.values():
            for name in place.names:
                files.check(name, place.outer)
        known = {name for place in places.values() for name in place.names}
        beyond = sorted(set(files.names()) - known)
        if beyond:
            raise EgjaxError(
                f"tensor {beyond[0]} is of no layer of the model", where=files.where(beyond[0])
            )
        placement = None if mesh is None else shardings(config, lora, mesh)
        return lora, read_tensors(files, specs, places, placement)


def _check_fields(fields: dict[str, Any], where: str) -> None:
    """Refuses an adapter that computes something else than W + s·A·B in the layers' matrices."""
    if fields.get("peft_type") != "LORA":
        raise EgjaxError(
            f"an adapter of type {fields.get('peft_type')!r}; LORA is read", where=where
        )
    for name in ("r", "lora_alpha"):
        if not isinstance(fields.get(name), int | float):
            raise EgjaxError(f"field {name!r} is missing or no number", where=where)
    if fields.get("bias", "none") != "none" or fields.get("init_lora_weights") not in _INITIAL:
        raise EgjaxError(
            f"bias {fields.get('bias')!r}, init_lora_weights {fields.get('init_lora_weights')!r}: "
            "not supported",
            where=where,
            remedy="bias must be 'none', the initialisation one that leaves the base as it is",
        )
    for name, value in fields.items():
        if name not in _WITHOUT_EFFECT | _READ and value not in (None, False, "", [], {}):
            raise EgjaxError(f"field {name!r} = {value!r} is not supported", where=where)


def _targets(files: Files) -> tuple[str, ...]:
    """Which matrices the tensors of a file adapt."""
    found = set()
    for name in files.names():
        match = _KEY.fullmatch(name)
        if match is None or match[2] not in _PROJECTIONS.values():
            raise EgjaxError(
                f"tensor {name} adapts something else than a matrix of a layer",
                where=files.where(name),
            )
        found.add(match[2])
    return tuple(name for name in TARGETS if _PROJECTIONS[name] in found)
