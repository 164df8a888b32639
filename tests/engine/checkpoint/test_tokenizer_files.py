from dataclasses import replace

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from engine.checkpoint.tokenizer_files import TokenizerSpec, build_tokenizer

SPECIALS = ["<|begin|>", "<|end|>"]
MERGES = [("\u0120", "1"), ("1", "2"), ("12", "3"), ("123", "4"), ("a", "b")]
SPEC = TokenizerSpec(
    tokens=[*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in MERGES)],
    merges=MERGES,
    special_ids=[0, 1],
    user_defined_ids=[],
    pre_tokenizer="gpt-2",
    add_bos=False,
    add_space_prefix=False,
    bos_id=0,
    eos_id=1,
    unk_id=None,
    pad_id=None,
    chat_template=None,
    max_length=128,
)


def tokenizer_of(pre_tokenizer: str) -> Tokenizer:
    return build_tokenizer(replace(SPEC, pre_tokenizer=pre_tokenizer))


@pytest.mark.parametrize(
    ("pre_tokenizer", "text", "tokens"),
    [
        ("gpt-2", "1234", ["1234"]),
        ("llama-bpe", "1234123", ["123", "4", "12", "3"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("gpt-2", "ab 12", ["ab", "\u01201", "2"]),
        ("llama-bpe", "ab 12", ["ab", "\u0120", "12"]),
        ("smollm", "ab 12", ["ab", "\u0120", "1", "2"]),
    ],
)
def test_each_kind_splits_numbers_its_way(pre_tokenizer: str, text: str, tokens: list[str]) -> None:
    tokenizer = tokenizer_of(pre_tokenizer)
    found = tokenizer.encode(text)
    assert found.tokens == tokens
    assert tokenizer.decode(found.ids) == text


def test_beginning_is_added_where_the_spec_says_so() -> None:
    tokenizer = build_tokenizer(replace(SPEC, add_bos=True))
    assert tokenizer.encode("ab").ids[0] == 0
    assert tokenizer.encode("ab", add_special_tokens=False).tokens == ["ab"]


def test_special_tokens_in_text_are_one_id_and_hidden_when_decoded() -> None:
    tokenizer = tokenizer_of("gpt-2")
    ids = tokenizer.encode("ab<|end|>ab").ids
    assert ids.count(1) == 1
    assert tokenizer.decode(ids) == "abab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "ab<|end|>ab"
