"""Incremental decoding through the library's own decode(), for tokenizers that are not byte-level.

Sentence-piece decoders look at neighbours (byte fallback, the space at the start), so the tokens of the last
piece are decoded again with the new ones and their text taken off. Exact for valid text. Where byte tokens
form no character the library replaces a whole run of them at once; here what was given out stays.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as HuggingFaceTokenizer

_REPLACEMENT = "\ufffd"
_MAX_CHARACTER_BYTES = 4  # a longer run of byte tokens without a character is invalid, waiting does not help


class WindowDetokenizer:
    def __init__(self, tokenizer: HuggingFaceTokenizer, skipped_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped_ids = skipped_ids
        self._shown_ids: list[int] = []  # of the last piece given out
        self._held_ids: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(id) for id in token_ids if id not in self._skipped_ids])

    def flush(self) -> str:
        return self._new_text()

    def _push_one(self, token_id: int) -> str:
        self._held_ids.append(token_id)
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and len(self._held_ids) < _MAX_CHARACTER_BYTES:
            return ""
        self._shown_ids, self._held_ids = self._held_ids, []
        return text

    def _new_text(self) -> str:
        shown = self._decode(self._shown_ids) if self._shown_ids else ""
        return self._decode(self._shown_ids + self._held_ids)[len(shown) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))
