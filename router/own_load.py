"""What this router has at one worker, and so what a load that the worker tells is worth.

A told load is a little old: it may lack what was just sent and still have what has just ended. Of what it
says, the share of this router's own requests is replaced by what this router knows.
"""

from __future__ import annotations


class OwnLoad:
    """Of one incarnation of a worker."""

    def __init__(self) -> None:
        self.num_requests = 0  # sent and not ended
        self.num_handing_off = 0  # of them, their prompts are computed elsewhere
        self.num_tokens = 0  # of their prompts, to be computed there
        self._most_requests = [0, 0]  # between the loads told: before the last one, since the last one
        self._told_own = 0

    def begin(self) -> None:
        self.num_requests += 1
        self._most_requests[1] = max(self._most_requests[1], self.num_requests)

    def end(self, num_requests: int = 1) -> None:
        self.num_requests -= num_requests

    def told(self) -> None:
        """The worker has told its load, which may be as old as the one before."""
        self._told_own = max(self._most_requests)
        self._most_requests = [self._most_requests[1], self.num_requests]

    def requests(self, num_told: int) -> int:
        """At the worker now, with those of others."""
        return self.num_requests + max(0, num_told - self._told_own)

    def handing_off(self, num_told: int, num_waiting_told: int) -> int:
        """Of requests(num_told). Those of others that wait are taken to wait for their prompts."""
        num_others = max(0, num_told - self._told_own)
        return self.num_handing_off + (num_waiting_told * num_others // num_told if num_others else 0)

    def tokens(self, num_told: int, num_requests_told: int) -> int:
        """Prompt tokens to be computed at the worker now. Its own number includes what its cache will save
        the queued ones, so it counts for the requests of others only."""
        if not self._told_own:
            return self.num_tokens + num_told
        num_others = max(0, num_requests_told - self._told_own)
        return self.num_tokens + (num_told * num_others // num_requests_told if num_others else 0)
