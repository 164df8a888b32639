"""What a sequence brings along when it comes to the engine."""

from __future__ import annotations

from proto import common_pb2
from tests.fakes.fake_model import build_fake_engine
from worker.async_engine import AsyncEngine
from worker.sequence_spec import decode_sequence

PROMPT, OUTPUT = [(7 * i + 3) % 200 + 1 for i in range(10)], [5, 6, 2**32 - 1]


def _spec(**fields: object) -> common_pb2.SequenceSpec:
    sampling = common_pb2.SamplingParams(top_p=1.0, repetition_penalty=1.0, max_tokens=8)
    return common_pb2.SequenceSpec(prompt_ids=PROMPT, sampling=sampling, **fields)  # type: ignore[arg-type]


async def test_tokens_and_the_hashes_of_its_full_blocks() -> None:
    engine = AsyncEngine(build_fake_engine(block_size=4))
    chain = engine.engine.hash_chain
    seq = await decode_sequence(engine, _spec(output_ids=OUTPUT, cache_salt="salt", tenant="tenant"))
    assert seq.token_ids.tolist() == PROMPT + OUTPUT
    assert seq.num_prompt_tokens == len(PROMPT)
    assert seq.prefix is not None
    assert seq.prefix.hashes == chain.hashes(PROMPT + OUTPUT, "salt", "tenant")
    assert len(seq.prefix.hashes) == 3
    seq.token_ids.extend([9, 9, 9])
    assert seq.prefix.upto(4, seq.token_ids)[3:] == chain.hashes(seq.token_ids.tolist(), "salt", "tenant")[3:]


async def test_an_empty_prompt_is_left_to_the_engine_to_refuse() -> None:
    engine = AsyncEngine(build_fake_engine())
    spec = _spec()
    spec.ClearField("prompt_ids")
    assert (await decode_sequence(engine, spec)).num_tokens == 0
