"""Random weights made on the spot, for load tests of a model whose weights are not here.

variance  matrices keep the variance of their input, as trained ones do; the gate spreads tokens over nearly
          all experts
uniform   the numbers of vLLM's dummy load format: all of [-0.001, 0.001], norms too, the same ones for
          parameters of equal size, so that all layers are alike and the head is the embedding
tied      uniform, and what vLLM's code makes of it: the scores of its gate are a softmax in bfloat16, where
          logits of 0.00003 all become 1 / experts, and the tie falls the same way for every token. Our gate
          computes in float32 and would tell them apart, so here its weights are 0
"""

from __future__ import annotations

import math
import re
from hashlib import blake2b
from types import TracebackType
from typing import Self

import torch

from engine.checkpoint.model_config import ModelConfig

_POOL_SIZE = 1_048_583  # prime, so that no row length divides it and rows differ
_UNIFORM_BOUND = 1e-3
_LAYER = re.compile(r"layers\.\d+\.")


class DummyWeights:
    """A tensor depends on its name and shape only. All are windows of one pool of random numbers, repeated:
    hundreds of gigabytes appear at the speed of a copy."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self._config = config
        self._dtype = dtype
        self._is_uniform = config.dummy_spread != "variance"
        generator = torch.Generator().manual_seed(0)
        if self._is_uniform:
            pool = (2 * torch.rand(_POOL_SIZE, generator=generator) - 1) * _UNIFORM_BOUND
        else:
            pool = torch.randn(_POOL_SIZE, generator=generator)
        self._pool = pool.to(dtype)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None

    def move_to(self, device: torch.device | str) -> None:
        """Tensors are made there from now on, the same ones."""
        self._pool = self._pool.to(device)

    def has(self, name: str) -> bool:
        if name.endswith(".bias"):
            return self._config.attention_bias if ".self_attn." in name else self._config.mlp_bias
        return True

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype or self._dtype
        if name == "lm_head.weight" and (self._config.tie_word_embeddings or self._is_uniform):
            name = "model.embed_tokens.weight"
        if self._is_uniform:
            return self._uniform(name, shape).to(dtype).view(shape)
        if len(shape) == 1 and name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype, device=self._pool.device)
        scale = 1.0 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.02
        return (self._window(name, math.prod(shape)).mul_(scale)).to(dtype).view(shape)

    def _uniform(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if self._config.dummy_spread == "tied" and name.endswith("mlp.gate.weight"):
            return torch.zeros(shape, dtype=self._dtype, device=self._pool.device)
        if name.endswith("norm.weight"):
            name = f"norm of {shape}"
        return self._window(_LAYER.sub("layers.", name), math.prod(shape))

    def _window(self, name: str, num_values: int) -> torch.Tensor:
        start = int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") % _POOL_SIZE
        values = torch.empty(num_values, dtype=self._dtype, device=self._pool.device)
        done = 0
        while done < num_values:
            piece = self._pool[start : start + num_values - done]
            values[done : done + piece.shape[0]] = piece
            done += piece.shape[0]
            start = 0
        return values
