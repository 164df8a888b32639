"""Reads the samples of a /metrics page."""

from __future__ import annotations

import re
import urllib.request

_SAMPLE = re.compile(r"^(\w+)(?:\{[^}]*\})? ([-+\w.]+)$", re.MULTILINE)


def read_counters(url: str) -> dict[str, float]:
    """Samples by name, summed over labels."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return parse_counters(response.read().decode())


def parse_counters(text: str) -> dict[str, float]:
    samples: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        samples[name] = samples.get(name, 0.0) + float(value)
    return samples
