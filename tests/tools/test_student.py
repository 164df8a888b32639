from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import DeepseekV3ForCausalLM

from engine.build import build_engine
from engine.checkpoint.random_checkpoint import smallest_tokenizer
from engine.engine_config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from tools.demo_model.export import export
from tools.demo_model.loading import load_student
from tools.demo_model.student import Experts, Student, StudentConfig, rope_angles


@pytest.fixture(scope="module")
def student(small: StudentConfig) -> Student:
    """Random weights that bfloat16 holds, logits far apart, a bias that changes the choice of experts."""
    student = Student(small, seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        student.embed_tokens.weight.mul_(50)
        for experts in student.moe_layers():
            experts.bias_E.copy_(torch.randn(experts.bias_E.shape, generator=generator) * 0.3)
        for parameter in student.parameters():
            parameter.copy_(parameter.bfloat16())
    return student


@pytest.fixture(scope="module")
def exported(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("student")
    config = student.config
    export(student, smallest_tokenizer(config.vocab_size, config.max_position_embeddings), directory)
    return directory


@pytest.fixture(scope="module")
def tokens(small: StudentConfig) -> torch.Tensor:
    return torch.randint(3, small.vocab_size, (2, 40), generator=torch.Generator().manual_seed(5))


def test_logits_are_those_of_transformers(student: Student, exported: Path, tokens: torch.Tensor) -> None:
    reference = DeepseekV3ForCausalLM.from_pretrained(exported, dtype=torch.float32)
    with torch.inference_mode():
        ours = functional.linear(student.hidden(tokens), student.embed_tokens.weight)
        theirs = reference(tokens).logits
    assert float(theirs.std()) > 1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_drafts_of_the_mtp_layer_are_those_of_the_engine(student: Student, exported: Path) -> None:
    prompt = torch.randint(3, 512, (20,), generator=torch.Generator().manual_seed(6)).tolist()
    settings = {"dtype": "float32", "num_blocks": 20, "num_speculative_tokens": 1}
    engine = build_engine(EngineConfig(model_dir=exported, **settings))
    seq = Sequence(1, prompt, SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True))
    engine.add(seq)
    said, drafts = list(prompt), {}
    while engine.has_work:
        for output in engine.step().outputs:
            said += output.token_ids
        drafts |= {len(said) + i: token for i, token in enumerate(seq.draft.token_ids)}
    tokens = torch.tensor([said])
    with torch.inference_mode():
        hidden = student.hidden(tokens)
        angles = rope_angles(tokens.shape[1] - 1, student.config, tokens.device)
        drafted = student.mtp.draft(student.embed_tokens(tokens[:, 1:]), hidden[:, :-1], angles)
        ours = functional.linear(drafted, student.embed_tokens.weight).argmax(-1)[0].tolist()
    assert len(drafts) >= 8
    assert drafts == {place: ours[place - 2] for place in drafts}


def test_a_checkpoint_is_read_back_as_it_was_written(student: Student, exported: Path) -> None:
    again = load_student(exported)
    theirs = dict(again.state_dict())
    for name, tensor in student.state_dict().items():
        if not name.endswith("load_E"):
            assert torch.equal(theirs[name], tensor), name


def test_every_expert_computed_is_the_same_as_the_chosen_ones_only(student: Student) -> None:
    experts = student.moe_layers()[0]
    x_BTD = torch.randn(1, 6, student.config.hidden_size, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        ours = experts(x_BTD)[0]
        expected = torch.stack([_sparse(experts, x_D) for x_D in x_BTD[0]])
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def _sparse(experts: Experts, x_D: torch.Tensor) -> torch.Tensor:
    scores = (experts.gate_weight_ED @ x_D).sigmoid()
    chosen = (scores + experts.bias_E).topk(experts.top_k).indices
    weights = scores[chosen] / scores[chosen].sum() * experts.scaling
    out = experts.shared_experts(x_D)
    for weight, i in zip(weights, chosen.tolist(), strict=True):
        inner = functional.silu(experts.gate_proj_EFD[i] @ x_D) * (experts.up_proj_EFD[i] @ x_D)
        out = out + weight * (experts.down_proj_EDF[i] @ inner)
    return out


def test_balance_moves_the_bias_towards_those_that_are_used_less(small: StudentConfig) -> None:
    experts = Experts(small)
    experts.load_E.copy_(torch.tensor([10.0, 0, 5, 5, 5, 5, 9, 1]))
    experts.balance(0.1)
    torch.testing.assert_close(experts.bias_E, torch.tensor([-0.1, 0.1, 0, 0, 0, 0, -0.1, 0.1]))
    assert not experts.load_E.any()


def test_balancing_over_and_over_evens_the_loads(small: StudentConfig) -> None:
    experts = Student(small).moe_layers()[0].train()
    x_BTD = torch.randn(4, 64, small.hidden_size, generator=torch.Generator().manual_seed(8)) + 0.5

    def busiest() -> float:
        experts.load_E.zero_()
        with torch.no_grad():
            experts(x_BTD)
        return float(experts.load_E.max() / experts.load_E.mean())

    before = busiest()
    for _ in range(300):
        busiest()
        experts.balance(0.005)
    assert before > 1.5
    assert busiest() < 1.2


def test_only_targets_count_in_the_loss(student: Student, tokens: torch.Tensor) -> None:
    is_target = torch.zeros_like(tokens, dtype=torch.bool)
    is_target[:, 30:] = True
    with torch.inference_mode():
        loss, _ = student.losses(tokens, is_target)
        logits = functional.linear(student.hidden(tokens), student.embed_tokens.weight)[:, 29:-1]
    expected = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 30:].flatten())
    torch.testing.assert_close(loss, expected)
