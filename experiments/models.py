"""Models of a run on disk and in memory: a tokenizer they share, parameters, the apply function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from egjax.errors import EgjaxError
from egjax.experience.records import Sample as Text
from egjax.lm.config import LlamaConfig
from egjax.lm.ensemble import Combine, Models, check_vocabularies, first
from egjax.lm.generate import completions, generate, pad_prompts
from egjax.lm.int8 import quantize
from egjax.lm.params import abstract, cut, unstacked, widened
from egjax.lm.tokenizer import Tokenizer
from egjax.train.checkpoint import load_params, read_metadata, save_params
from egjax.train.data import Sample
from egjax.train.layout import Layout, applied
from egjax.train.objectives import Apply
from egjax.train.progress import progress

__all__ = [
    "LARGE_VOCABULARY",
    "Model",
    "apply_of",
    "as_sample",
    "asked",
    "check_one_vocabulary",
    "column_mask",
    "cut_to",
    "described",
    "for_decoding",
    "host_device",
    "load",
    "plans_of",
    "save",
    "with_columns",
    "worded",
]


class Model(NamedTuple):
    """Parameters, what they are parameters of, and the tokenizer that they were trained with."""

    params: Any
    config: LlamaConfig
    tokenizer: str
    """Fingerprint of the tokenizer."""


def save(path: Path, model: Model) -> None:
    """Writes a model; its config and the tokenizer's fingerprint go along."""
    note = {"config": model.config.to_hf(), "tokenizer": model.tokenizer}
    save_params(path, model.params, note)


def described(path: Path) -> tuple[LlamaConfig, str]:
    """Config and tokenizer's fingerprint of a model that `save` wrote, without its weights.

    Raises:
        EgjaxError: there is none.
    """
    note = read_metadata(path)
    try:
        return LlamaConfig.from_hf(note["config"], where=str(path)), note["tokenizer"]
    except KeyError as error:
        raise EgjaxError(f"not a model: no {error}", where=str(path)) from None


def load(path: Path, *, int8: bool = False) -> Model:
    """Reads a model that `save` wrote.

    Args:
        path: its folder.
        int8: its matrices in eight bits (`egjax.lm.int8`), rounded on the host: the device never
            holds more.

    Raises:
        EgjaxError: there is none, or its weights are not finite.
    """
    config, tokenizer = described(path)
    if not int8:
        return Model(_finite(load_params(path)[0], path), config, tokenizer)
    here = SingleDeviceSharding(host_device())
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract(config)
    )
    small = quantize(_finite(load_params(path, like)[0], path))
    return Model(jax.device_put(small, jax.local_devices()[0]), config, tokenizer)


def _finite(params: Any, path: Path) -> Any:
    """The parameters; refuses them where one is NaN or infinite."""
    for name, good in jax.tree_util.tree_leaves_with_path(_are_finite(params)):
        if not bool(good):
            raise EgjaxError(
                f"{jax.tree_util.keystr(name)} holds NaN or infinite values",
                where=str(path),
                remedy="the training went wrong; delete the stage and run it again",
            )
    return params


@jax.jit
def _are_finite(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), params)


def cut_to(model: Model, vocab_size: int) -> Model:
    """A model without columns that no token of its tokenizer has: it never says one of these, and
    goes together with models that were padded otherwise."""
    if model.config.vocab_size == vocab_size:
        return model
    params = cut(model.params, vocab_size)
    return model._replace(params=params, config=model.config.cut(vocab_size))


def with_columns(model: Model, columns: int) -> Model:
    """A model of as many columns as one that it teaches: further ones are cut, missing ones are
    zeros, and `column_mask` leaves them out."""
    if model.config.vocab_size >= columns:
        return cut_to(model, columns)
    config = replace(model.config, vocab_size=columns)
    return model._replace(params=widened(model.params, columns), config=config)


def column_mask(config: LlamaConfig, tokens: int) -> jax.Array | None:
    """bool[V], False for columns that none of a tokenizer's tokens has; None where there is
    none."""
    return None if tokens == config.vocab_size else jnp.arange(config.vocab_size) < tokens


