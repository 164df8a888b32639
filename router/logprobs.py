"""Logprobs in the shapes of the two endpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from proto import common_pb2

# JSON has no infinity; OpenAI and vLLM send this for a token that cannot be drawn.
_LEAST_LOGPROB = -9999.0

TokenBytesOf = Callable[[int], bytes]


def chat_logprobs(tokens: Sequence[common_pb2.TokenLogprobs], bytes_of: TokenBytesOf) -> dict[str, Any]:
    return {
        "content": [
            {
                **_chat_token(token.token_id, token.logprob, bytes_of),
                "top_logprobs": [
                    _chat_token(token_id, logprob, bytes_of)
                    for token_id, logprob in zip(token.top_token_ids, token.top_logprobs, strict=True)
                ],
            }
            for token in tokens
        ]
    }


def prompt_logprobs(
    tokens: Sequence[common_pb2.TokenLogprobs], bytes_of: TokenBytesOf
) -> list[dict[str, Any] | None]:
    """Of each prompt token, in vLLM's form: its own and the likeliest, by token id. The first has none."""
    return [None, *(_by_id(token, bytes_of) for token in tokens)]


def _by_id(token: common_pb2.TokenLogprobs, bytes_of: TokenBytesOf) -> dict[str, Any]:
    """The rank is known of those among the likeliest only."""
    top = zip(token.top_token_ids, token.top_logprobs, strict=True)
    ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(top, 1)]
    if token.token_id not in token.top_token_ids:
        ranked.insert(0, (token.token_id, token.logprob, 0))
    return {
        str(token_id): {
            "logprob": _finite(logprob),
            "rank": rank or None,
            "decoded_token": _text(bytes_of(token_id)),
        }
        for token_id, logprob, rank in ranked
    }


class TextLogprobs:
    """Of one choice of a text completion; offsets count from the start of its text."""

    def __init__(self, bytes_of: TokenBytesOf) -> None:
        self._bytes_of = bytes_of
        self._offset = 0

    def entries(self, tokens: Sequence[common_pb2.TokenLogprobs]) -> dict[str, list[Any]]:
        """The next tokens, in the four parallel lists of the API."""
        result = _empty()
        for token in tokens:
            self._append(result, token.token_id, _finite(token.logprob), self._top(token))
        return result

    def prompt_entries(
        self, token_ids: Sequence[int], tokens: Sequence[common_pb2.TokenLogprobs]
    ) -> dict[str, list[Any]]:
        """Of an echoed prompt: nothing predicts its first token."""
        result = _empty()
        self._append(result, token_ids[0], None, None)
        rest = self.entries(tokens)
        return {name: values + rest[name] for name, values in result.items()}

    def _append(
        self, result: dict[str, list[Any]], token_id: int, logprob: float | None, top: dict[str, float] | None
    ) -> None:
        text = _text(self._bytes_of(token_id))
        result["tokens"].append(text)
        result["token_logprobs"].append(logprob)
        result["top_logprobs"].append(top)
        result["text_offset"].append(self._offset)
        self._offset += len(text)

    def _top(self, token: common_pb2.TokenLogprobs) -> dict[str, float]:
        """The likeliest and always the drawn one. Of tokens with the same text the likeliest."""
        top: dict[str, float] = {}
        for token_id, logprob in zip(token.top_token_ids, token.top_logprobs, strict=True):
            top.setdefault(_text(self._bytes_of(token_id)), _finite(logprob))
        top.setdefault(_text(self._bytes_of(token.token_id)), _finite(token.logprob))
        return top


def joined(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    result = _empty()
    for part in parts:
        for name, values in part.items():
            result[name] += values
    return result


def _empty() -> dict[str, list[Any]]:
    return {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}


def _chat_token(token_id: int, logprob: float, bytes_of: TokenBytesOf) -> dict[str, Any]:
    raw = bytes_of(token_id)
    return {"token": _text(raw), "logprob": _finite(logprob), "bytes": list(raw)}


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return _LEAST_LOGPROB if math.isnan(logprob) else max(logprob, _LEAST_LOGPROB)
