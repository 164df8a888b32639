"""One run of `baton up`, from the first process to the last.

1. The store: an embedded server, or the one of REDIS_URL.
2. All processes start; readiness is watched; what happens is shown and kept in the state file.
3. Ready: the table of what runs where, one question if asked for.
4. It serves until a signal or until what is left cannot serve.
5. The processes end (a second signal kills them), then the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from baton.chat import ask_once
from baton.errors import CommandError
from baton.http_client import HttpStatusError, NoAnswer, Server
from baton.ports import free_port
from baton.settings import CommandSettings
from baton.up.console import Console
from baton.up.group_runner import GroupFailed
from baton.up.plan import UpOptions, plan_groups
from baton.up.readiness import watch_router, watch_workers
from baton.up.state_file import StateFile
from baton.up.store import RunStore, open_store
from baton.up.supervisor import Supervisor
from servicekit.lifecycle import drain_on_signals
from servicekit.logging import configure_logging
from servicekit.process_env import num_usable_cpus


class _Stop(Exception):
    """A signal asked for the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    options: UpOptions
    settings: CommandSettings
    log_dir: Path
    state_path: Path | None
    question: str | None

    async def run(self) -> int:
        configure_logging(level="ERROR")  # what our own registry client says, the services say too
        async with open_store(self.settings.redis_url, self.options.served_model_name) as store:
            groups = plan_groups(self.options, store.url, num_usable_cpus(), free_port)
            supervisor = Supervisor(groups, self.settings.environment, self.log_dir)
            console = Console(supervisor.statuses, self.options.served_model_name)
            supervisor.on_change(console.changed)
            supervisor.on_log_line(console.log_line)
            with (
                drain_on_signals(lambda _: supervisor.kill()) as stopping,
                self._state_file(supervisor, store),
            ):
                console.line(f"logs: {self.log_dir}")
                return await self._serve(supervisor, console, store, stopping)

    @property
    def _server(self) -> Server:
        return Server(self.options.url, self.settings.api_key, self.options.ca_file)

    async def _serve(
        self, supervisor: Supervisor, console: Console, store: RunStore, stopping: asyncio.Event
    ) -> int:
        console.start()
        tasks = [
            asyncio.create_task(work)
            for work in (
                supervisor.run(),
                watch_workers(supervisor, store.registry),
                watch_router(supervisor, self._server),
                self._announce_when_ready(supervisor, console),
                store.keep_running(lambda: console.line("the embedded Redis ended and was started again")),
                _until(stopping),
            )
        ]
        try:
            # All but the announcement run until something ends the session, or go wrong.
            await asyncio.gather(*tasks)
        except _Stop:
            console.stop()
            console.line("stopping (Ctrl-C again kills)")
        except GroupFailed as failure:
            raise CommandError(str(failure), exit_code=1) from failure
        finally:
            console.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        console.line("stopped")
        return 0

    async def _announce_when_ready(self, supervisor: Supervisor, console: Console) -> None:
        await supervisor.wait_until(lambda: supervisor.is_ready)
        console.show_ready()
        console.line(_curl_example(self._server, self.options.served_model_name))
        if self.question:
            await self._ask(self.question, console)
        console.line("Ctrl-C stops everything.")

    async def _ask(self, question: str, console: Console) -> None:
        console.line(f"you:   {question}")
        print("baton: ", end="", flush=True)
        try:
            answer = await ask_once(self._server, question, lambda text: print(text, end="", flush=True))
        except (HttpStatusError, NoAnswer, ValueError) as error:
            print(file=sys.stdout)
            console.line(f"no answer: {error}")
            return
        console.line(f"\n       [{answer.timing}]\n")

    @contextlib.contextmanager
    def _state_file(self, supervisor: Supervisor, store: RunStore) -> Iterator[None]:
        if self.state_path is None:
            yield
            return
        state_file = StateFile(
            self.state_path,
            url=self.options.url,
            store=store,
            log_dir=self.log_dir,
            model=self.options.served_model_name,
        )
        try:
            state_file.write(supervisor)
        except OSError as error:
            raise CommandError(f"--state-file {self.state_path}: {error.strerror}") from error
        supervisor.on_change(lambda _: state_file.write(supervisor))
        try:
            yield
        finally:
            state_file.remove()


async def _until(stopping: asyncio.Event) -> None:
    await stopping.wait()
    raise _Stop


def _curl_example(server: Server, model: str) -> str:
    ca = f" --cacert {server.ca_file}" if server.ca_file else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return f"\ncurl{ca} {server}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n"
