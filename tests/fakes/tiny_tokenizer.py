"""A byte-level BPE small enough to make in a test, with special tokens and awkward added ones."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 1, 2
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def build_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<pad>", BOS, EOS],
        show_progress=False,
    )
    text = ["the baton is passed from hand to hand", "hello world, hello runner", "stop here and go on there"]
    tokenizer.train_from_iterator(text * 3, trainer)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("r\u00e9sum\u00e9 of \u4e2d\u6587")])
    return tokenizer


def write_model_dir(directory: Path) -> Path:
    """What the router reads of a model; the embedding is padded beyond the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size() + 8
    config = {"model_type": "llama", "vocab_size": vocab_size, "max_position_embeddings": 512}
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer_config = {"bos_token": BOS, "eos_token": {"content": EOS, "lstrip": False}}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_ID}))
    return directory
