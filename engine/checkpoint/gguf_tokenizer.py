"""The tokenizer that a GGUF file carries in its metadata."""

from __future__ import annotations

from engine.checkpoint.errors import CheckpointError
from engine.checkpoint.gguf_file import GgufFile
from engine.checkpoint.tokenizer_files import PreTokenizer, TokenizerSpec

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": "gpt-2",
    "gpt-2": "gpt-2",
    "smollm": "smollm",
    "llama-bpe": "llama-bpe",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
}


def tokenizer_spec(gguf: GgufFile) -> TokenizerSpec:
    """Raises CheckpointError for a kind of tokenizer that is not supported."""
    metadata = gguf.metadata
    model = metadata.get("tokenizer.ggml.model")
    is_sentencepiece = model == "llama"
    if model not in ("gpt2", "llama"):
        raise CheckpointError(f"{gguf.path}: tokenizer.ggml.model must be gpt2 or llama, found {model!r}")
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    if not tokens or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{gguf.path}: tokenizer.ggml.tokens must be a list of distinct tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    pre_tokenizer: PreTokenizer = "sentencepiece" if is_sentencepiece else _pre_tokenizer(gguf)
    return TokenizerSpec(
        tokens=tokens,
        merges=_merges_by_score(gguf, tokens) if is_sentencepiece else _merges(gguf, tokens),
        special_ids=[i for i, kind in enumerate(types) if kind == _CONTROL],
        user_defined_ids=[i for i, kind in enumerate(types) if kind == _USER_DEFINED],
        pre_tokenizer=pre_tokenizer,
        # Files that do not say: llama.cpp's defaults.
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", pre_tokenizer in ("sentencepiece", "llama-bpe")),
        add_space_prefix=metadata.get("tokenizer.ggml.add_space_prefix", is_sentencepiece),
        bos_id=_token_id(gguf, "bos", len(tokens)),
        eos_id=_token_id(gguf, "eos", len(tokens)),
        unk_id=_token_id(gguf, "unknown", len(tokens)),
        pad_id=_token_id(gguf, "padding", len(tokens)),
        chat_template=metadata.get("tokenizer.chat_template"),
        max_length=metadata["llama.context_length"],
    )


def _token_id(gguf: GgufFile, name: str, num_tokens: int) -> int | None:
    token_id = gguf.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is not None and not 0 <= token_id < num_tokens:
        raise CheckpointError(f"{gguf.path}: {name}_token_id {token_id} is outside the {num_tokens} tokens")
    return None if token_id is None else int(token_id)


def _pre_tokenizer(gguf: GgufFile) -> PreTokenizer:
    name = gguf.metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise CheckpointError(f"{gguf.path}: tokenizer.ggml.pre {name!r} is not supported, known: {known}")
    return _PRE_TOKENIZERS[name]


def _merges(gguf: GgufFile, tokens: list[str]) -> list[tuple[str, str]]:
    known = set(tokens)
    merges = []
    for merge in gguf.metadata.get("tokenizer.ggml.merges") or []:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= known:
            raise CheckpointError(
                f"{gguf.path}: tokenizer.ggml.merges has {merge!r}, which is not of its tokens"
            )
        merges.append((left, right))
    return merges


def _merges_by_score(gguf: GgufFile, tokens: list[str]) -> list[tuple[str, str]]:
    """Sentencepiece merges whichever pair makes the token of the highest score: merges ranked by it."""
    scores = gguf.metadata.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise CheckpointError(f"{gguf.path}: {len(scores)} tokenizer.ggml.scores for {len(tokens)} tokens")
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, i in ids.items():
        splits = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        merges += [(-scores[i], ids[left], ids[right], left, right) for left, right in pairs]
    return [(left, right) for *_, left, right in sorted(merges)]
