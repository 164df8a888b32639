"""A summary as text for a person; `dataclasses.asdict` of it is the JSON form."""

from __future__ import annotations

from collections.abc import Mapping

from baton.bench.measurement import Distribution, Summary

_ROW_COLUMNS = ("ok", "TTFT", "TPOT", "output tok/s", "hit rate", "requests/s", "goodput")
ROWS_LEGEND = "TTFT and TPOT: p50/p99 in ms; goodput: requests a second within the limits"
_COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")


def render(title: str, summary: Summary) -> str:
    lines = [title, "-" * len(title)]
    lines += [f"{name:<24} {value}" for name, value in _facts(summary)]
    lines += ["", " " * 8 + "".join(f"{column:>10}" for column in _COLUMNS) + "   (ms)"]
    rows = {"TTFT": summary.ttft_ms, "TPOT": summary.tpot_ms, "ITL": summary.itl_ms, "E2E": summary.e2e_ms}
    lines += [_row(name, distribution) for name, distribution in rows.items() if distribution]
    lines += [f"failed x{count}: {reason}" for reason, count in summary.errors.items()]
    return "\n".join(lines)


def render_rows(label: str, summaries: Mapping[str, Summary]) -> str:
    """One line for each summary; ROWS_LEGEND says what they hold."""
    lines = [f"{label:<12}" + "".join(f"{column:>14}" for column in _ROW_COLUMNS)]
    for name, s in summaries.items():
        values = [
            f"{s.num_requests - s.num_failed}/{s.num_requests}",
            *(_percentiles(distribution) for distribution in (s.ttft_ms, s.tpot_ms)),
            f"{s.output_tokens_per_s:.1f}",
            f"{s.num_hit_tokens / max(1, s.num_prompt_tokens):.1%}",
            f"{s.requests_per_s:.2f}",
            "" if s.goodput_per_s is None else f"{s.goodput_per_s:.2f}",
        ]
        lines.append(f"{name:<12}" + "".join(f"{value:>14}" for value in values))
    return "\n".join(lines)


def _percentiles(distribution: Distribution | None) -> str:
    return "" if distribution is None else f"{distribution.p50:.0f}/{distribution.p99:.0f}"


def _facts(summary: Summary) -> list[tuple[str, str]]:
    chunk_size = summary.num_output_tokens / max(1, summary.num_chunks)
    facts = [
        ("requests", f"{summary.num_requests - summary.num_failed} ok, {summary.num_failed} failed"),
        ("duration", f"{summary.duration_s:.2f} s"),
        ("requests a second", f"{summary.requests_per_s:.2f}"),
        ("output tokens a second", f"{summary.output_tokens_per_s:.1f}"),
        ("all tokens a second", f"{summary.total_tokens_per_s:.1f}"),
        ("tokens in, out", f"{summary.num_prompt_tokens}, {summary.num_output_tokens}"),
        ("tokens a chunk", f"{chunk_size:.2f}"),
    ]
    if summary.num_hit_tokens:
        hit_rate = summary.num_hit_tokens / max(1, summary.num_prompt_tokens)
        facts.append(("prefix hit tokens", f"{summary.num_hit_tokens} ({hit_rate:.1%})"))
    if summary.goodput_per_s is not None:
        facts.append(("goodput", f"{summary.goodput_per_s:.2f} requests a second within the limits"))
    return facts


def _row(name: str, distribution: Distribution) -> str:
    return f"{name:<8}" + "".join(f"{getattr(distribution, column):>10.2f}" for column in _COLUMNS)
