"""How long opening a socket takes when the process's table of descriptors has to grow for it.

    python -m benchmarks.open_descriptors [--num 600]

Once as a process is, once after servicekit.descriptors has made room, each in a process of its own that has a
second thread, as every service here has.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import threading
import time

from benchmarks.results_file import table
from servicekit.descriptors import reserve_descriptors

COLUMNS = ("room was made", "ms to make it", "opened", "over 1 ms: descriptor and ms")
_SLOW_S = 0.001


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.open_descriptors", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--num", type=int, default=600, help="sockets (default %(default)s)")
    parser.add_argument("--reserve", choices=("yes", "no"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.reserve is not None:
        print(json.dumps(measure(args.num, makes_room=args.reserve == "yes")))
        return
    command = [sys.executable, "-m", "benchmarks.open_descriptors", "--num", str(args.num), "--reserve"]
    runs = [subprocess.run([*command, way], check=True, capture_output=True) for way in ("no", "yes")]
    print("\n".join(table(COLUMNS, [json.loads(run.stdout) for run in runs])))


def measure(num: int, *, makes_room: bool) -> dict[str, object]:
    """Closes what it opens; the thread ends with it."""
    is_over = threading.Event()
    thread = threading.Thread(target=is_over.wait)
    thread.start()
    began = time.perf_counter()
    if makes_room:
        reserve_descriptors()
    made_s = time.perf_counter() - began
    opened: list[socket.socket] = []
    slow = []
    for _ in range(num):
        before = time.perf_counter()
        opened.append(socket.socket())
        elapsed_s = time.perf_counter() - before
        if elapsed_s > _SLOW_S:
            slow.append(f"{opened[-1].fileno()} {1e3 * elapsed_s:.1f}")
    for each in opened:
        each.close()
    is_over.set()
    thread.join()
    return dict(
        zip(COLUMNS, (makes_room, round(1e3 * made_s, 1), num, "; ".join(slow) or "none"), strict=True)
    )


if __name__ == "__main__":
    main()
