"""MLA by kernels: every row of the batch in a fixed number of launches, no list, no host synchronisation.

H heads, N query dims without position, R rotated dims, C latent rank, V value dims of a head.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from engine.attention.device_plan import ChunkRows, DevicePlan, GatheredContext, PagedContext
from engine.checkpoint.model_config import MlaConfig
from engine.kernels.row_task import RowTask
from engine.kernels.support import is_power_of_two


class MlaKernels:
    def __init__(
        self,
        config: MlaConfig,
        task: RowTask,
        expansion: tuple[torch.Tensor, torch.Tensor],
        expansion_KC: torch.Tensor,
    ) -> None:
        """expansion: key [H, N, C] and value [H, C, V]; expansion_KC [H * (N + V), C] has the same numbers,
        of each head its keys' rows and then its values'."""
        self._rank = config.kv_lora_rank
        self._nope = config.qk_nope_head_dim
        self._task = task
        self._key_HNC, self._value_HCV = expansion
        self._expansion_KC = expansion_KC

    def __call__(
        self, rows_TC: torch.Tensor, q_THQ: torch.Tensor, cache: torch.Tensor, plan: DevicePlan
    ) -> torch.Tensor:
        """[T, H, V]. rows (latent, shared key) and q as projected; both are changed in place."""
        from engine.kernels.mla_few_rows import MAX_ROWS
        from engine.kernels.mla_rows import prepare_mla_rows

        num_decodes = plan.num_decodes
        num_tokens, num_heads, q_size = q_THQ.shape
        is_decode_only = num_decodes == num_tokens
        if is_decode_only and 0 < num_tokens <= MAX_ROWS:
            return self._decode_few(rows_TC, q_THQ, cache, plan)
        q_SHC = q_THQ.new_empty(num_decodes, num_heads, rows_TC.shape[1])
        rotated = q_SHC[..., self._rank :] if is_decode_only else q_THQ[..., self._nope :]
        prepare_mla_rows(self._task, rows_TC, q_THQ, rotated, plan.positions_T, plan.slot_mapping_T, cache)
        out_THV = q_THQ.new_empty(num_tokens, num_heads, self._value_HCV.shape[2])
        if num_decodes:
            if not is_decode_only:
                q_SHC[..., self._rank :] = q_THQ[:num_decodes, :, self._nope :]
            self._decode(q_THQ[:num_decodes], q_SHC, cache, plan, out_THV[:num_decodes])
        if plan.chunks is not None:
            chunk_rows = rows_TC[num_decodes:]
            self._prefill(q_THQ[num_decodes:], chunk_rows, cache, plan.chunks, out_THV[num_decodes:])
        return out_THV

    def _decode_few(
        self, rows_TC: torch.Tensor, q_THQ: torch.Tensor, cache: torch.Tensor, plan: DevicePlan
    ) -> torch.Tensor:
        """[S, H, V]."""
        from engine.kernels.attention_decode import decode_shares, few_tuning, num_shares
        from engine.kernels.mla_few_rows import merge_and_expand, prepare_few_rows

        q_SHC = prepare_few_rows(
            self._task, rows_TC, q_THQ, self._key_HNC, plan.positions_T, plan.slot_mapping_T, cache
        )
        tuning = few_tuning(q_SHC.shape[0])
        shares = decode_shares(
            q_SHC,
            cache,
            plan.block_tables_SB,
            plan.context_len_S,
            self._rank,
            num_shares(q_SHC.shape[0], q_SHC.shape[1], tuning),
            first_token=plan.first_token,
            tuning=tuning,
        )
        return merge_and_expand(shares, self._value_HCV)

    def _decode(
        self,
        q_SHQ: torch.Tensor,
        q_SHC: torch.Tensor,
        cache: torch.Tensor,
        plan: DevicePlan,
        out_SHV: torch.Tensor,
    ) -> None:
        """q_SHC has its rotated dims already."""
        from engine.kernels.attention_decode import mla_decode

        absorbed_HSC = q_SHC[..., : self._rank].transpose(0, 1)
        torch.bmm(q_SHQ[..., : self._nope].transpose(0, 1), self._key_HNC, out=absorbed_HSC)
        latent_SHC = mla_decode(
            q_SHC,
            cache,
            plan.block_tables_SB,
            plan.context_len_S,
            self._rank,
            first_token=plan.first_token,
        )
        torch.bmm(latent_SHC.transpose(0, 1), self._value_HCV, out=out_SHV.transpose(0, 1))

    def _prefill(
        self,
        q_THQ: torch.Tensor,
        rows_TC: torch.Tensor,
        cache: torch.Tensor,
        chunks: ChunkRows,
        out_THV: torch.Tensor,
    ) -> None:
        from engine.kernels.attention_context import expand_context
        from engine.kernels.attention_prefill import Segments, mla_prefill
        from engine.kernels.mla_fp8_cache import gather_rows, is_fp8

        num_heads = q_THQ.shape[1]
        context = chunks.context
        rows_LC = rows_TC
        if isinstance(context, GatheredContext):
            if is_fp8(cache):
                rows_LC = gather_rows(cache, context.slots, self._rank, rows_TC.dtype)
            else:
                rows_LC = cache.flatten(0, 1).index_select(0, context.slots)
        cached = None
        if isinstance(context, PagedContext):
            out_THV.zero_()  # a graph's padding rows belong to nobody
            cached = expand_context(
                cache, context.block_tables, context.start, self._expansion_KC, num_heads, context.max_rows
            )
        expanded = functional.linear(rows_LC[:, : self._rank], self._expansion_KC)
        segments = Segments(chunks.query_start, chunks.context_start)
        key_value_LHK = expanded.unflatten(-1, (num_heads, -1))
        rope_LR = rows_LC[:, self._rank :]
        mla_prefill(q_THQ, key_value_LHK, rope_LR, segments, cached=cached, out_THV=out_THV)


def kernels_fit(config: MlaConfig) -> bool:
    """Triton's tiles are powers of two."""
    sizes = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)
    return all(is_power_of_two(size) and size >= 16 for size in sizes)
