"""Tokens drawn on the device against engine.draw, penalties against engine.logits_edits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.draw import Truncation, argmax, draw, draw_truncated
from engine.logits_edits import edit_logits
from engine.philox import uniform
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

pytest.importorskip("triton", reason="the kernels need triton")

from engine.kernels.penalties import RowPenalties, TokenCounts, penalise_
from engine.kernels.sampling import RowSampling, draw_tokens, greedy_tokens

VOCAB = 5000  # three shares, the last one not full
# (temperature, top_k, top_p, min_p)
ROWS = {
    "plain": [(1.0, 0, 1.0, 0.0), (0.3, 0, 1.0, 0.0), (2.0, 0, 1.0, 0.0)],
    "top_k": [(1.0, 1, 1.0, 0.0), (1.0, 7, 1.0, 0.0), (1.5, 4000, 1.0, 0.0)],
    "top_p": [(1.0, 0, 0.9, 0.0), (0.7, 0, 0.5, 0.0), (1.0, 0, 1e-6, 0.0)],
    "min_p": [(1.0, 0, 1.0, 0.1), (1.0, 0, 1.0, 1.0), (1.0, 0, 1.0, 1e-4)],
    "all": [(0.8, 50, 0.9, 0.01), (1.2, 3, 0.99, 0.2), (1.0, VOCAB + 9, 0.7, 0.0)],
    "mixed": [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.0, 5, 0.5, 0.1)],
}


def on_device(rows: list[tuple[float, int, float, float]], seeds: list[int], device: str) -> RowSampling:
    temperature, top_k, top_p, min_p = zip(*rows, strict=True)
    signed = np.array(seeds, dtype=np.uint64).view(np.int64)
    return RowSampling(
        torch.tensor(temperature, device=device),
        torch.tensor(top_k, dtype=torch.int32, device=device),
        torch.tensor(top_p, device=device),
        torch.tensor(min_p, device=device),
        torch.from_numpy(signed).to(device),
    )


def drawn_on_cpu(
    logits: torch.Tensor, rows: list[tuple[float, int, float, float]], seeds: list[int], positions: list[int]
) -> list[int]:
    u = torch.from_numpy(uniform(seeds, positions))
    tokens = []
    for n, (temperature, top_k, top_p, min_p) in enumerate(rows):
        row = logits[n : n + 1].float().cpu()
        if temperature == 0.0:
            tokens += argmax(row)
            continue
        scaled = (row - row.max()) / temperature
        if top_k or top_p < 1.0 or min_p:
            truncation = Truncation(torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
            tokens.append(int(draw_truncated(scaled, truncation, u[n : n + 1])))
        else:
            tokens.append(int(draw(scaled, u[n : n + 1])))
    return tokens


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_device_draws_the_token_that_the_cpu_draws(name: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(len(name))
    rows = ROWS[name] * 2
    logits = (torch.randn(len(rows), VOCAB) * 3).to(dtype).to(device)
    seeds = [n * 2**61 + 7 for n in range(4)] + [2**64 - 1, 0]
    positions = [n * 1000 for n in range(5)] + [2**33]
    out = torch.full((len(rows),), -1, dtype=torch.int64, device=device)

    draw_tokens(
        logits,
        on_device(rows, seeds, device),
        torch.tensor(positions, device=device),
        out,
        is_truncated=name != "plain",
    )

    assert out.tolist() == drawn_on_cpu(logits, rows, seeds, positions)


def test_tokens_that_tie_with_the_last_kept_one_are_kept(device: str) -> None:
    logits = torch.full((9, VOCAB), -30.0, device=device)
    logits[:, [5, 2900, 4999]] = 1.0  # equal: top_k 2 keeps all three
    sampling = on_device([(1.0, 2, 1.0, 0.0)] * 9, list(range(9)), device)
    out = torch.empty(9, dtype=torch.int64, device=device)

    draw_tokens(logits, sampling, torch.arange(9, device=device), out, is_truncated=True)

    assert set(out.tolist()) == {5, 2900, 4999}
    assert out.tolist() == drawn_on_cpu(logits, [(1.0, 2, 1.0, 0.0)] * 9, list(range(9)), list(range(9)))


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")
def test_masked_tokens_are_never_drawn(device: str) -> None:
    logits = torch.full((16, VOCAB), float("-inf"), device=device)
    logits[:, 4321] = 0.5
    sampling = on_device([(1.0, 0, 1.0, 0.0), (1.0, 0, 0.9, 0.0)] * 8, list(range(16)), device)
    out = torch.empty(16, dtype=torch.int64, device=device)
    for is_truncated in (False, True):
        draw_tokens(logits, sampling, torch.arange(16, device=device), out, is_truncated=is_truncated)
        assert out.tolist() == [4321] * 16


def test_greedy_takes_the_lowest_of_equals(device: str) -> None:
    logits = torch.randn(4, VOCAB, device=device)
    logits[1, [4200, 17, 2500]] = 9.0
    out = torch.empty(4, dtype=torch.int64, device=device)
    greedy_tokens(logits, out)
    assert out[1] == 17
    assert out.tolist() == argmax(logits.cpu())


def test_penalties_equal_those_of_the_host(device: str) -> None:
    torch.manual_seed(0)
    params = [
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25),
        SamplingParams(),
        SamplingParams(repetition_penalty=0.8, presence_penalty=1.0, frequency_penalty=0.1),
    ]
    seqs = [Sequence(i, [1, 2, 3, 1 + i], sampling) for i, sampling in enumerate(params)]
    counts = TokenCounts(6, VOCAB, device)
    slots = [5, 0, 3, 2]
    for seq, slot in zip(seqs, slots, strict=True):
        counts.start(
            slot, torch.tensor(list(seq.token_ids), device=device), torch.tensor([7, 7], device=device)
        )
        for token in (7, 7, 4000 + slot):
            seq.token_ids.append(token)
    slots_N = torch.tensor(slots, device=device)
    counts.add(slots_N, 4000 + slots_N)
    logits = torch.randn(4, VOCAB, device=device)
    expected = logits.cpu().clone()
    edit_logits(expected, seqs, frozenset())
    values = zip(
        *[(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params], strict=True
    )

    penalise_(logits, slots_N, counts, RowPenalties(*(torch.tensor(v, device=device) for v in values)))

    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-6, atol=1e-6)
    before = logits.clone()
    penalise_(logits, slots_N * 0 - 1, counts, RowPenalties(*[torch.full((4,), 2.0, device=device)] * 3))
    assert torch.equal(logits, before)
