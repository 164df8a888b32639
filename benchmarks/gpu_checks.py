"""The kernels against their references at the sizes of a real model, on fresh random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from benchmarks.gpu_moe import HIDDEN, NUM_EXPERTS, SPEC, random_weights
from benchmarks.gpu_timing import relative_error
from engine.checkpoint import fp8
from engine.draw import Truncation, draw, draw_truncated
from engine.kernels.few_rows import MAX_ROWS, multiply_few_rows
from engine.kernels.fp8_quantise import quantise_rows, quantise_rows_reference
from engine.kernels.gated_silu import gated_silu_rows
from engine.kernels.linear import multiply_fp8
from engine.kernels.moe_gate import choose_experts_fused, new_gate_state, split_weight
from engine.kernels.moe_tiles import moe_tiles
from engine.kernels.rms_norm import add_rms_norm_, rms_norm_reference
from engine.kernels.sampling import RowSampling, draw_tokens, greedy_tokens
from engine.layers.fp8_linear import Fp8Linear
from engine.moe.expert_products import run_experts, run_experts_reference
from engine.moe.specialised import can_specialise
from engine.philox import uniform

VOCAB = 102_400
Check = tuple[str, float, float]  # name, error, tolerance


def run_checks(sections: Iterable[str]) -> int:
    """How many failed."""
    by_section = {"norm": [_norms], "dense": [_linear], "moe": [_gate, _experts], "sampling": [_sampling]}
    num_failed = 0
    for section in (check for name in sections for check in by_section[name]):
        try:
            for name, error, tolerance in section():
                is_good = error <= tolerance
                num_failed += not is_good
                print(
                    f"{'ok  ' if is_good else 'FAIL'} {name}: {error:.2e} (at most {tolerance:.0e})",
                    flush=True,
                )
        except Exception as error:  # noqa: BLE001 - the others are checked all the same
            num_failed += 1
            print(f"FAIL {section.__name__}: {error!r}"[:1500], flush=True)
    return num_failed


def _norms() -> Iterator[Check]:
    x, delta = (torch.randn(333, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.rand(HIDDEN, device="cuda", dtype=torch.bfloat16)
    total = x + delta
    normed = add_rms_norm_(x, delta, weight, 1e-6)
    yield "sum of the norm", relative_error(x, total), 4e-3
    yield "norm", relative_error(normed, rms_norm_reference(x, weight, 1e-6)), 4e-3
    wide = torch.randn(77, 2 * 10944, device="cuda", dtype=torch.bfloat16)
    up, gate = wide.double().chunk(2, 1)
    yield "silu", relative_error(gated_silu_rows(wide), up * torch.nn.functional.silu(gate)), 4e-3
    found, expected = quantise_rows(x), quantise_rows_reference(x)
    same = (found.values.float() == expected.values.float()).float().mean()
    yield "quantised values that differ", 1.0 - float(same), 1e-3


def _linear() -> Iterator[Check]:
    weight = torch.randn(3648, HIDDEN, device="cuda") * HIDDEN**-0.5
    value, scale = fp8.quantise(weight, (128, 128))
    layer = Fp8Linear(weight)  # 703 rows are a library's, where there is one
    for num_rows in (1, 2, 5, 100, 703):
        x = torch.randn(num_rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
        exact = x.double() @ fp8.dequantise(value, scale, (128, 128), torch.float32).double().t()
        yield f"fp8 product of {num_rows} rows", relative_error(multiply_fp8(x, value, scale), exact), 0.04
        yield f"fp8 layer of {num_rows} rows", relative_error(layer(x), exact), 0.06
        if num_rows <= MAX_ROWS:
            half = weight.bfloat16()
            error = relative_error(multiply_few_rows(x, half), x.double() @ half.double().t())
            yield f"few rows product of {num_rows}", error, 4e-3


def _gate() -> Iterator[Check]:
    weight = torch.randn(NUM_EXPERTS, HIDDEN, device="cuda") * HIDDEN**-0.5
    for num_tokens in (1, 100, 5000):
        x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        state = new_gate_state(NUM_EXPERTS, "cuda")
        choice = choose_experts_fused(x, split_weight(weight, torch.bfloat16), None, SPEC, state)
        scores = (x.double() @ weight.double().t()).softmax(1)
        best = scores.topk(SPEC.top_k, dim=1)
        differs = (choice.ids_TK[:, : SPEC.top_k] != best.indices).any(1).double().mean()
        yield f"gate of {num_tokens}: tokens that choose otherwise", float(differs), 2e-3
        error = relative_error(choice.weights_TK[:, : SPEC.top_k], best.values)
        yield f"gate of {num_tokens}: weights", error, 1e-4
        counts = torch.bincount(choice.ids_TK[:, : SPEC.top_k].flatten(), minlength=NUM_EXPERTS)
        yield f"gate of {num_tokens}: load", float((state.load_E != counts).sum()), 0.0


def _experts() -> Iterator[Check]:
    gate = split_weight(torch.randn(NUM_EXPERTS, HIDDEN, device="cuda") * HIDDEN**-0.5, torch.bfloat16)
    state = new_gate_state(NUM_EXPERTS, "cuda")
    for is_fp8, tolerance in ((False, 8e-3), (True, 0.06)):
        weights = random_weights(is_fp8)
        is_specialised = can_specialise(weights, torch.bfloat16)
        for num_tokens in (1, 33, 300, 700, 768, 3000, 8192):
            x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
            choice = choose_experts_fused(x, gate, None, SPEC, state)
            tiles = moe_tiles(num_tokens, weights.up_gate.dtype, is_specialised=is_specialised)
            found = run_experts(x, choice, SPEC, weights, tiles)
            again = run_experts(x, choice, SPEC, weights, tiles)
            expected = run_experts_reference(x, choice, SPEC, weights)
            name = f"experts {'fp8' if is_fp8 else 'bf16'} of {num_tokens}, {type(tiles).__name__}"
            yield name, relative_error(found, expected), tolerance
            yield name + ": values that differ when repeated", float((found != again).sum()), 0.0
        del weights


def _sampling() -> Iterator[Check]:
    num_rows = 64
    logits = torch.randn(num_rows, VOCAB, device="cuda") * 2
    out = torch.full((num_rows,), -1, dtype=torch.int64, device="cuda")
    greedy_tokens(logits, out)
    yield "greedy: tokens that differ", float((out != logits.argmax(1)).sum()), 0.0
    seeds, positions = list(range(num_rows)), [17 * n for n in range(num_rows)]
    u = torch.from_numpy(uniform(seeds, positions))
    for name, top_k, top_p, min_p in _TRUNCATIONS:
        sampling = row_sampling(num_rows, top_k, top_p, min_p)
        is_truncated = name != "plain"
        draw_tokens(logits, sampling, torch.tensor(positions, device="cuda"), out, is_truncated=is_truncated)
        scaled = logits.cpu() - logits.cpu().amax(1, keepdim=True)
        if is_truncated:
            limits = (torch.full((num_rows,), v) for v in (top_k, top_p, min_p))
            expected = draw_truncated(scaled, Truncation(*limits), u)
        else:
            expected = draw(scaled, u)
        yield f"draw {name}: share of tokens that differ", float((out.cpu() != expected).float().mean()), 0.02


_TRUNCATIONS: tuple[tuple[str, int, float, float], ...] = (
    ("plain", 0, 1.0, 0.0),
    ("top_k", 50, 1.0, 0.0),
    ("top_p", 0, 0.9, 0.0),
    ("all", 1000, 0.95, 0.01),
)


def row_sampling(num_rows: int, top_k: int, top_p: float, min_p: float) -> RowSampling:
    def full(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((num_rows,), value, dtype=dtype, device="cuda")

    return RowSampling(
        full(1.0, torch.float32),
        full(top_k, torch.int32),
        full(top_p, torch.float32),
        full(min_p, torch.float32),
        torch.arange(num_rows, device="cuda"),
    )
