from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, normalizers

from router.tokenizer import Tokenizer
from tests.fakes.tiny_tokenizer import EOS_ID, build_tokenizer

BYTE_LEVEL = build_tokenizer()
NUM_IDS = BYTE_LEVEL.get_vocab_size() + 8  # ids of a padded embedding have no token


def sentencepiece_like() -> HuggingFaceTokenizer:
    """The decoder of Llama 2's tokenizer: byte fallback, and the first space taken off."""
    words = ["\u2581", "\u2581hello", "\u2581world", "a", "b", "!", "\u4e2d"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: id for id, token in enumerate(tokens)}
    model = models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    tokenizer = HuggingFaceTokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


SENTENCEPIECE = sentencepiece_like()


def assert_equals_full_decode(
    library: HuggingFaceTokenizer, token_ids: list[int], *, skips: bool, sizes: list[int]
) -> None:
    """At every point: given out is a prefix of the whole, and with flush() it is the whole."""
    tokenizer = Tokenizer(library)
    for end in range(len(token_ids) + 1):
        detokenizer = tokenizer.detokenizer(skips_special_tokens=skips)
        text, start, turn = "", 0, 0
        while start < end:
            size = sizes[turn % len(sizes)]
            text += detokenizer.push(token_ids[start : min(end, start + size)])
            start, turn = start + size, turn + 1
        whole = library.decode(token_ids[:end], skip_special_tokens=skips)
        assert whole.startswith(text)
        assert text + detokenizer.flush() == whole


@settings(max_examples=200, deadline=None)
@given(
    token_ids=st.lists(st.integers(0, NUM_IDS - 1), max_size=12),
    skips=st.booleans(),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_any_byte_level_tokens_equal_the_full_decode_at_every_point(
    token_ids: list[int], skips: bool, sizes: list[int]
) -> None:
    assert_equals_full_decode(BYTE_LEVEL, token_ids, skips=skips, sizes=sizes)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="hello \u4e2d\u6587\U0001f600\u00e9\u0627\u200d\U0001f468", max_size=12))
def test_any_text_streams_without_broken_characters(text: str) -> None:
    for library in (BYTE_LEVEL, SENTENCEPIECE):
        token_ids = library.encode(text, add_special_tokens=False).ids
        detokenizer = Tokenizer(library).detokenizer()
        pieces = [detokenizer.push([token_id]) for token_id in token_ids]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + detokenizer.flush() == library.decode(token_ids)


def test_a_sentencepiece_stream_keeps_spaces_and_gives_each_character_when_its_last_byte_comes() -> None:
    detokenizer = Tokenizer(SENTENCEPIECE).detokenizer()
    pieces = [detokenizer.push([id]) for id in SENTENCEPIECE.encode("a \u00e9\u00e9\U0001f600 b").ids]
    assert pieces == ["", "a", " ", "", "\u00e9", "", "\u00e9", "", "", "", "\U0001f600", " ", "b"]


@pytest.mark.parametrize("skips", [True, False])
def test_special_tokens_are_skipped_only_on_demand(skips: bool) -> None:
    detokenizer = Tokenizer(BYTE_LEVEL).detokenizer(skips_special_tokens=skips)
    hello = BYTE_LEVEL.encode("hello").ids
    assert detokenizer.push([*hello, EOS_ID]) == ("hello" if skips else "hello</s>")


def test_an_added_token_outside_the_byte_alphabet_stands_for_itself() -> None:
    text = "r\u00e9sum\u00e9 of \u4e2d\u6587"
    token_ids = BYTE_LEVEL.encode(text).ids
    assert len(token_ids) == 1
    assert Tokenizer(BYTE_LEVEL).detokenizer().push(token_ids) == text


def test_an_invalid_byte_is_replaced_as_soon_as_it_is_known_to_be_invalid() -> None:
    [lead] = [id for token, id in BYTE_LEVEL.get_vocab().items() if token == "\u00c3"]  # byte 0xC3
    detokenizer = Tokenizer(BYTE_LEVEL).detokenizer()
    assert detokenizer.push([lead]) == ""
    assert detokenizer.push(BYTE_LEVEL.encode("a").ids) == "\ufffda"
