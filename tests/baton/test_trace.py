import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.bench.trace import (
    BLOCK_TOKENS,
    Replay,
    TraceRequest,
    TraceShape,
    make_trace,
    read_trace,
    replay,
    write_trace,
)

SHAPE = TraceShape(num_requests=120, requests_per_s=2.0, max_input_length=6000)


def request(timestamp_ms=0, input_length=1000, output_length=8, hash_ids=(0, 1)):
    return TraceRequest(
        timestamp_ms=timestamp_ms, input_length=input_length, output_length=output_length, hash_ids=hash_ids
    )


def prompt(session):
    return list(session.turns[0].new_ids)


def common_len(left, right):
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def test_a_written_trace_reads_the_same(tmp_path):
    path = tmp_path / "trace.jsonl"
    requests = make_trace(SHAPE)
    write_trace(path, requests)
    assert read_trace(path) == requests
    assert read_trace(path, max_requests=7) == requests[:7]


def test_a_line_in_the_published_form_is_read(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n\n'
    )
    assert read_trace(path) == [request(27482, 6955, 52, (46, 47))]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"timestamp": 0}',
        '{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}',
    ],
)
def test_a_wrong_line_is_named(tmp_path, line):
    path = tmp_path / "trace.jsonl"
    write_trace(path, [request()])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="trace.jsonl:2"):
        read_trace(path)


def test_a_made_trace_is_the_same_by_seed_ordered_and_bounded():
    requests = make_trace(SHAPE)
    assert requests == make_trace(SHAPE)
    assert requests != make_trace(TraceShape(num_requests=120, requests_per_s=2.0, seed=1))
    times = [r.timestamp_ms for r in requests]
    assert len(requests) == 120
    assert times[0] == 0
    assert times == sorted(times)
    assert max(r.input_length for r in requests) <= 6000


def test_ids_of_a_made_trace_cover_the_prompt_and_keep_their_parent():
    parents = {}
    for r in make_trace(SHAPE):
        assert len(r.hash_ids) == -(-r.input_length // BLOCK_TOKENS)
        for parent, hash_id in zip((None, *r.hash_ids), r.hash_ids, strict=False):
            assert parents.setdefault(hash_id, parent) == parent


def test_turns_of_a_made_trace_share_their_history():
    requests = make_trace(TraceShape(num_requests=60, requests_per_s=1.0, mean_turns=6.0, mean_think_s=1.0))
    ids = [hash_id for r in requests for hash_id in r.hash_ids]
    num_system = len({hash_id for hash_id in ids if hash_id < 8 * 4})
    repeated_history = len(ids) - len(set(ids)) - (sum(hash_id < 32 for hash_id in ids) - num_system)
    assert repeated_history > 0
    assert num_system <= 32


def test_prompts_agree_exactly_as_far_as_their_ids():
    same_start = [request(hash_ids=(5, 6)), request(hash_ids=(5, 7)), request(hash_ids=(8, 6))]
    first, second, third = (prompt(session) for session in replay(same_start, Replay())[0])
    assert common_len(first, second) == BLOCK_TOKENS
    assert common_len(first, third) < 20
    assert len(first) == 1000


def test_a_replay_is_scaled_in_time_and_length():
    requests = [request(500), request(2500, output_length=100)]
    how = Replay(time_scale=0.25, length_scale=0.1)
    sessions, arrivals_s = replay(requests, how)
    assert arrivals_s == [0.0, 0.5]
    assert [len(prompt(session)) for session in sessions] == [100, 100]
    assert [session.turns[0].output_len for session in sessions] == [1, 10]
    assert common_len(prompt(sessions[0]), prompt(sessions[1])) == 100


def test_a_replay_keeps_its_bounds():
    requests = [request(second * 1000, 3000, hash_ids=tuple(range(6))) for second in range(50)]
    sessions, _ = replay(requests, Replay(max_requests=5, max_prompt_len=700))
    assert [len(prompt(session)) for session in sessions] == [700] * 5
    _, arrivals_s = replay(requests, Replay(max_duration_s=3.0))
    assert arrivals_s == [0.0, 1.0, 2.0, 3.0]


def test_a_prompt_with_too_few_ids_gets_a_rest_of_its_own():
    sessions, _ = replay([request(input_length=2000, hash_ids=(1,))] * 2, Replay())
    first, second = map(prompt, sessions)
    assert len(first) == len(second) == 2000
    assert common_len(first, second) == BLOCK_TOKENS


@given(st.integers(0, 30), st.floats(0.01, 2.0))
def test_a_replay_is_the_same_by_seed_and_in_the_vocabulary(seed, length_scale):
    requests = make_trace(TraceShape(num_requests=4, requests_per_s=1.0, seed=seed, max_input_length=4000))
    how = Replay(length_scale=length_scale, vocab_size=300, seed=seed)
    sessions, arrivals_s = replay(requests, how)
    assert (sessions, arrivals_s) == replay(requests, how)
    assert all(100 <= token_id < 300 for session in sessions for token_id in prompt(session))


def test_an_empty_trace_is_refused():
    with pytest.raises(ValueError, match="no request"):
        replay([], Replay())


@pytest.mark.parametrize("wrong", [{"length_scale": 0}, {"max_requests": 0}, {"max_prompt_len": 0}])
def test_a_replay_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError):
        Replay(**wrong)


@pytest.mark.parametrize("wrong", [{"requests_per_s": 0}, {"mean_turns": 0.5}, {"max_input_length": 2048}])
def test_a_shape_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError):
        TraceShape(**{"num_requests": 1, "requests_per_s": 1.0, **wrong})
