"""Reads the samples of a /metrics page."""

from __future__ import annotations

import re
import urllib.request

_SAMPLE = re.compile(r"^(\w+)(?:\{([^}]*)\})? ([-+\w.]+)$", re.MULTILINE)


def read_counters(url: str, label: str = "") -> dict[str, float]:
    """Samples by name, summed over labels. `label`, as in 'reason="local"': of those that have it only."""
    with urllib.request.urlopen(url, timeout=10) as response:
        return parse_counters(response.read().decode(), label)


def parse_counters(text: str, label: str = "") -> dict[str, float]:
    samples: dict[str, float] = {}
    for name, labels, value in _SAMPLE.findall(text):
        if label in labels:
            samples[name] = samples.get(name, 0.0) + float(value)
    return samples
