"""The limit for a router in Python: a bare uvicorn application that streams the same bytes, and only that.

python -m benchmarks.bare_stream PORT STEP_MS
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import orjson
import uvicorn

_CHUNK = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000000,'
    b'"model":"test","choices":[{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}\n\n'
)
_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class BareStream:
    """All streams wake at the same tick, as those of a router do when a step's message arrives."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._tick = asyncio.Event()
        self._ticking: asyncio.Task[None] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        for index in range(orjson.loads(body)["max_tokens"] if body else 0):
            if index:
                await self._tick.wait()
            await send({"type": "http.response.body", "body": _CHUNK, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _live(self, receive: Any, send: Any) -> None:
        await receive()
        self._ticking = asyncio.create_task(self._run())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._ticking.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            self._tick.set()
            self._tick = asyncio.Event()


def main() -> None:
    port, step_ms = int(sys.argv[1]), float(sys.argv[2])
    app = BareStream(step_ms / 1000)
    uvicorn.run(
        app, port=port, loop="uvloop", http="httptools", ws="none", access_log=False, log_level="error"
    )


if __name__ == "__main__":
    main()
