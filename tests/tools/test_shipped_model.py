"""models/baton-demo as everybody finds it in a fresh clone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM, PreTrainedModel

from engine.build import build_engine
from engine.checkpoint.hub_tensors import hub_tensors
from engine.checkpoint.model_config import load_model_config
from engine.engine_config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

PROMPTS = [
    "Write a short story about a lighthouse.",
    "What can I cook with eggs and tomatoes?",
    "Why do cats sleep so much?",
    "Hello! How are you today?",
]
NUM_TOKENS = 48
CLEAR_MARGIN = 1e-2  # in logits; float32 kernels differ by less than a tenth of it


@pytest.fixture(scope="module")
def hub_tokenizer(shipped: Path) -> Any:
    return AutoTokenizer.from_pretrained(shipped)


@pytest.fixture(scope="module")
def reference(shipped: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts(hub_tokenizer: Any) -> list[list[int]]:
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    return [
        hub_tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats
    ]


def greedy(shipped: Path, prompts: list[list[int]], num_drafts: int) -> tuple[list[list[int]], int]:
    """The answers, all in one running batch, and the number of steps."""
    config = EngineConfig(
        model_dir=shipped, dtype="float32", num_blocks=64, num_speculative_tokens=num_drafts
    )
    engine = build_engine(config)
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        engine.add(Sequence(i, prompt, sampling))
    found: list[list[int]] = [[] for _ in prompts]
    num_steps = 0
    while engine.has_work:
        num_steps += 1
        for output in engine.step().outputs:
            found[output.seq_id] += output.token_ids
    engine.check_integrity()
    return found, num_steps


@pytest.fixture(scope="module")
def plain(shipped: Path, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    return greedy(shipped, prompts, 0)


def test_transformers_reads_all_of_it_but_the_mtp_layer(shipped: Path) -> None:
    model, info = DeepseekV3ForCausalLM.from_pretrained(
        shipped, dtype=torch.float32, output_loading_info=True
    )
    assert isinstance(model, DeepseekV3ForCausalLM)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(name.startswith("model.layers.6.") for name in info["unexpected_keys"])
    assert 20e6 < sum(parameter.numel() for parameter in model.parameters()) < 40e6


def test_greedy_tokens_are_those_of_transformers(
    reference: PreTrainedModel, prompts: list[list[int]], plain: tuple[list[list[int]], int]
) -> None:
    num_clear = 0
    for prompt, answer in zip(prompts, plain[0], strict=True):
        assert len(answer) == NUM_TOKENS
        with torch.inference_mode():
            logits_NV = reference(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        best = logits_NV.topk(2)
        is_clear = (best.values[:, 0] - best.values[:, 1]) > CLEAR_MARGIN
        assert torch.equal(torch.tensor(answer)[is_clear], best.indices[is_clear, 0])
        num_clear += int(is_clear.sum())
    assert num_clear > 0.95 * NUM_TOKENS * len(prompts)


def test_its_own_drafts_save_steps_and_change_nothing(
    shipped: Path, prompts: list[list[int]], plain: tuple[list[list[int]], int]
) -> None:
    answers, num_steps = greedy(shipped, prompts, 1)
    assert answers == plain[0]
    assert num_steps < 0.8 * plain[1]


def test_it_stays_with_its_subject_and_comes_to_an_end(
    reference: PreTrainedModel, prompts: list[list[int]], hub_tokenizer: Any
) -> None:
    ids = torch.tensor([prompts[0]])
    output = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=200,
        do_sample=False,
        top_p=None,
        temperature=None,
    )
    answer = output[0, ids.shape[1] :]
    assert int(answer[-1]) == 2
    text = hub_tokenizer.decode(answer, skip_special_tokens=True)
    assert "lighthouse" in text


def test_its_weights_are_small_enough_for_a_repository(shipped: Path) -> None:
    files = list(shipped.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 64 << 20
    assert max(file.stat().st_size for file in files) < 16 << 20
    index = json.loads((shipped / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}


def test_its_tensors_have_deepseek_v3_s_names_the_mtp_layer_s_too(shipped: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in shipped.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            shapes |= {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}
    index = json.loads((shipped / "model.safetensors.index.json").read_text())
    assert shapes.keys() == index["weight_map"].keys()
    assert shapes == hub_tensors(load_model_config(shipped), has_mtp=True)
    assert "model.layers.6.mlp.experts.15.down_proj.weight" in shapes
    assert {f"model.layers.6.{name}.weight" for name in ("enorm", "hnorm", "eh_proj")} <= shapes.keys()


def test_its_chat_template_renders_turns_and_opens_an_answer(hub_tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    turns = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in chat)
    assert hub_tokenizer.apply_chat_template(chat, tokenize=False) == turns
    opened = hub_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert opened == turns + "<|im_start|>assistant\n"
    assert hub_tokenizer.decode(hub_tokenizer(turns)["input_ids"]) == turns
