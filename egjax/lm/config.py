"""What a Llama is made of, apart from its weights: a frozen, hashable record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from egjax.errors import EgjaxError

__all__ = ["PRESETS", "LlamaConfig", "RopeScaling", "preset", "read_ids"]

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "max_seq_len",
)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of rotary wavelengths ("The Llama 3 Herd of Models", arXiv 2407.21783).

    Attributes:
        factor: how much the longest wavelengths are stretched.
        low_freq_factor: wavelengths above `original_max_seq_len / low_freq_factor` are stretched
            in full.
        high_freq_factor: wavelengths below `original_max_seq_len / high_freq_factor` are kept;
            those between are interpolated.
        original_max_seq_len: tokens of context before the stretching.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_seq_len: int


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes and constants of a Llama. Hashable, so that it can be a static argument of `jit`.

    Attributes:
        vocab_size: rows of the embedding V (may exceed the tokenizer's size: padding).
        hidden_size: width D of the residual stream.
        intermediate_size: width of the MLP.
        num_layers: layers L.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_dim: width of a head (even).
        max_seq_len: longest context, prompt and completion together, in tokens.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: Llama 3's stretching, or None.
        rms_norm_eps: added to the mean square in RMSNorm.
        tie_embeddings: the unembedding is the embedding, transposed.
        attention_bias: query, key, value and output projections have a bias.
        mlp_bias: the three projections of the MLP have a bias.
        dtype: of weights and activations, e.g. `"float32"` or `"bfloat16"`; logits are float32.
        bos_id, pad_id: token ids, or None where the vocabulary has none.
        eos_ids: any of these ends a completion.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)
    pad_id: int | None = 0

    def __post_init__(self):
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise EgjaxError(f"{name} is {getattr(self, name)}", remedy="at least 1")
        if self.num_heads % self.num_kv_heads:
            raise EgjaxError(f"{self.num_kv_heads} kv heads do not divide {self.num_heads} heads")
        if self.head_dim % 2:
            raise EgjaxError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise EgjaxError(
                f"dtype {self.dtype!r} is unknown", remedy="float32, bfloat16 or float16"
            )

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_heads // self.num_kv_heads

    def cut(self, vocab_size: int) -> LlamaConfig:
        """The config of a model of which only so many tokens are kept.

        Raises:
            EgjaxError: it has fewer, or a mark that starts or ends a text would go.
        """
        if vocab_size > self.vocab_size:
            raise EgjaxError(
                f"the model has {self.vocab_size} tokens, {vocab_size} are wanted",
                remedy="the tokenizer belongs to another model",
            )
        for token in (self.bos_id, *self.eos_ids):
            if token is not None and token >= vocab_size:
                raise EgjaxError(
                    f"token {token} starts or ends a text, the tokenizer has {vocab_size}",
                    remedy="the tokenizer belongs to another model",
                )
        kept = self.pad_id is not None and self.pad_id < vocab_size
        return replace(self, vocab_size=vocab_size, pad_id=self.pad_id if kept else None)

    def check_length(self, length: int, *, where: str | None = None) -> None:
        """Raises `EgjaxError` if a sequence of so many tokens is longer than the context."""
        if length > self.max_seq_len:
            raise EgjaxError(
                f"a sequence of {length} tokens exceeds the model's context of {self.max_seq_len}",
                where=where,
                remedy="shorten it, or split the text",
            )

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], *, where: str | None = None) -> LlamaConfig:
        """Reads the fields of a Hugging Face `config.json`.

        Both forms of the rotary fields are honoured: `rope_theta` and `rope_scaling` (up to
        transformers 4) and the one dict `rope_parameters` (transformers 5); where a file has both
        they have to agree.

        Args:
            fields: the parsed JSON.
            where: name of the file, for messages.

        Raises:
            EgjaxError: not a Llama, a field is missing or out of range, a feature is not supported,
                or a field is not known and not empty.
        """
        if fields.get("model_type") != "llama":
            raise EgjaxError(
                f"architecture {fields.get('model_type')!r} is not supported",
                where=where,
                remedy='a Llama is needed ("model_type": "llama")',
            )
        if fields.get("hidden_act", "silu") != "silu":
            raise EgjaxError(f"activation {fields['hidden_act']!r}; silu is needed", where=where)
        _refuse_unknown(fields, _READ | _WITHOUT_EFFECT, where)
        theta, scaling = _rope(fields, where)
        vocab_size, hidden, layers, heads, mlp = (
            _number(fields, name, where, int)
            for name in (
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
            )
        )
        # Two fields that may also be null; then, and where fields are absent, they mean what
        # transformers' LlamaConfig means by them.
        given = {k: v for k, v in fields.items() if v is not None or k not in _NULLABLE}
        if "head_dim" not in given and hidden % heads:
            raise EgjaxError(f"{heads} heads do not divide hidden_size {hidden}", where=where)
        given = {"bos_token_id": 1, "eos_token_id": 2, **given}
        bos = read_ids(given, "bos_token_id", vocab_size, where=where)
        if len(bos) > 1:
            raise EgjaxError(f"several ids as bos_token_id: {list(bos)}", where=where)
        pad = given.get("pad_token_id")
        try:
            return cls(
                vocab_size=vocab_size,
                hidden_size=hidden,
                intermediate_size=mlp,
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=_number(given, "num_key_value_heads", where, int, heads),
                head_dim=_number(given, "head_dim", where, int, hidden // heads),
                max_seq_len=_number(given, "max_position_embeddings", where, int, 2048),
                rope_theta=theta,
                rope_scaling=scaling,
                rms_norm_eps=_number(given, "rms_norm_eps", where, float, 1e-6),
                tie_embeddings=_flag(given, "tie_word_embeddings", where),
                attention_bias=_flag(given, "attention_bias", where),
                mlp_bias=_flag(given, "mlp_bias", where),
                dtype=given.get("dtype") or given.get("torch_dtype") or "float32",
                bos_id=bos[0] if bos else None,
                eos_ids=read_ids(given, "eos_token_id", vocab_size, where=where),
                # Some checkpoints have -1, or an id that was never added.
                pad_id=pad if isinstance(pad, int) and 0 <= pad < vocab_size else None,
            )
        except EgjaxError as error:
            raise EgjaxError(error.what, where=error.where or where, remedy=error.remedy) from None

    def to_hf(self) -> dict[str, Any]:
        """Fields of a Hugging Face `config.json` that both transformers 4 and 5 read."""
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope = {
                "rope_type": "llama3",
                "factor": self.rope_scaling.factor,
                "low_freq_factor": self.rope_scaling.low_freq_factor,
                "high_freq_factor": self.rope_scaling.high_freq_factor,
                "original_max_position_embeddings": self.rope_scaling.original_max_seq_len,
            }
        eos = list(self.eos_ids)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_seq_len,
            "hidden_act": "silu",
            "rope_theta": self.rope_theta,
            "rope_scaling": rope if self.rope_scaling is not None else None,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "dtype": self.dtype,
            "torch_dtype": self.dtype,
            "bos_token_id": self.bos_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
            "pad_token_id": self.pad_id,
        }


_READ = frozenset(
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "hidden_act",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "dtype",
        "torch_dtype",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    ]
)
# Fields that change nothing of what a Llama computes from tokens: provenance, initialisation,
# other slicings of the same sums, what is returned, and defaults of decoding, which transformers
# before 5 kept there.
_WITHOUT_EFFECT = frozenset(
    [
        "architectures",
        "transformers_version",
        "_name_or_path",
        "initializer_range",
        "use_cache",
        "pretraining_tp",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "torchscript",
        "id2label",
        "label2id",
        "problem_type",
        "is_llama_config",
        "max_sequence_length",
        "unk_token_id",
        "sep_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation",
        "_commit_hash",
        "tokenizer_class",
        "finetuning_task",
        "task_specific_params",
        "prefix",
        "decoder_start_token_id",
        "is_decoder",
        "chunk_size_feed_forward",
        "tf_legacy_loss",
        "use_bfloat16",
        "transformers.js_config",
        "temperature",
        "top_p",
        "top_k",
        "typical_p",
        "min_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "do_sample",
        "early_stopping",
        "max_length",
        "min_length",
        "max_new_tokens",
        "min_new_tokens",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "num_return_sequences",
        "length_penalty",
        "repetition_penalty",
        "encoder_repetition_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "bad_words_ids",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "suppress_tokens",
        "begin_suppress_tokens",
        "remove_invalid_values",
        "output_scores",
        "return_dict_in_generate",
    ]
)
_NULLABLE = ("num_key_value_heads", "head_dim")
_ROPE = frozenset(
    [
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ]
)


def _refuse_unknown(fields: Mapping[str, Any], known: frozenset[str], where: str | None) -> None:
    """Refuses a field that might change what the model computes; an empty one cannot."""
    for name, value in fields.items():
        if name in known or value in (None, False, "", [], {}):  # 0 and 0.0 are False, too
            continue
        if name == "partial_rotary_factor" and value == 1:  # all of each head, as ever
            continue
        if name == "quantization_config":
            raise EgjaxError(
                "quantised weights are not read",
                where=where,
                remedy="give the model in float32 or bfloat16",
            )
        raise EgjaxError(
            f"field {name!r} = {value!r} is not known or not honoured",
            where=where,
            remedy="delete it if the model computes the same without it",
        )


def _rope(fields: Mapping[str, Any], where: str | None) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, from either form of the fields or from both."""
    forms = [name for name in ("rope_parameters", "rope_scaling") if fields.get(name)]
    found = [_rotary(fields[name], fields, where) for name in forms] or [_rotary({}, fields, where)]
    if len(set(found)) > 1:
        raise EgjaxError(
            "rope_parameters and rope_scaling say different things",
            where=where,
            remedy="delete the one that the model was not trained with",
        )
    return found[0]