def for_decoding(model: Model) -> Model:
    """A model as its platform decodes fastest: on a GPU with its layers apart
    (`egjax.lm.params.unstacked`); the parameters that come in are consumed then."""
    if jax.default_backend() != "gpu":
        return model
    return model._replace(params=unstacked(model.params, consume=True))


def host_device() -> Any:
    """The CPU, for what no accelerator shall hold.

    Raises:
        EgjaxError: JAX was told to leave it out.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise EgjaxError(
            "JAX has no CPU to read weights with",
            where="JAX_PLATFORMS",
            remedy="name it there, too: cuda,cpu",
        ) from None


def check_one_vocabulary(models: dict[str, Model]) -> None:
    """Refuses models of different tokenizers before anything runs; they may be padded differently.

    Raises:
        EgjaxError: which differ, and how.
    """
    check_vocabularies({}, {name: model.tokenizer for name, model in models.items()})


LARGE_VOCABULARY = 8192
"""From here on losses are computed in chunks: all logits of a batch would be too much memory."""


def apply_of(config: LlamaConfig, layout: Layout, *, heads: bool | None = None) -> Apply:
    """The model as the objectives take it, see `egjax.train.layout.applied`.

    Args:
        config: the model.
        layout: of the step.
        heads: give a `Head` rather than logits; None does so for a large vocabulary, too.
    """
    chunked = layout.chunked or config.vocab_size > LARGE_VOCABULARY if heads is None else heads
    return applied(config, replace(layout, chunked=chunked))


def asked(config: LlamaConfig, tokens: Sequence[int]) -> list[int]:
    """Tokens of a text as the model reads its beginning: after the mark that starts a text."""
    return [*([] if config.bos_id is None else [config.bos_id]), *tokens]


def worded(
    config: LlamaConfig, tokenizer: Tokenizer, prompt: str, completion: str
) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, after the mark that starts a text, and of its completion, before the one
    that ends it.

    Both are one text to the tokenizer, as in `egjax.train.jsonl`: one that begins each text with a
    space would begin the completion with a second one. A token is the completion's if its last
    character is.
    """
    ids, ends = tokenizer.encode_with_ends(f"{prompt} {completion}")
    count = sum(end <= len(prompt) for end in ends)
    return asked(config, ids[:count]), [*ids[count:], *config.eos_ids[:1]]


def as_sample(text: Text, tokenizer: Tokenizer, config: LlamaConfig, weight: float = 1.0) -> Sample:
    """Tokens of a prompt and its completion; only the completion and the end are learnt."""
    prompt, answer = worded(config, tokenizer, text.prompt, text.completion)
    return Sample([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), weight)


def plans_of(
    models: Models,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    title: str,
    combine: Combine = first,
    max_new_tokens: int = 96,
    rows: int = 32,
) -> list[str]:
    """Greedy completions of prompts, in batches of one shape.

    Args:
        models: one model, or those that `combine` takes.
        tokenizer: of all of them.
        prompts: texts that end with `A:`.
        title: for the progress display.
        combine: see `egjax.lm.generate.generate`.
        max_new_tokens: most tokens of a completion.
        rows: prompts decoded at once.
    """
    config = models[0][1]
    ids = [asked(config, tokens) for tokens in tokenizer.encode_batch(list(prompts))]
    longest = max(map(len, ids))
    out: list[str] = []
    with progress(title, len(ids)) as update:
        for start in range(0, len(ids), rows):
            part = ids[start : start + rows]
            # One bucket for all, so that one compilation serves.
            batch = pad_prompts(part, pad_id=config.pad_id or 0, bucket=longest, rows=rows)
            found = generate(
                models,
                batch,
                jax.random.key(0),
                max_new_tokens=max_new_tokens,
                combine=combine,
                temperature=0.0,
            )
            texts = [tokenizer.decode(x) for x in completions(found, config.eos_ids)[: len(part)]]
            out += [" ".join(text.split()) for text in texts]
            update(len(out), "")
    return out
