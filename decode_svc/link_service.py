"""LinkService.Link: one router's requests come down, one message of tokens a step goes up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio

from decode_svc.branches import BranchGroups, BranchTurn
from decode_svc.link_updates import LinkUpdates
from decode_svc.request import DecodeRequest, RequestEnvironment
from proto import link_pb2
from proto.link_pb2 import LinkRequest, LinkResponse, Submit
from servicekit.errors import InvalidRequest, ServingError
from servicekit.rpc import abort_with
from worker.load import LoadMeter

LINK_SERVICE = "baton.v1.LinkService"
LINK_METHOD = "Link"


class LinkService:
    def __init__(self, environment: RequestEnvironment, load: LoadMeter) -> None:
        self._environment = environment
        self._load = load

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        method = grpc.stream_stream_rpc_method_handler(
            self.link,
            request_deserializer=LinkRequest.FromString,
            response_serializer=LinkResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(LINK_SERVICE, {LINK_METHOD: method})

    async def link(
        self, requests: AsyncIterator[LinkRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """However it ends, when it has ended none of its requests is left."""
        try:
            async with asyncio.TaskGroup() as group:
                link = Link(self._environment, self._load, group)
                writer = group.create_task(link.write(context))
                async for request_pb in requests:
                    link.receive(request_pb)
                link.cancel_all()
                writer.cancel()
        except* ServingError as errors:
            await abort_with(context, next(_leaves(errors)))


class Link:
    def __init__(self, environment: RequestEnvironment, load: LoadMeter, group: asyncio.TaskGroup) -> None:
        self._environment = environment
        self._load = load
        self._group = group
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._branch_groups = BranchGroups()
        self._updates = LinkUpdates()

    def receive(self, request_pb: LinkRequest) -> None:
        if request_pb.HasField("submit"):
            self._submit(request_pb.submit)
        elif request_pb.HasField("cancel"):
            task = self._tasks.get(request_pb.cancel.key)
            if task is not None:
                task.cancel()

    def cancel_all(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def write(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One message a step, unless the last one still waits for the router: then all since together."""
        await context.write(LinkResponse(load=self._load_pb()))
        num_counted = 0
        while True:
            messages = await self._updates.take()
            self._environment.metrics.count_tokens(self._updates.num_tokens - num_counted)
            num_counted = self._updates.num_tokens
            for message in messages:
                message.load.MergeFrom(self._load_pb())
                await context.write(message)

    def _load_pb(self) -> link_pb2.WorkerLoad:
        load = self._load  # rates change slowly and come with the registry, not with every step
        return link_pb2.WorkerLoad(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_free_blocks=load.num_free_blocks,
            num_total_blocks=load.num_blocks,
            num_waiting_tokens=load.num_waiting_tokens,
        )

    def _submit(self, submit_pb: Submit) -> None:
        key = submit_pb.key
        if key in self._tasks:
            # Not an update for that key: it would end the request that owns it.
            raise InvalidRequest(f"key {key} is already in use on this link")
        group = self._branch_groups.join(submit_pb.branch_group)
        request = DecodeRequest(self._environment, submit_pb, self._updates, BranchTurn(group))
        task = self._group.create_task(request.run())
        self._tasks[key] = task
        task.add_done_callback(lambda done: self._forget(key, request, done))

    def _forget(self, key: int, request: DecodeRequest, task: asyncio.Task[None]) -> None:
        del self._tasks[key]
        self._branch_groups.leave(request.branch_group)
        if task.cancelled():
            request.cancelled_before_run()


def _leaves(group: BaseExceptionGroup[ServingError]) -> Iterator[ServingError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
