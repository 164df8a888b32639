"""Text to token ids and back, with the `tokenizers` library alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as HuggingFaceTokenizer

from router.detokenizer import Detokenizer, TokenBytes, is_byte_level
from router.model_dir import ModelDirError
from router.window_detokenizer import WindowDetokenizer

# Below this an encode is shorter than what a thread costs (about 100 us against 3 MB/s).
_THREAD_MIN_CHARS = 4096


class Tokenizer:
    def __init__(self, tokenizer: HuggingFaceTokenizer, vocab_size: int | None = None) -> None:
        """`vocab_size`: of the model's embedding, which may be padded beyond the tokenizer's."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size or tokenizer.get_vocab_size()
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(id for id, token in added.items() if token.special)
        self._token_bytes = TokenBytes(tokenizer) if is_byte_level(tokenizer) else None
        self._max_token_bytes = max((len(token.encode()) for token in tokenizer.get_vocab()), default=1)

    @classmethod
    def from_file(cls, path: Path, vocab_size: int | None = None) -> Tokenizer:
        """ModelDirError when it cannot be read."""
        try:
            return cls(HuggingFaceTokenizer.from_file(str(path)), vocab_size)
        except Exception as error:  # the library raises nothing narrower
            raise ModelDirError(f"{path}: {error}") from error

    async def encode(self, text: str, *, adds_special_tokens: bool) -> list[int]:
        if len(text) < _THREAD_MIN_CHARS:
            return self._encode(text, adds_special_tokens)
        return await asyncio.to_thread(self._encode, text, adds_special_tokens)

    def min_tokens(self, text: str) -> int:
        """A lower bound, without tokenising: a token covers at most the bytes of the longest one."""
        return len(text) // self._max_token_bytes

    def decode(self, token_ids: Sequence[int], *, skips_special_tokens: bool = True) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skips_special_tokens))

    def ids_of(self, text: str) -> tuple[int, ...]:
        """Of a short text inside a longer one: without special tokens around it."""
        return tuple(self._encode(text, False))

    def id_of(self, token: str) -> int | None:
        """None: not one token."""
        token_id: int | None = self._tokenizer.token_to_id(token)
        return token_id

    def detokenizer(
        self, *, skips_special_tokens: bool = True, shown_tokens: Sequence[str] = ()
    ) -> Detokenizer:
        """A fresh one for one stream of tokens. `shown_tokens` are never skipped."""
        skipped = self._special_ids if skips_special_tokens else frozenset[int]()
        if skipped and shown_tokens:
            skipped = skipped - {self._tokenizer.token_to_id(token) for token in shown_tokens}
        if self._token_bytes is not None:
            return self._token_bytes.detokenizer(skipped)
        return WindowDetokenizer(self._tokenizer, skipped)

    def token_bytes(self, token_id: int) -> bytes:
        """Of one token alone, special tokens included; empty for an id without a token."""
        if self._token_bytes is not None:
            return self._token_bytes[token_id]
        return self.decode([token_id], skips_special_tokens=False).encode()

    def _encode(self, text: str, adds_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=adds_special_tokens).ids)
