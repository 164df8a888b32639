"""By kernels, and by the passes that become CUDA graphs: the tokens of the plain model without drafts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="kernel tests need the package triton (pip install triton)")

from mtp_driver import Recorder

from engine.checkpoint.model_config import load_model_config
from engine.checkpoint.random_presets import hub_config
from engine.checkpoint.weights import WeightSource, open_weights
from engine.decode_graphs import GraphLimits
from engine.engine import Engine, EngineLimits
from engine.kernels import attention_decode
from engine.kv_cache import KvCache
from engine.kv_layout import KvLayout
from engine.models import build_model
from engine.runner import Runner
from engine.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.scheduler import SchedulerConfig
from engine.sequence import Sequence
from engine.speculation.draft_plan import DraftLimits

BLOCK_SIZE, MAX_RUNNING, MAX_MODEL_LEN, TOKEN_BUDGET = 4, 3, 64, 24


class AgreeingWeights:
    """As make_agreeing_checkpoint does."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source

    def has(self, name: str) -> bool:
        return self._source.has(name)

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = self._source.get(name, shape, dtype)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.mul_(0.02)
        elif name.endswith("eh_proj.weight"):
            tensor.copy_(torch.eye(*shape))
        return tensor


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As small as kernels allow: the interpreter is slow."""
    path = tmp_path_factory.mktemp("model")
    config = hub_config("deepseek_v3", "tiny_mtp", "float32")
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config |= {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 48, "vocab_size": 512}
    config |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    config |= {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 32}
    (path / "config.json").write_text(json.dumps(config))
    return path


def build(config_dir: Path, device: str, num_drafts: int, *, uses_graphs: bool) -> Engine:
    """Without drafts: the plain model on the CPU."""
    config = load_model_config(config_dir)
    has_mtp = num_drafts > 0
    with open_weights(config_dir, "dummy", torch.float32, config) as weights:
        model = build_model(
            config,
            AgreeingWeights(weights),
            None,
            torch.float32,
            device,
            uses_kernels=has_mtp,
            has_mtp=has_mtp,
        )
    layout = KvLayout(
        model_fingerprint="test",
        num_layers=config.num_layers + has_mtp,
        token_shape=config.kv_token_shape,
        dtype="float32",
        block_size=BLOCK_SIZE,
    )
    cache = KvCache(layout, 64, device=device)
    no_eos: frozenset[int] = frozenset()
    draft_limits = DraftLimits(num_tokens=num_drafts, max_model_len=MAX_MODEL_LEN, eos_token_ids=no_eos)
    runner = Runner(
        model,
        cache,
        Sampler(no_eos),
        TOKEN_BUDGET,
        device,
        graph_limits=GraphLimits(MAX_RUNNING, MAX_MODEL_LEN) if uses_graphs else None,
        draft_limits=draft_limits if has_mtp else None,
    )
    limits = EngineLimits(max_model_len=MAX_MODEL_LEN, vocab_size=config.vocab_size, eos_token_ids=no_eos)
    scheduler = SchedulerConfig(
        token_budget=TOKEN_BUDGET,
        max_running=MAX_RUNNING,
        lookahead_tokens=int(uses_graphs),
        num_speculative_tokens=num_drafts,
        max_model_len=MAX_MODEL_LEN,
    )
    return Engine(runner, cache, limits, scheduler)


def run(engine: Engine, kinds: list[dict[str, Any]]) -> Recorder:
    """Four answers of different lengths for three places; later prompts hit the blocks of earlier ones."""
    chance = random.Random(0)
    shared = [chance.randrange(512) for _ in range(9)]
    recorder = Recorder(engine)
    for seq_id, kind in enumerate(kinds):
        prompt_ids = shared + [chance.randrange(512) for _ in range((5, 9, 3, 12)[seq_id])]
        sampling = {"temperature": 0.0, "seed": seq_id, "max_tokens": 4 + seq_id, "ignore_eos": True}
        recorder.add(Sequence(seq_id, prompt_ids, SamplingParams(**sampling | kind)))
    return recorder.run()


@pytest.mark.parametrize(
    "kinds",
    [
        [{}, {}, {}, {}],
        [{"temperature": 0.6}, {}, {"frequency_penalty": 1.0}, {"allowed_token_ids": (5, 6, 7)}],
    ],
    ids=["greedy", "mixed"],
)
@pytest.mark.parametrize(("uses_graphs", "num_drafts"), [(False, 1), (True, 1), (True, 2)])
def test_tokens_of_the_plain_model(
    config_dir: Path,
    uses_graphs: bool,
    num_drafts: int,
    kinds: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention_decode, "_MAX_SHARES", 2)
    monkeypatch.setattr(attention_decode, "_ONE_TUNING", attention_decode.DecodeTuning(max_shares=2))
    monkeypatch.setattr(attention_decode, "_FEW_TUNING", attention_decode.DecodeTuning(max_shares=2))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = run(build(config_dir, "cpu", 0, uses_graphs=False), kinds)
    found = run(build(config_dir, device, num_drafts, uses_graphs=uses_graphs), kinds)
    assert found.tokens == plain.tokens
    assert found.num_steps < plain.num_steps
