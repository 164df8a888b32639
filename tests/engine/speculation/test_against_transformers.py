"""Tokens, and drafts too, are those of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mtp_driver import NUM_LAYERS, build, random_prompts
from transformers import DeepseekV3ForCausalLM
from transformers.generation.candidate_generator import MTPCandidateGenerator

from engine.sequence import Sequence
from tests.engine.core.engine_driver import greedy

NUM_TOKENS = 24
PROMPT_LENGTHS = (2, 5, 16, 17, 40, 100)


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What transformers drafts, one draft a step."""
    found: list[int] = []
    honest = MTPCandidateGenerator.get_candidates

    def note(self: Any, input_ids: torch.Tensor, *rest: Any, **named: Any) -> Any:
        candidate_ids, logits = honest(self, input_ids, *rest, **named)
        found.extend(candidate_ids[0, input_ids.shape[1] :].tolist())
        return candidate_ids, logits

    monkeypatch.setattr(MTPCandidateGenerator, "get_candidates", note)
    # The class names the layer of the published checkpoint only.
    patterns = [rf"model\.layers\.{NUM_LAYERS}\..*"]
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", patterns)
    yield found


@pytest.mark.parametrize("checkpoint", ["agreeing", "disagreeing"])
def test_tokens_and_drafts(checkpoint: str, drafted: list[int], request: pytest.FixtureRequest) -> None:
    model_dir: Path = request.getfixturevalue(checkpoint)
    reference = DeepseekV3ForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    num_steps = 0
    for prompt_ids in random_prompts(PROMPT_LENGTHS):
        drafted.clear()
        ids = torch.tensor([prompt_ids])
        output = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
            use_mtp=True,
        )
        tokens, drafts = speculate(model_dir, prompt_ids)
        assert tokens == output[0, len(prompt_ids) :].tolist()
        # The first draft needs a place behind the prompt, and the last one a token to follow it.
        is_block_full = len(prompt_ids) % 16 == 0
        assert drafts == drafted[is_block_full:][: len(drafts)]
        assert len(drafts) >= len(drafted) - is_block_full - 2
        num_steps += len(drafts)
    num_tokens = NUM_TOKENS * len(PROMPT_LENGTHS)
    assert (num_steps < 0.8 * num_tokens) == (checkpoint == "agreeing")


def speculate(model_dir: Path, prompt_ids: list[int]) -> tuple[list[int], list[int]]:
    engine = build(model_dir, 1)
    seq = Sequence(1, prompt_ids, greedy(NUM_TOKENS))
    engine.add(seq)
    tokens: list[int] = []
    drafts: list[int] = []
    while engine.has_work:
        for output in engine.step().outputs:
            tokens += output.token_ids
        drafts += seq.draft.token_ids
    return tokens, drafts
