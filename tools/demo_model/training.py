"""Training of the student on a corpus, for a given time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tools.demo_model.muon import Muon
from tools.demo_model.student import Student
from tools.demo_model.texts import Corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    seconds: float
    rows: int = 128  # of a batch
    row_tokens: int = 1024
    matrix_rate: float = 0.02  # Muon
    other_rate: float = 3e-3  # Adam: embeddings, norms, gates
    decay: float = 0.02
    mtp_weight: float = 0.3
    balance_speed: float = 1e-3
    steps_between_logs: int = 50


@dataclass(frozen=True, slots=True)
class Progress:
    step: int
    seconds: float
    tokens: int
    loss: float  # nats a token
    mtp_loss: float


def train(student: Student, corpus: Corpus, plan: TrainingPlan, report: Callable[[Progress], None]) -> None:
    """In place. The rate rises for 2 % of the time, stays, and falls to zero over the last 60 %."""
    device = next(student.parameters()).device
    needed = 2 * plan.rows * plan.row_tokens
    if len(corpus.tokens) < needed:
        raise ValueError(f"{len(corpus.tokens)} tokens of text, at least {needed} are needed")
    batches = _batches(corpus, plan, device)
    matrices = [p for name, p in student.named_parameters() if _is_matrix(name, p)]
    muon = Muon(matrices)
    chosen = set(map(id, matrices))
    others = [p for p in student.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")
    losses_of = torch.compile(student.losses, dynamic=False) if device.type == "cuda" else student.losses
    student.train()
    step, started, paused = 0, time.monotonic(), 0.0
    while (elapsed := time.monotonic() - started - paused) < plan.seconds:
        factor = _rate_factor(elapsed / plan.seconds)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss, mtp_loss = losses_of(*next(batches))
        (loss + plan.mtp_weight * mtp_loss).backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for group in adam.param_groups:
            group["lr"] = plan.other_rate * factor
        adam.step()
        muon.step(plan.matrix_rate * factor, plan.decay)
        student.zero_grad()
        for experts in student.moe_layers():
            experts.balance(plan.balance_speed * min(1.0, 2 * factor))
        step += 1
        if step == 1:  # compiling is not training
            loss.item()
            paused = time.monotonic() - started
        if step % plan.steps_between_logs == 0:
            tokens = step * plan.rows * plan.row_tokens
            report(Progress(step, time.monotonic() - started - paused, tokens, loss.item(), mtp_loss.item()))
    student.eval()


def _rate_factor(done: float) -> float:
    return min(1.0, done / 0.02 + 0.02, max(0.0, 1 - done) / 0.6)


def _is_matrix(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim >= 2 and "embed" not in name and "gate_weight" not in name


def _batches(
    corpus: Corpus, plan: TrainingPlan, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """tokens int64 and targets bool, [rows, row_tokens], for ever. Documents are shuffled anew in each epoch
    and laid one after another; a row begins where a document does, as every request will."""
    tokens = corpus.tokens.to(device)
    is_target = corpus.is_target().to(device)
    starts, lengths = corpus.starts.to(device), corpus.lengths.to(device)
    offsets = torch.arange(plan.row_tokens, device=device)
    generator = torch.Generator(device).manual_seed(0)
    while True:
        order = torch.randperm(len(starts), device=device, generator=generator)
        laid = lengths[order].cumsum(0) - lengths[order]
        shift = (starts[order] - laid).repeat_interleave(lengths[order])
        index = shift + torch.arange(len(tokens), device=device)
        wanted = torch.arange(0, len(tokens) - plan.row_tokens, plan.row_tokens, device=device)
        firsts = laid[torch.searchsorted(laid, wanted, right=True) - 1]
        firsts = firsts[torch.randperm(len(firsts), device=device, generator=generator)]
        for i in range(0, len(firsts) - plan.rows + 1, plan.rows):
            places = index[firsts[i : i + plan.rows, None] + offsets]
            yield tokens[places].long(), is_target[places]
