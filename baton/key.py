"""`baton key create | list | revoke`: who may ask a router that requires API keys."""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections.abc import Awaitable, Callable
from typing import get_args

from rich.console import Console
from rich.table import Table

from baton.errors import CommandError
from baton.settings import load_command_settings
from kvstore.api_keys import ApiKey, KeyNameTaken, Priority, RedisApiKeys, digest_of, new_secret
from kvstore.store import Store, StoreUnavailable

_NAME = re.compile(r"[\w.@-]{1,64}")
_DURATION = re.compile(r"(\d+)([smhd])")
_PIPE_WIDTH = 240  # a line for each key
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--redis-url",
        metavar="URL",
        help="of the deployment (default: REDIS_URL); `baton up --state-file` tells that of its own server",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="create|list|revoke")
    create = actions.add_parser("create", help="make a key and show it, once", allow_abbrev=False)
    create.add_argument("name", metavar="NAME", help="whom it is for")
    create.add_argument("--tenant", help="keys of one tenant share cached prompts (default: NAME)")
    create.add_argument("--requests-per-minute", type=int, metavar="N", help="default: no limit")
    create.add_argument(
        "--tokens-per-minute", type=int, metavar="N", help="prompt and answer (default: no limit)"
    )
    create.add_argument(
        "--priority",
        choices=get_args(Priority),
        default="normal",
        help="who is served first, and refused last when the workers are too busy (default %(default)s)",
    )
    create.add_argument(
        "--models", metavar="NAME,NAME", default="", help="the models that it may use (default: all)"
    )
    create.add_argument("--expires", metavar="30d", help="lifetime: 90m, 12h, 30d (default: until revoked)")
    actions.add_parser("list", help="show all keys, without their secrets", allow_abbrev=False)
    revoke = actions.add_parser("revoke", help="end a key, within a second or two", allow_abbrev=False)
    revoke.add_argument("name", metavar="NAME")


def run(args: argparse.Namespace) -> int:
    url = args.redis_url or load_command_settings().redis_url
    if not url:
        raise CommandError("baton key: set REDIS_URL or --redis-url to the Redis of the deployment")
    actions: dict[str, Callable[[RedisApiKeys], Awaitable[None]]] = {
        "create": lambda keys: _create(keys, args),
        "list": _list,
        "revoke": lambda keys: _revoke(keys, args.name),
    }
    try:
        asyncio.run(_with_keys(url, actions[args.action]))
    except (KeyNameTaken, ValueError) as error:
        raise CommandError(f"baton key: {error}") from error
    except StoreUnavailable as error:
        raise CommandError(f"baton key: {error}", exit_code=1) from error
    return 0


async def _with_keys(url: str, action: Callable[[RedisApiKeys], Awaitable[None]]) -> None:
    store = Store(url)
    try:
        await action(RedisApiKeys(store))
    finally:
        await store.close()


async def _create(keys: RedisApiKeys, args: argparse.Namespace) -> None:
    if not _NAME.fullmatch(args.name):
        raise ValueError(f"a name has 1 to 64 letters, digits and . @ _ -, not {args.name!r}")
    now = time.time()
    secret = new_secret()
    key = ApiKey(
        name=args.name,
        digest=digest_of(secret),
        tenant=args.tenant or args.name,
        requests_per_minute=args.requests_per_minute,
        tokens_per_minute=args.tokens_per_minute,
        priority=args.priority,
        models=tuple(filter(None, map(str.strip, args.models.split(",")))),
        created_at=now,
        expires_at=now + _duration_s(args.expires) if args.expires else None,
    )
    await keys.create(key)
    print(secret)
    print("This is the only time it is shown: only its hash is stored.", file=sys.stderr)


async def _list(keys: RedisApiKeys) -> None:
    table = Table(box=None)
    for heading in (
        "name",
        "tenant",
        "requests/min",
        "tokens/min",
        "priority",
        "models",
        "created",
        "expires",
    ):
        table.add_column(heading, overflow="fold")  # a name that is cut is of no use
    listed = await keys.list()
    for key in listed:
        table.add_row(
            key.name,
            key.tenant,
            _limit(key.requests_per_minute),
            _limit(key.tokens_per_minute),
            key.priority,
            ", ".join(key.models) or "all",
            _day(key.created_at),
            _expiry(key.expires_at),
        )
    if listed:
        Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table)
    else:
        print("no keys")


async def _revoke(keys: RedisApiKeys, name: str) -> None:
    if not await keys.revoke(name):
        raise CommandError(f"baton key: no key is named {name!r}")
    print(f"revoked {name}")


def _duration_s(text: str) -> float:
    match = _DURATION.fullmatch(text)
    if match is None or not int(match[1]):
        raise ValueError(f"--expires {text}: a number and a unit, like 90m, 12h or 30d")
    return float(int(match[1]) * _UNIT_S[match[2]])


def _limit(value: int | None) -> str:
    return "-" if value is None else str(value)


def _day(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix_s))


def _expiry(unix_s: float | None) -> str:
    if unix_s is None:
        return "never"
    return "expired" if unix_s <= time.time() else _day(unix_s)
