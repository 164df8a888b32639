"""Writing tokenizer.json, tokenizer_config.json and chat_template.jinja for a BPE."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "\u2581"  # how sentencepiece writes a space

# The chat format of SmolLM2 and others, without a system turn of its own.
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PreTokenizer = Literal["gpt-2", "smollm", "llama-bpe", "sentencepiece"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    tokens: list[str]  # by id
    merges: list[tuple[str, str]]  # most wanted first
    special_ids: list[int]  # never split, hidden in text
    user_defined_ids: list[int]  # never split, shown in text
    pre_tokenizer: PreTokenizer
    add_bos: bool
    add_space_prefix: bool
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    chat_template: str | None
    max_length: int  # tokens

    def cut(self, vocab_size: int, max_length: int) -> TokenizerSpec:
        """Its first ids. Merges are numbered as they were learned, so with those among the ids it is a whole
        tokenizer of that size."""
        tokens = self.tokens[:vocab_size]
        known = set(tokens)
        return replace(
            self,
            tokens=tokens,
            merges=[(left, right) for left, right in self.merges if {left, right, left + right} <= known],
            special_ids=[i for i in self.special_ids if i < vocab_size],
            max_length=max_length,
        )

    def token(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.tokens[token_id]


def write_tokenizer(directory: Path, spec: TokenizerSpec) -> None:
    build_tokenizer(spec).save(str(directory / "tokenizer.json"), pretty=False)
    named = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id, "pad": spec.pad_id}
    config: dict[str, Any] = {f"{name}_token": spec.token(i) for name, i in named.items() if i is not None}
    config |= {
        "add_bos_token": spec.add_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if spec.chat_template is not None:
        (directory / "chat_template.jinja").write_text(spec.chat_template)


def build_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    is_sentencepiece = spec.pre_tokenizer == "sentencepiece"
    vocabulary = {token: i for i, token in enumerate(spec.tokens)}
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            spec.merges,
            unk_token=spec.token(spec.unk_id) if is_sentencepiece else None,
            fuse_unk=is_sentencepiece,
            byte_fallback=is_sentencepiece,
            ignore_merges=spec.pre_tokenizer == "llama-bpe",
        )
    )
    if is_sentencepiece:
        _split_like_sentencepiece(tokenizer, spec.add_space_prefix)
    else:
        _split_by_bytes(tokenizer, spec.pre_tokenizer)
    tokenizer.add_special_tokens([_added(spec.tokens[i], is_special=True) for i in spec.special_ids])
    tokenizer.add_tokens([_added(spec.tokens[i], is_special=False) for i in spec.user_defined_ids])
    if spec.add_bos and spec.bos_id is not None:
        bos = spec.tokens[spec.bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, spec.bos_id)]
        )
    return tokenizer


def _added(token: str, *, is_special: bool) -> AddedToken:
    return AddedToken(token, special=is_special, normalized=False)


def _split_by_bytes(tokenizer: Tokenizer, pre_tokenizer: PreTokenizer) -> None:
    if pre_tokenizer == "llama-bpe":
        split = pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated")
        whole_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, whole_bytes])
    else:
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre_tokenizer == "smollm" else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, words])
    tokenizer.decoder = decoders.ByteLevel()


def _split_like_sentencepiece(tokenizer: Tokenizer, add_space_prefix: bool) -> None:
    prefix = [normalizers.Prepend(_SPACE)] if add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
