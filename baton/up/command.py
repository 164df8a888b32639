"""`baton up`"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import time
from pathlib import Path

from baton.errors import CommandError
from baton.ports import bind_error
from baton.settings import CommandSettings, load_command_settings
from baton.up.model_store import DEFAULT_MODEL, SMOLLM2, resolve_model
from baton.up.plan import UpOptions
from baton.up.session import Session

_WORKER_OPTIONS = {
    "dtype": ("auto|float32|bfloat16", "weights and computation (default: auto)"),
    "device": ("cpu|cuda", "of the workers"),
    "load_format": ("safetensors|dummy", "dummy: random weights, for load tests"),
    "kv_cache_bytes": ("N", "of each worker (default: from free memory)"),
    "num_blocks": ("N", "KV blocks of each worker, instead of bytes"),
    "block_size": ("TOKENS", "of a KV block"),
    "host_kv_bytes": ("N", "host memory of each worker for blocks evicted from its cache (default: none)"),
    "disk_kv_bytes": ("N", "files of each worker under --disk-kv-dir (default: 8 GiB)"),
    "max_model_len": ("TOKENS", "longest prompt plus answer (default: the model's)"),
    "max_running": ("N", "sequences in a batch"),
    "token_budget": ("TOKENS", "most tokens of one step"),
    "num_speculative_tokens": ("N", "drafted for each sequence in a step (default: 1 if the model can)"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="DIR",
        help=f"Hugging Face directory, or {SMOLLM2} (default: {DEFAULT_MODEL}, small and shipped with Baton)",
    )
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="in the API (default: the directory's name)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="of the HTTP server (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="of the HTTP server (default %(default)s)")
    workers = parser.add_mutually_exclusive_group()
    workers.add_argument("--prefill", type=int, metavar="N", help="prefill workers (default 1)")
    workers.add_argument("--aggregated", action="store_true", help="none: decode workers compute prompts too")
    parser.add_argument("--decode", type=int, default=1, metavar="N", help="decode groups (default 1)")
    parser.add_argument(
        "--ep-size", type=int, default=1, metavar="N", help="processes sharing the experts, a group"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="of each worker (default: a role splits the cores)"
    )
    parser.add_argument(
        "--gpus",
        metavar="0,1,...",
        help="with --device cuda: GPUs for the workers, one each in turn, prefill workers first "
        "(default: all workers on the first one)",
    )
    parser.add_argument("--policy", metavar="prefix|round_robin|least_loaded", help="how workers are chosen")
    for name, (metavar, text) in _WORKER_OPTIONS.items():
        parser.add_argument("--" + name.replace("_", "-"), metavar=metavar, help=text)
    parser.add_argument(
        "--tls", type=Path, metavar="DIR", help="HTTPS, and mutual TLS inside; DIR is made by `baton certs`"
    )
    parser.add_argument(
        "--disk-kv-dir", type=Path, metavar="DIR", help="keep evicted blocks there, one directory a worker"
    )
    parser.add_argument("--ask", metavar="TEXT", help="when ready, ask this and show the answer")
    parser.add_argument(
        "--log-dir", type=Path, help="default: a new directory under the user's state directory"
    )
    parser.add_argument(
        "--state-file", type=Path, metavar="FILE", help="keep a JSON table of the processes there"
    )


def run(args: argparse.Namespace) -> int:
    settings = load_command_settings()
    options = _options(args, settings)
    session = Session(
        options=options,
        settings=settings,
        log_dir=_log_dir(args, settings),
        state_path=args.state_file.absolute() if args.state_file else None,
        question=args.ask,
    )
    return asyncio.run(session.run())


def _options(args: argparse.Namespace, settings: CommandSettings) -> UpOptions:
    reason = bind_error(args.host, args.port) if 1 <= args.port <= 65535 else None
    if reason:
        raise CommandError(f"port {args.port} of {args.host} {reason}; choose another with --port")
    values = {name.upper(): getattr(args, name) for name in _WORKER_OPTIONS}
    try:
        # Before the model is looked up: a wrong number must not wait for a conversion.
        options = UpOptions(
            model_dir=Path(args.model or DEFAULT_MODEL),
            served_model_name=args.served_model_name or "",
            run_id=secrets.token_hex(3),
            host=args.host,
            port=args.port,
            num_prefill=_num_prefill(args),
            num_decode=args.decode,
            ep_size=args.ep_size,
            threads_per_worker=args.threads,
            gpus=tuple(args.gpus.split(",")) if args.gpus else (),
            tls_dir=_tls_dir(args.tls),
            router_settings={"POLICY": args.policy} if args.policy else {},
            disk_kv_dir=args.disk_kv_dir.absolute() if args.disk_kv_dir else None,
            worker_settings={name: value for name, value in values.items() if value is not None},
        )
    except ValueError as error:
        raise CommandError(f"baton up: {error}") from error
    return options.with_model(resolve_model(args.model, settings.cache_dir))


def _tls_dir(directory: Path | None) -> Path | None:
    if directory is None:
        return None
    if not (directory / "ca.pem").is_file():
        raise CommandError(f"--tls {directory}: no ca.pem there; make it with `baton certs {directory}`")
    return directory.absolute()


def _num_prefill(args: argparse.Namespace) -> int:
    if args.aggregated:
        return 0
    return 1 if args.prefill is None else int(args.prefill)


def _log_dir(args: argparse.Namespace, settings: CommandSettings) -> Path:
    run_name = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
    directory: Path = (args.log_dir or settings.state_dir / "logs" / run_name).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot create the log directory {directory}: {error.strerror}") from error
    return directory
