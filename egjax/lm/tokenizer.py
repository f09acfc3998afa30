"""A byte-level BPE tokenizer, trained on the project's own text, in Hugging Face's file layout."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from egjax.errors import EgjaxError, require
from egjax.files import as_path, make_folder

__all__ = ["BOS", "EOS", "PAD", "Tokenizer"]

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"


class Tokenizer:
    """Text to token ids and back, without loss: `decode(encode(text)) == text`.

    Args:
        backend: a `tokenizers.Tokenizer`. Use `train` or `load`.
    """

    def __init__(self, backend):
        self._backend = backend

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
        """Learns merges of byte pairs; the same texts in the same order give the same tokenizer.

        Byte-pair encoding after Sennrich et al. 2016 (arXiv 1508.07909), over bytes as in GPT-2.

        Args:
            texts: the text to learn from.
            vocab_size: tokens in all: three special ones, 256 bytes and merges.

        Raises:
            EgjaxError: the vocabulary is too small for the bytes, or the text has too few pairs
                to fill it.
        """
        tokenizers = require("tokenizers", "lm")
        if vocab_size < 3 + 256:
            raise EgjaxError(f"a vocabulary of {vocab_size}", remedy="259 is the least")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        tokenizer = cls(backend)
        if tokenizer.vocab_size != vocab_size:
            raise EgjaxError(
                f"the text yields {tokenizer.vocab_size} tokens, {vocab_size} are wanted",
                remedy="give more text or ask for a smaller vocabulary",
            )
        return tokenizer

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads `tokenizer.json` of a folder, this project's or Hugging Face's.

        What the file says of padding and cutting is left out: `encode` gives all of a text, and
        nothing else.

        Raises:
            EgjaxError: the file is missing or cannot be read.
        """
        path = as_path(folder) / FILE
        if not path.is_file():
            raise EgjaxError("file is missing", where=str(path), remedy="give a model's folder")
        try:
            backend = require("tokenizers", "lm").Tokenizer.from_str(
                path.read_text(encoding="utf-8")
            )
        except ImportError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise EgjaxError(f"not a tokenizer: {error}", where=str(path)) from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend)

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and what transformers' `AutoTokenizer` needs beside it."""
        folder = as_path(folder)
        make_folder(folder)
        (folder / FILE).write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD,
            "bos_token": BOS,
            "eos_token": EOS,
            "clean_up_tokenization_spaces": False,
        }
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of ids, those of special tokens included; an id in between may have no token."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON; equal for tokenizers that encode alike."""
        fields = json.loads(self._backend.to_str())
        # How a batch is padded or cut is a matter of its use, not of the vocabulary.
        fields.pop("padding", None)
        fields.pop("truncation", None)
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def token_id(self, token: str) -> int:
        """Id of one token such as `"<eos>"`.

        Raises:
            EgjaxError: the vocabulary lacks it.
        """
        found = self._backend.token_to_id(token)
        if found is None:
            raise EgjaxError(f"the vocabulary has no token {token!r}")
        return found

    def special_id(self, text: str) -> int | None:
        """Id of the special token that is written so, which no text holds; None where none is."""
        added = self._backend.get_added_tokens_decoder().items()
        return next((i for i, one in added if one.special and one.content == text), None)

    def token(self, token_id: int) -> str:
        """A token as the vocabulary writes it, such as `"<eos>"`; its number where it has none."""
        return self._backend.id_to_token(token_id) or f"<{token_id}>"

    @property
    def pad_id(self) -> int:
        """Id of `<pad>`."""
        return self.token_id(PAD)

    @property
    def bos_id(self) -> int:
        """Id of `<bos>`."""
        return self.token_id(BOS)

    @property
    def eos_id(self) -> int:
        """Id of `<eos>`."""
        return self.token_id(EOS)

    def token_bytes(self) -> list[bytes]:
        """The bytes that each token adds to a text, by id; empty for special tokens.

        Byte-level vocabularies (GPT-2, Llama 3) and SentencePiece's (Llama 2) are known. The latter
        drop the space that begins a text, which is kept here.

        Raises:
            EgjaxError: the vocabulary is of another kind.
        """
        fields = json.loads(self._backend.to_str())
        special = {token["id"] for token in fields["added_tokens"] if token["special"]}
        added = {token["id"] for token in fields["added_tokens"]}
        kind = json.dumps(fields["decoder"] or {})
        if "ByteLevel" in kind:
            signs = _byte_signs()
            read = lambda text: bytes(signs[sign] for sign in text)  # noqa: E731
        elif "ByteFallback" in kind or "\u2581" in kind:
            read = _sentencepiece_bytes
        else:
            raise EgjaxError("neither a byte-level vocabulary nor SentencePiece's")
        out = [b""] * self.vocab_size
        for text, token in self._backend.get_vocab(with_added_tokens=True).items():
            if token not in special:
                out[token] = text.encode() if token in added else read(text)
        return out

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no special tokens are added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """As `encode`, and for each token where in the text it ends, in characters."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, [end for _, end in encoding.offsets]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, for many texts at once (in parallel)."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)


def _byte_signs() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: printable Latin-1 for
    itself, the other bytes in order from U+0100 on (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {chr(byte): byte for byte in printable}
    return signs | {chr(256 + place): byte for place, byte in enumerate(others)}


def _sentencepiece_bytes(text: str) -> bytes:
    """The bytes of a SentencePiece token: `<0x0A>` is a byte, `▁` a space."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("\u2581", " ").encode()
