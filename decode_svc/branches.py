"""Branches of one prompt on one link: one computes the prompt, the others wait and find it in the cache.

A branch waits for its turn. The first one has it until its first token or its end, whichever is first. With a
first token the prompt is computed, and all turns are over at once; without, the next branch tries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from proto.common_pb2 import SamplingParams, TokenLogprobs


class BranchGroup:
    def __init__(self) -> None:
        self.num_branches = 0  # that have not ended
        self.is_computed = False
        self.is_cached = False  # by the engine of this worker
        self.num_prompt_logprobs: int | None = None  # as the branch that computed the prompt asked for
        self.prompt_logprobs_pb: Sequence[TokenLogprobs] = ()
        self.turn = asyncio.Lock()


class BranchTurn:
    """One branch's part in its group."""

    def __init__(self, group: BranchGroup) -> None:
        self._group = group
        self._has_turn = False

    async def wait(self) -> None:
        await self._group.turn.acquire()
        self._has_turn = True
        if self._group.is_computed:
            self.end()

    @property
    def finds_prompt_cached(self) -> bool:
        """Another branch has brought the prompt's KV here."""
        return self._group.is_cached and not self._has_turn

    def take_prompt_logprobs(self, sampling_pb: SamplingParams) -> Sequence[TokenLogprobs]:
        """What another branch has; then they are struck from sampling_pb. To compute them again would take
        the whole prompt. Empty: there are none, or other ones."""
        has_own = sampling_pb.HasField("num_prompt_logprobs")
        if not has_own or sampling_pb.num_prompt_logprobs != self._group.num_prompt_logprobs:
            return ()
        sampling_pb.ClearField("num_prompt_logprobs")
        return self._group.prompt_logprobs_pb

    def computed(
        self, sampling_pb: SamplingParams, prompt_logprobs_pb: Sequence[TokenLogprobs], *, is_cached: bool
    ) -> None:
        """The first token is there. is_cached: so is the prompt's KV."""
        group = self._group
        group.is_computed = True
        group.is_cached |= is_cached
        if sampling_pb.HasField("num_prompt_logprobs"):
            group.num_prompt_logprobs = sampling_pb.num_prompt_logprobs
            group.prompt_logprobs_pb = prompt_logprobs_pb
        self.end()

    def end(self) -> None:
        """Idempotent."""
        if self._has_turn:
            self._has_turn = False
            self._group.turn.release()


class BranchGroups:
    """Of one link, by the router's names, while one of their branches has not ended."""

    def __init__(self) -> None:
        self._groups: dict[int, BranchGroup] = {}

    def join(self, name: int) -> BranchGroup:
        """0 names a group of one."""
        if not name:
            return BranchGroup()
        group = self._groups.setdefault(name, BranchGroup())
        group.num_branches += 1
        return group

    def leave(self, name: int) -> None:
        group = self._groups.get(name)
        if group is not None:
            group.num_branches -= 1
            if not group.num_branches:
                del self._groups[name]
