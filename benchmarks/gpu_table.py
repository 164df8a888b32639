"""Rows and columns of the table that the engine alone and the served stack are both measured by."""

from __future__ import annotations

ROWS = (  # concurrency, prompt, output, requests
    (1, 1024, 256, 4),
    (8, 1024, 256, 32),
    (32, 1024, 256, 128),
    (128, 1024, 256, 512),
    (256, 1024, 256, 768),
    (256, 128, 512, 768),
    (64, 4096, 256, 192),
    (16, 4096, 1, 64),
    (1, 4096, 1, 8),
)
COLUMNS = (
    "concurrency",
    "prompt",
    "output",
    "output tok/s",
    "prompt tok/s",
    "TTFT p50 ms",
    "TPOT p50 ms",
)
