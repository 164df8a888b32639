"""A process that has nothing to do and says when the machine let it wait: what nobody's code is to blame for.

    python -m benchmarks.idle_process

Sleeps in milliseconds; one JSON line for each sleep that lasted several too long, as servicekit.loop_watch
writes them, until it is ended.
"""

from __future__ import annotations

import json
import time

_SLEEP_S = 0.001
_HELD_S = 0.004


def main() -> None:
    while True:
        before = time.monotonic()
        time.sleep(_SLEEP_S)
        now = time.monotonic()
        held_s = now - before - _SLEEP_S
        if held_s > _HELD_S:
            event = {"event": "loop_held", "held_s": held_s, "computing_s": 0.0, "ended_at": now}
            print(json.dumps({**event, "where": "asleep"}), flush=True)


if __name__ == "__main__":
    main()
