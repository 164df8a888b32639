"""gRPC as every Baton service uses it: one error table, one set of options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import grpc
import grpc.aio

from servicekit.errors import HandoffFailed, InvalidRequest, Overloaded, ServingError, WorkerLost
from servicekit.tls import WORKER_NAME, Credentials

MAX_MESSAGE_BYTES = 4 << 20
RETRY_AFTER_KEY = "retry-after-s"

# First match wins, so subclasses come before ServingError.
_STATUS_BY_ERROR: tuple[tuple[type[ServingError], grpc.StatusCode], ...] = (
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (WorkerLost, grpc.StatusCode.UNAVAILABLE),
    (HandoffFailed, grpc.StatusCode.FAILED_PRECONDITION),
    (ServingError, grpc.StatusCode.INTERNAL),
)
# Codes that gRPC itself makes, beside those of the table. CANCELLED: the other side ended the call.
_LOST_CODES = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN}
_OVERLOADED_CODES = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}
_INVALID_CODES = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE}
_HANDOFF_CODES = {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DATA_LOSS}

_COMMON_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.max_frame_size", 4 << 20),
    ("grpc.http2.lookahead_bytes", 8 << 20),
    ("grpc.http2.write_buffer_size", 4 << 20),
    # A cut network must end calls even if nobody writes: the chain of calls owns every resource.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_CHANNEL_OPTIONS = (
    *_COMMON_OPTIONS,
    ("grpc.enable_retries", 0),  # the router and the hand-off decide what is tried again
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_SERVER_OPTIONS = (
    *_COMMON_OPTIONS,
    ("grpc.so_reuseport", 0),  # two workers on one port is a mistake, not load balancing
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)


ChannelFactory = Callable[[str], grpc.aio.Channel]  # address -> channel


def build_channel(address: str, credentials: Credentials | None = None) -> grpc.aio.Channel:
    """A channel to "host:port", with mutual TLS if there are credentials; connects when first used."""
    plain = grpc.Compression.NoCompression
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS, compression=plain)
    options = (*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", WORKER_NAME))
    return grpc.aio.secure_channel(address, credentials.channel, options=options, compression=plain)


def build_server(
    handlers: Sequence[grpc.GenericRpcHandler[Any, Any]],
    *,
    host: str,
    port: int,
    credentials: Credentials | None = None,
) -> tuple[grpc.aio.Server, int]:
    """A bound server, not started, and its port (the system chooses for 0). OSError when it cannot bind.

    With credentials only callers with a certificate of the same CA get in.
    """
    server = grpc.aio.server(
        handlers=handlers, options=_SERVER_OPTIONS, compression=grpc.Compression.NoCompression
    )
    try:
        if credentials is None:
            bound_port = server.add_insecure_port(f"{host}:{port}")
        else:
            bound_port = server.add_secure_port(f"{host}:{port}", credentials.server)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error}") from error
    if bound_port == 0:
        raise OSError(f"cannot listen on {host}:{port}")
    return server, bound_port


def status_code(error: ServingError) -> grpc.StatusCode:
    return next(code for kind, code in _STATUS_BY_ERROR if isinstance(error, kind))


async def abort_with(context: grpc.aio.ServicerContext[Any, Any], error: ServingError) -> NoReturn:
    """End the call with the status of `error`; never returns."""
    metadata = ((RETRY_AFTER_KEY, f"{error.retry_after_s:.3f}"),) if isinstance(error, Overloaded) else ()
    await context.abort(status_code(error), str(error), trailing_metadata=metadata)
    raise AssertionError("abort returned")


def error_from_rpc(error: grpc.aio.AioRpcError, *, peer: str) -> ServingError:
    """The error that the other side meant. `peer` names it in the message."""
    code = error.code()
    message = f"{peer}: {error.details() or code.name}"
    if code in _INVALID_CODES:
        return InvalidRequest(error.details() or "invalid request")
    if code in _OVERLOADED_CODES:
        return Overloaded(message, retry_after_s=_retry_after_s(error))
    if code in _HANDOFF_CODES:
        return HandoffFailed(message, state="RESERVED")
    if code in _LOST_CODES:
        return WorkerLost(message)
    return ServingError(f"{message} ({code.name})")


def _retry_after_s(error: grpc.aio.AioRpcError) -> float:
    for key, value in cast(Any, error.trailing_metadata()) or ():
        if key == RETRY_AFTER_KEY:
            try:
                return float(value)
            except ValueError:
                return 1.0
    return 1.0
