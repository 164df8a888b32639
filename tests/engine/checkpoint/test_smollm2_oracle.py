"""The engine on the converted SmolLM2 against transformers on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from engine.build import build_engine
from engine.engine_config import EngineConfig
from engine.outputs import TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is the capital of France?",
    "What is 2+2?",
    "Translate to Spanish: good morning",
    "Who wrote Romeo and Juliet? Answer with the name only.",
]
NUM_TOKENS = 20
CLEAR_MARGIN = 1e-2  # in logits; float32 kernels differ by less than a tenth of it


@pytest.fixture(scope="module")
def tokenizer(smollm2_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_dir)


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]


@pytest.fixture(scope="module")
def answers(smollm2_dir: Path, prompts: list[list[int]]) -> list[list[TokenLogprobs]]:
    """Greedy, all prompts in one running batch."""
    engine = build_engine(EngineConfig(model_dir=smollm2_dir, dtype="float32", num_blocks=128))
    sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, num_logprobs=20)
    for i, prompt in enumerate(prompts):
        engine.add(Sequence(i, prompt, sampling))
    found: list[list[TokenLogprobs]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step().outputs:
            found[output.seq_id] += output.logprobs
    engine.check_integrity()
    return found


def reference_logits(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[len(answer), V]: what the model says before each token of the answer."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
    return logits


def test_answers_are_those_of_transformers(
    answers: list[list[TokenLogprobs]], prompts: list[list[int]], smollm2_dir: Path
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    num_clear = 0
    for prompt, found in zip(prompts, answers, strict=True):
        token_ids = [token.token_id for token in found]
        logits_NV = reference_logits(reference, prompt, token_ids)
        top_ids = torch.tensor([token.top_token_ids for token in found])
        ours = torch.tensor([token.top_logprobs for token in found])
        torch.testing.assert_close(ours, logits_NV.log_softmax(-1).gather(1, top_ids), atol=1e-3, rtol=1e-3)
        best = logits_NV.topk(2)
        is_clear = (best.values[:, 0] - best.values[:, 1]) > CLEAR_MARGIN
        assert torch.equal(torch.tensor(token_ids)[is_clear], best.indices[is_clear, 0])
        num_clear += int(is_clear.sum())
    assert num_clear > 30


def test_answers_make_sense(answers: list[list[TokenLogprobs]], tokenizer: Any) -> None:
    texts = [tokenizer.decode([token.token_id for token in found]) for found in answers]
    assert "Paris" in texts[0]
    assert "4" in texts[1]
    assert texts[1].endswith("<|im_end|>")
