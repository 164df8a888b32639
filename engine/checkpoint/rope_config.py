"""Rotary embedding of a checkpoint, from rope_theta and rope_scaling or from rope_parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from engine.checkpoint.json_fields import JsonFields


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Named as in transformers' rope_parameters. Fields that the scaling does not use have neutral values."""

    theta: float
    scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"]
    factor: float
    original_max_position_embeddings: int
    interleave: bool  # pairs are (0, 1), (2, 3), ... and not (0, dim / 2), ...
    # yarn
    beta_fast: float
    beta_slow: float
    mscale: float  # 0: not given
    mscale_all_dim: float  # 0: not given
    attention_factor: float | None  # scales cos and sin; None: derived from factor and mscale
    truncate: bool
    # llama3
    low_freq_factor: float
    high_freq_factor: float


def read_rope_config(fields: JsonFields, *, is_interleaved: bool) -> RopeConfig:
    """From the top level of config.json. Raises CheckpointError."""
    rope = fields.child("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
    kind = rope.choice(
        "rope_type" if rope.has("rope_type") else "type",
        "default",
        ("default", "none", "linear", "dynamic", "yarn", "deepseek_yarn", "llama3"),
    )
    scaling: Any = {"default": "none", "deepseek_yarn": "yarn"}.get(kind, kind)
    for holder in (fields, rope):
        if holder.number("partial_rotary_factor", 1.0) != 1.0:
            raise holder.error("partial_rotary_factor", "other than 1 is not supported")
    max_positions = fields.integer("max_position_embeddings")
    original = rope.integer(
        "original_max_position_embeddings", fields.integer("original_max_position_embeddings", max_positions)
    )
    default_factor = max_positions / original if scaling == "yarn" else 1.0
    factor = (
        rope.number("factor")
        if scaling in ("linear", "dynamic", "llama3")
        else rope.number("factor", default_factor)
    )
    return RopeConfig(
        theta=rope.number("rope_theta", fields.number("rope_theta", 10000.0)),
        scaling=scaling,
        factor=factor,
        original_max_position_embeddings=original,
        interleave=is_interleaved,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=rope.number("mscale", 0.0),
        mscale_all_dim=rope.number("mscale_all_dim", 0.0),
        attention_factor=rope.number("attention_factor", None),
        truncate=rope.boolean("truncate", True),
        low_freq_factor=rope.number("low_freq_factor", 1.0),
        high_freq_factor=rope.number("high_freq_factor", 4.0),
    )
