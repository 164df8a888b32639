"""Whether and when a group of processes that ended by itself is started again."""

from __future__ import annotations

from collections import deque

_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 10.0
_MAX_FAILED_STARTS = 3  # in a row, without ever having been ready
_MAX_CRASHES = 5
_CRASH_WINDOW_S = 120.0

MISTAKE_EXIT_CODE = 2  # a service says so about its settings or its checkpoint: another try cannot help


class RestartPolicy:
    """One for each group. Times are seconds of a monotonic clock."""

    def __init__(self) -> None:
        self._crash_times: deque[float] = deque()
        self._num_failed_starts = 0

    def delay_after_exit(self, now: float, exit_code: int, was_ready: bool) -> float | None:
        """Seconds to wait before the next start; None: give up."""
        self._num_failed_starts = 0 if was_ready else self._num_failed_starts + 1
        self._crash_times.append(now)
        while self._crash_times[0] < now - _CRASH_WINDOW_S:
            self._crash_times.popleft()
        if not was_ready and exit_code == MISTAKE_EXIT_CODE:
            return None
        if self._num_failed_starts >= _MAX_FAILED_STARTS or len(self._crash_times) >= _MAX_CRASHES:
            return None
        return min(_MAX_DELAY_S, _FIRST_DELAY_S * 2.0 ** (len(self._crash_times) - 1))
