"""Every Redis key and channel of Baton, and how long it lives.

{model} is a hash tag: all keys of one model live in one cluster slot, so a script may touch several of them.

baton:{model}:wrk                      hash    worker id -> WorkerRecord as JSON          longest worker lease
baton:{model}:wrk:leases               zset    worker id -> end of lease, server time ms  longest worker lease
baton:{model}:wrk:changes              pubsub  "announced <id>" or "withdrawn <id>"       -
baton:{model}:<scheme>:idx             hash    worker id -> incarnation, sequence, end    longest index lease
baton:{model}:<scheme>:idx:events      stream  changes of all workers, capped             longest index lease
baton:{model}:<scheme>:blk:<id>:<inc>  hash    block hash -> digit of the fastest        its index lease
                                               BlockTier where this incarnation has it,
                                               then its place (block_order.py)

Of the whole deployment, whatever its models:

baton:{keys}:api                       hash    name of an API key -> ApiKey as JSON       until revoked
baton:{keys}:api:version               string  random, new with every change              for ever
baton:{key:<digest>}:quota             hash    requests and tokens by second              61 s after the last
"""

from __future__ import annotations

from urllib.parse import quote

from kvstore.block_hash import HASH_SCHEME

# Events kept for mirrors that lag. One carries at most MAX_EVENT_HASHES hashes, so the stream stays near
# 64 MiB at its worst. A mirror that lags further takes a snapshot.
MAX_STREAM_EVENTS = 4096
MAX_EVENT_HASHES = 1024

API_KEYS = "baton:{keys}:api"
API_KEYS_VERSION = "baton:{keys}:api:version"


def _tag(model: str) -> str:
    return f"baton:{{{quote(model, safe='')}}}"


def workers(model: str) -> str:
    return f"{_tag(model)}:wrk"


def worker_leases(model: str) -> str:
    return f"{_tag(model)}:wrk:leases"


def worker_changes(model: str) -> str:
    return f"{_tag(model)}:wrk:changes"


def index_writers(model: str) -> str:
    return f"{_tag(model)}:{HASH_SCHEME}:idx"


def index_events(model: str) -> str:
    return f"{_tag(model)}:{HASH_SCHEME}:idx:events"


def worker_blocks(model: str, worker_id: str, incarnation: str) -> str:
    return f"{_tag(model)}:{HASH_SCHEME}:blk:{quote(worker_id, safe='')}:{incarnation}"


def quota(key_digest: str) -> str:
    return f"baton:{{key:{key_digest}}}:quota"
