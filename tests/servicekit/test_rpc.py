from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import pytest

from servicekit.errors import HandoffFailed, InvalidRequest, Overloaded, ServingError, WorkerLost
from servicekit.rpc import MAX_MESSAGE_BYTES, abort_with, build_channel, build_server, error_from_rpc

ERRORS = [
    InvalidRequest("bad prompt"),
    Overloaded("full", retry_after_s=2.5),
    WorkerLost("draining"),
    HandoffFailed("layouts differ", state="RESERVED"),
    ServingError("bug"),
]


async def _ask(error: ServingError, payload: bytes = b"x") -> ServingError:
    """The error that a client gets from a server that raises `error`."""

    async def method(request: bytes, context: Any) -> bytes:
        await abort_with(context, error)

    handler = grpc.unary_unary_rpc_method_handler(method)
    generic = grpc.method_handlers_generic_handler("test.Service", {"Ask": handler})
    server, port = build_server([generic], host="127.0.0.1", port=0)
    await server.start()
    try:
        async with build_channel(f"127.0.0.1:{port}") as channel:
            ask: Any = channel.unary_unary("/test.Service/Ask")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(payload)
            return error_from_rpc(caught.value, peer="test worker")
    finally:
        await server.stop(0)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_error_survives_the_wire(error: ServingError) -> None:
    received = await _ask(error)

    assert type(received) is type(error)
    assert str(error) in str(received)


async def test_retry_after_survives_the_wire() -> None:
    received = await _ask(Overloaded("full", retry_after_s=2.5))

    assert isinstance(received, Overloaded)
    assert received.retry_after_s == 2.5


async def test_server_that_is_not_there_is_a_lost_worker() -> None:
    async with build_channel("127.0.0.1:1") as channel:
        ask: Any = channel.unary_unary("/test.Service/Ask")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(b"")

    assert isinstance(error_from_rpc(caught.value, peer="prefill worker"), WorkerLost)


async def test_message_over_the_limit_is_refused() -> None:
    received = await _ask(ServingError("not reached"), b"x" * (MAX_MESSAGE_BYTES + 1))

    assert isinstance(received, Overloaded)


async def test_port_that_is_taken_is_an_os_error() -> None:
    _, port = first = build_server([], host="127.0.0.1", port=0)

    with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
        build_server([], host="127.0.0.1", port=port)
    await first[0].stop(0)
