"""Runs engines to an end and hands sequences from one to another, for the tests beside it."""

from __future__ import annotations

from engine.engine import Engine
from engine.kv_cache import KvCache
from engine.outputs import SequenceOutput, StepOutput, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)


def run(engine: Engine) -> tuple[dict[int, list[int]], list[StepOutput]]:
    """Until there is nothing to compute: tokens by sequence id, and the steps."""
    tokens: dict[int, list[int]] = {}
    steps = []
    while engine.has_work:
        step = engine.step()
        engine.check_integrity()
        steps.append(step)
        for output in step.outputs:
            tokens.setdefault(output.seq_id, []).extend(output.token_ids)
    return tokens, steps


def generate(engine: Engine, prompts: list[list[int]], max_tokens: int, first_id: int = 0) -> list[list[int]]:
    for i, prompt_ids in enumerate(prompts):
        engine.add(Sequence(first_id + i, prompt_ids, greedy(max_tokens)))
    tokens, _ = run(engine)
    return [tokens[first_id + i] for i in range(len(prompts))]


class CopyingListener:
    """Carries what is announced into the blocks of another engine, rectangle by rectangle."""

    def __init__(self, sender: Engine, receiver: Engine, num_held_blocks: int) -> None:
        self.sender = sender
        self.receiver = receiver
        self.num_held_blocks = num_held_blocks
        self.block_ids: list[int] = []
        self.origin = sender.kv_cache
        self.announced: list[tuple[int, int, int, int]] = []  # first layer, layers, first block, blocks
        self.num_started = 0
        self.num_hit_tokens = 0

    def started(self, num_blocks: int, num_hit_tokens: int, queue_s: float, origin: KvCache) -> None:
        assert queue_s >= 0.0
        self.origin = origin
        self.num_started += 1
        self.num_hit_tokens = num_hit_tokens

    def kv_ready(self, first_layer: int, num_layers: int, first_block: int, block_ids: list[int]) -> None:
        self.announced.append((first_layer, num_layers, first_block, len(block_ids)))
        skipped = max(0, self.num_held_blocks - first_block)
        wanted = block_ids[skipped:]
        if not wanted:
            return
        payload = self.origin.read_blocks(first_layer, num_layers, wanted)
        start = first_block + skipped
        targets = self.block_ids[start : start + len(wanted)]
        self.receiver.kv_cache.write_blocks(first_layer, num_layers, targets, payload)


def hand_off(
    sender: Engine,
    receiver: Engine,
    seq_id: int,
    prompt_ids: list[int],
    max_tokens: int,
    *,
    has_draft: bool = True,
) -> tuple[CopyingListener, SequenceOutput]:
    """Prefill on the sender, commit on the receiver, which must have room. The output is the sender's."""
    num_held = receiver.reserve(Sequence(seq_id, prompt_ids, greedy(max_tokens)))
    listener = CopyingListener(sender, receiver, num_held)
    receiver.extend(seq_id, lambda block_ids: listener.block_ids.extend(block_ids))
    sender.add(Sequence(seq_id, prompt_ids, greedy(max_tokens), keeps_blocks=True, kv_listener=listener))
    outputs: list[SequenceOutput] = []
    while not outputs:
        outputs = [output for output in sender.step().outputs if output.seq_id == seq_id]
        sender.check_integrity()
    first = outputs[0]
    assert first.finish_reason is not None
    receiver.commit(seq_id, TokenLogprobs(first.token_ids[0], 0.0), first.draft if has_draft else None)
    sender.release(seq_id)
    return listener, first
