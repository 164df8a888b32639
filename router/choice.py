"""One answer in the making: tokens of its flow become text, up to where it stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from proto import common_pb2
from router.detokenizer import Detokenizer
from router.generation import Generation
from router.request_flow import FlowUpdate, RequestFlow
from router.stop_strings import StopStrings


@dataclass(slots=True)
class ChoiceDelta:
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: Sequence[common_pb2.TokenLogprobs] = ()
    prompt_logprobs: Sequence[common_pb2.TokenLogprobs] = ()
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: str | int | None = None  # the stop string or stop token id of the request


class Choice:
    def __init__(
        self,
        index: int,
        prompt_index: int,
        flow: RequestFlow,
        detokenizer: Detokenizer,
        generation: Generation,
    ) -> None:
        sampling = generation.sampling[index]
        self.index = index
        self.prompt_index = prompt_index
        self.flow = flow
        self.num_tokens = 0  # generated, shown or not
        self.is_finished = False
        self._detokenizer = detokenizer
        self._stops = StopStrings(generation.stops, includes_stop=generation.includes_stop)
        self.has_stops = bool(generation.stops)
        self._min_tokens = sampling.min_tokens
        self._stop_ids = frozenset(sampling.stop_token_ids)
        self._includes_stop = generation.includes_stop
        self._hides_output = generation.hides_output

    @property
    def num_hit_tokens(self) -> int:
        return self.flow.timings.num_hit_tokens if self.flow.timings else 0

    async def next_delta(self) -> ChoiceDelta:
        """Not to be called after one with a finish_reason."""
        update = await self.flow.next_update()
        if self._hides_output:
            delta = ChoiceDelta(
                text="",
                prompt_logprobs=update.prompt_logprobs,
                finish_reason=update.finish_reason and "length",
            )
        else:
            delta = self._read_with_stops(update) if self.has_stops else self.read(update)
        if delta.finish_reason:
            self.is_finished = True
            self.flow.close(delta.finish_reason)
        return delta

    def read(self, update: FlowUpdate) -> ChoiceDelta:
        """When no string stops it."""
        self.num_tokens += len(update.token_ids)
        text = self._detokenizer.push(self._shown_ids(update))
        if update.finish_reason:
            text += self._detokenizer.flush()
        return self._delta(update, text)

    def _read_with_stops(self, update: FlowUpdate) -> ChoiceDelta:
        """Token by token: what comes after a stop string in the same update was never asked for."""
        pieces = []
        shown_ids = self._shown_ids(update)
        for num_read, token_id in enumerate(shown_ids, 1):
            self.num_tokens += 1
            text = self._detokenizer.push((token_id,))
            if self.num_tokens <= self._min_tokens:
                pieces.append(text)
                continue
            pieces.append(self._stops.push(text))
            if self._stops.matched is not None:
                return self._stopped("".join(pieces), update, num_read)
        self.num_tokens += len(update.token_ids) - len(shown_ids)
        if update.finish_reason:
            pieces.append(self._stops.push(self._detokenizer.flush()))
            pieces.append(self._stops.flush())
        return self._delta(update, "".join(pieces))

    def _shown_ids(self, update: FlowUpdate) -> list[int]:
        """Without the token that stopped it."""
        is_hidden = update.finish_reason == "stop" and not self._includes_stop
        return update.token_ids[:-1] if is_hidden else update.token_ids

    def _stopped(self, text: str, update: FlowUpdate, num_tokens: int) -> ChoiceDelta:
        delta = self._delta(update, text)
        delta.token_ids, delta.logprobs = delta.token_ids[:num_tokens], delta.logprobs[:num_tokens]
        delta.finish_reason = "stop"
        delta.stop_reason = self._stops.matched
        return delta

    def _delta(self, update: FlowUpdate, text: str) -> ChoiceDelta:
        delta = ChoiceDelta(
            text, update.token_ids, update.logprobs, update.prompt_logprobs, update.finish_reason
        )
        if update.finish_reason == "stop" and update.token_ids and update.token_ids[-1] in self._stop_ids:
            delta.stop_reason = update.token_ids[-1]
        return delta


async def deltas(choices: list[Choice]) -> AsyncIterator[tuple[Choice, ChoiceDelta]]:
    """Of all choices as they come, until every one has finished."""
    if len(choices) == 1:
        choice = choices[0]
        while not choice.is_finished:
            yield choice, await choice.next_delta()
        return
    waiting = {asyncio.ensure_future(choice.next_delta()): choice for choice in choices}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                choice = waiting.pop(task)
                yield choice, task.result()
                # Not before: what this choice is offered while it waits must come after that delta.
                if not choice.is_finished:
                    waiting[asyncio.ensure_future(choice.next_delta())] = choice
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
