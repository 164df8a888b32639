"""`baton COMMAND`: each command is a module with `add_arguments(parser)` and `run(args) -> exit code`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from baton.errors import CommandError

COMMANDS = {
    "up": ("baton.up.command", "start router, prefill and decode workers on this machine"),
    "chat": ("baton.chat", "talk to a running server in the terminal"),
    "bench": ("baton.bench.command", "measure any OpenAI-compatible server"),
    "key": ("baton.key", "create, list and revoke API keys"),
    "certs": ("baton.certs", "write a private CA and certificates for this deployment"),
    "doctor": ("baton.doctor", "what this machine has and what is missing"),
    "make-checkpoint": ("baton.make_checkpoint", "write a small random checkpoint"),
    "prepare-model": ("baton.prepare_model", "make the model directory of a deployment"),
}


class _Parser(argparse.ArgumentParser):
    """Says one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{self.prog}: {message} (see `{self.prog} --help`)")


def _overview() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        ["usage: baton COMMAND [OPTIONS]", "", *lines, "", "baton COMMAND --help lists the options."]
    )


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        raise CommandError(f"baton: no command {name!r}; commands: {', '.join(COMMANDS)}")
    module_name, summary = COMMANDS[name]
    module = importlib.import_module(module_name)  # only what this command needs: `baton --help` stays fast
    parser = _Parser(prog=f"baton {name}", description=summary, allow_abbrev=False)
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(rest)))


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except CommandError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left: nothing more to say, not even at exit
        return 1


if __name__ == "__main__":
    sys.exit(main())
