"""Token ids to text as they come, never splitting a character.

At every point what was given out is a prefix of the decoded whole; with flush() it is the whole.

Byte-level tokenizers (GPT-2's alphabet: DeepSeek, Llama 3, SmolLM2) concatenate bytes, so one incremental
UTF-8 decoder is exact. Others go through router/window_detokenizer.py.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer as HuggingFaceTokenizer

_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    def push(self, token_ids: Sequence[int]) -> str:
        """Text that these tokens complete; may be empty."""
        ...

    def flush(self) -> str:
        """The text held back as an unfinished character. Nothing may be pushed afterwards."""
        ...


def is_byte_level(tokenizer: HuggingFaceTokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    return [part.get("type") for part in parts] == ["ByteLevel"]


class TokenBytes:
    """The bytes of each token of a byte-level tokenizer."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
        by_id = {id: token for token, id in tokenizer.get_vocab(with_added_tokens=True).items()}
        self._table = [b""] * (max(by_id) + 1)
        for token_id, token in by_id.items():
            try:
                self._table[token_id] = bytes([byte_of[char] for char in token])
            except KeyError:  # an added token with characters outside the alphabet stands for itself
                self._table[token_id] = token.encode()
        # Most tokens are whole characters: their text needs no decoder.
        self.texts = [_whole_text(raw) for raw in self._table]

    def __getitem__(self, token_id: int) -> bytes:
        # Embeddings are often padded: the model may draw an id that has no token.
        return self._table[token_id] if token_id < len(self._table) else b""

    def detokenizer(self, skipped_ids: frozenset[int]) -> Detokenizer:
        return _ByteDetokenizer(self, skipped_ids)


class _ByteDetokenizer:
    def __init__(self, token_bytes: TokenBytes, skipped_ids: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped_ids = skipped_ids
        # Invalid bytes become U+FFFD once per maximal subpart, as in the library's Rust.
        self._decoder = _utf8_decoder(errors="replace")
        self._is_inside = False  # a character, some of whose bytes have come

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(id) for id in token_ids if id not in self._skipped_ids])

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def _push_one(self, token_id: int) -> str:
        texts = self._token_bytes.texts
        text = texts[token_id] if token_id < len(texts) else ""
        if text is not None and not self._is_inside:
            return text
        text = self._decoder.decode(self._token_bytes[token_id])
        self._is_inside = bool(self._decoder.getstate()[0])
        return text


def _whole_text(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]