def _rotary(
    scaling: Any, fields: Mapping[str, Any], where: str | None
) -> tuple[float, RopeScaling | None]:
    """Base and scaling from one form of the fields."""
    if not isinstance(scaling, Mapping):
        raise EgjaxError(f"rotary scaling {scaling!r} is no JSON object", where=where)
    for names, given in (
        ("rope_theta", [fields.get("rope_theta"), scaling.get("rope_theta")]),
        ("rope_type and type", [scaling.get("rope_type"), scaling.get("type")]),
    ):
        first, *other = [value for value in given if value is not None] or [None]
        if other and other[0] != first:
            raise EgjaxError(
                f"two values of {names}: {first!r} and {other[0]!r}",
                where=where,
                remedy="delete the one that the model was not trained with",
            )
    inner = "rope_theta" in scaling
    theta = _number(scaling if inner else fields, "rope_theta", where, float, 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise EgjaxError(
            f"rotary scaling {kind!r} is not supported", where=where, remedy="default or llama3"
        )
    known = _ROPE if kind == "llama3" else frozenset(("rope_type", "type", "rope_theta"))
    _refuse_unknown(scaling, known, where)
    if kind == "default":
        return theta, None
    low, high = (_number(scaling, f"{n}_freq_factor", where, float) for n in ("low", "high"))
    if low >= high:
        raise EgjaxError(f"low_freq_factor {low} is not below high_freq_factor {high}", where=where)
    return theta, RopeScaling(
        factor=_number(scaling, "factor", where, float),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_seq_len=_number(scaling, "original_max_position_embeddings", where, int),
    )


def _number(
    fields: Mapping[str, Any],
    name: str,
    where: str | None,
    kind: Callable[[Any], Any],
    default: float | None = None,
) -> Any:
    """A positive number, whole or not as `kind` (int or float) says; an absent one is `default`."""
    value = fields.get(name, default)
    if name not in fields and default is None:
        raise EgjaxError(f"field {name!r} is missing", where=where)
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not 0 < value < math.inf or value != kind(value):
        wanted = "a whole number, at least 1" if kind is int else "a number above 0"
        raise EgjaxError(f"field {name!r} is {value!r}", where=where, remedy=wanted)
    return kind(value)


def _flag(fields: Mapping[str, Any], name: str, where: str | None) -> bool:
    value = fields.get(name)
    if value not in (True, False, None):
        raise EgjaxError(f"field {name!r} is {value!r}", where=where, remedy="true or false")
    return bool(value)


def read_ids(
    fields: Mapping[str, Any], name: str, vocab_size: int, *, where: str | None = None
) -> tuple[int, ...]:
    """Token ids of a field that holds one, a list or none.

    Args:
        fields: of a `config.json` or `generation_config.json`.
        name: e.g. `"eos_token_id"`.
        vocab_size: tokens of the model.
        where: name of the file, for messages.

    Raises:
        EgjaxError: something else, or an id that is no token's.
    """
    value = fields.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        whole = isinstance(token, int) and not isinstance(token, bool)
        if not whole or not 0 <= token < vocab_size:
            raise EgjaxError(
                f"field {name!r} is {value!r}", where=where, remedy=f"ids below {vocab_size}"
            )
    return tuple(ids)


def _llama2(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    """Llama 2 (arXiv 2307.09288)."""
    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_seq_len=4096,
        tie_embeddings=False,
        dtype="bfloat16",
        pad_id=None,
    )


def _llama3(hidden: int, mlp: int, layers: int, heads: int) -> LlamaConfig:
    """Llama 3 (arXiv 2407.21783)."""
    return replace(
        _llama2(hidden, mlp, layers, heads, 8),
        vocab_size=128_256,
        max_seq_len=8192,
        rope_theta=500_000.0,
        bos_id=128_000,
        eos_ids=(128_001,),
    )


def _stretched(config: LlamaConfig, factor: float = 8.0, *, tied: bool = False) -> LlamaConfig:
    """Llama 3.1 and 3.2: a longer context by stretched wavelengths."""
    scaling = RopeScaling(factor, 1.0, 4.0, 8192)
    return replace(config, max_seq_len=131_072, rope_scaling=scaling, tie_embeddings=tied)


PRESETS: Mapping[str, LlamaConfig] = MappingProxyType(
    {
        "tinyllama-1.1b": replace(_llama2(2048, 5632, 22, 32, 4), max_seq_len=2048),
        "llama-2-7b": _llama2(4096, 11_008, 32, 32, 32),
        "llama-2-13b": _llama2(5120, 13_824, 40, 40, 40),
        "llama-2-70b": _llama2(8192, 28_672, 80, 64, 8),
        "llama-3-8b": _llama3(4096, 14_336, 32, 32),
        "llama-3-70b": _llama3(8192, 28_672, 80, 64),
        "llama-3.1-8b": _stretched(_llama3(4096, 14_336, 32, 32)),
        "llama-3.1-70b": _stretched(_llama3(8192, 28_672, 80, 64)),
        "llama-3.1-405b": _stretched(_llama3(16_384, 53_248, 126, 128)),
        "llama-3.2-1b": _stretched(_llama3(2048, 8192, 16, 32), 32.0, tied=True),
        "llama-3.2-3b": _stretched(_llama3(3072, 8192, 28, 24), 32.0, tied=True),
    }
)
"""Base models by their published `config.json`; fine-tuned ones end texts with further tokens."""


def preset(name: str) -> LlamaConfig:
    """One of `PRESETS`, upper or lower case.

    Raises:
        EgjaxError: there is none of this name.
    """
    found = PRESETS.get(name.lower())
    if found is None:
        raise EgjaxError(f"no model {name!r}", remedy=f"one of {', '.join(PRESETS)}")
    return found
