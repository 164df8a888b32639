from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tools.demo_model.student import StudentConfig

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "baton-demo"


@pytest.fixture(scope="session")
def shipped() -> Path:
    return SHIPPED


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))


@pytest.fixture(scope="session")
def small() -> StudentConfig:
    """Everything that the demo model has, a thousandth of its size."""
    return StudentConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=3,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=256,
    )
