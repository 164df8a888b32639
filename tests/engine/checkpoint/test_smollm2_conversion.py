"""The converted SmolLM2 against transformers' own reading of the GGUF file."""

import functools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.checkpoint.model_config import load_model_config
from engine.checkpoint.weights import open_weights

pytestmark = pytest.mark.slow  # transformers takes 20 s each for tokenizer and model

TEXTS = [
    "What is the capital of France?",
    "It's 3.14159, or 22/7 (roughly); in 1999 there were 365 days, $1,234.56.",
    "def f(x):\n\treturn {k: v**2 for k, v in x.items() if v != 0}  # squares\n\n\nprint(f({'a': 1}))",
    "na\u00efve caf\u00e9 \u2014 \u4f60\u597d\uff0c\u4e16\u754c!",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 emoji \u2615\ufe0f, e\u0301 combining",
    "  leading,   runs   of spaces \t tabs\r\nand\n\n\nlines  ",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<|endoftext|><empty_output>",
    "half a token: <|im_sta <repo_name>x/y<file_sep> rt|>",
    "we'll they've I'M don't 'quoted' it''s",
    "",
]
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "\u00e9\n<|im_end|>"},
    ],
]


@pytest.fixture(scope="module", autouse=True)
def parsed_once() -> Iterator[None]:
    """transformers parses the file's metadata four times, 7 s each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        yield


@pytest.fixture(scope="module")
def reference_tokenizer(smollm2_gguf: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.mark.parametrize("text", TEXTS)
def test_text_has_the_token_ids_of_transformers(tokenizer: Any, reference_tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids == reference_tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("chat", CHATS)
def test_chat_has_the_token_ids_of_transformers(tokenizer: Any, reference_tokenizer: Any, chat: Any) -> None:
    ours, theirs = (
        t.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for t in (tokenizer, reference_tokenizer)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("a   12", ["a", "\u0120" * 3, "1", "2"]), ("x \u00bd", ["x", "\u0120", "\u00c2\u00bd"])],
)
def test_numerals_are_split_from_the_space_before_them(tokenizer: Any, text: str, tokens: list[str]) -> None:
    """As in SmolLM2's own tokenizer.json and in llama.cpp; transformers' GGUF reader has no such split."""
    assert tokenizer.tokenize(text) == tokens


def test_special_tokens_are_those_of_transformers(tokenizer: Any, reference_tokenizer: Any) -> None:
    assert len(tokenizer) == len(reference_tokenizer) == 49152
    assert tokenizer.special_tokens_map == reference_tokenizer.special_tokens_map
    assert tokenizer.chat_template == reference_tokenizer.chat_template
    assert tokenizer.decode(tokenizer("a<|im_end|>b").input_ids, skip_special_tokens=True) == "ab"


def test_weights_are_those_of_transformers(smollm2_gguf: Path, smollm2_dir: Path) -> None:
    with warnings.catch_warnings(action="ignore"):
        model = AutoModelForCausalLM.from_pretrained(
            smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
        )
    config = load_model_config(smollm2_dir)
    assert config.eos_token_ids == {2}
    assert config.rope.theta == 100000.0
    with open_weights(smollm2_dir, "safetensors", torch.float32, config) as weights:
        differing = [
            name
            for name, tensor in model.state_dict().items()
            if not torch.equal(weights.get(name, tuple(tensor.shape)), tensor)
        ]
    assert differing == []
