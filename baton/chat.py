"""`baton chat`: a conversation in the terminal, streamed, with the latency of each answer."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from baton.bench.load import served_model
from baton.errors import CommandError
from baton.http_client import HttpClient, HttpStatusError, NoAnswer, Server
from baton.settings import load_command_settings

Message = dict[str, str]  # role, content: OpenAI's form

_TIMEOUT_S = 600.0
_SHORT = 160  # tokens: a small story to its end
_HELP = "/exit ends, /clear forgets the conversation, Ctrl-C stops an answer"


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    num_tokens: int
    ttft_s: float
    tpot_s: float | None  # None: a single token

    @property
    def timing(self) -> str:
        tpot = "" if self.tpot_s is None else f", TPOT {self.tpot_s * 1000:.1f} ms"
        return f"TTFT {self.ttft_s * 1000:.0f} ms{tpot}, {self.num_tokens} tokens"


class _Stream:
    """Collects the events of one answer."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self._on_text = on_text
        self._parts: list[str] = []
        self._sent_at = time.perf_counter()
        self._first_at = self._last_at = self._sent_at
        self._num_tokens = 0
        self.error: str | None = None

    def on_event(self, data: bytes, read_at: float) -> None:
        event: dict[str, Any] = orjson.loads(data)
        if event.get("error"):
            self.error = str(event["error"].get("message", event["error"]))
        if event.get("usage"):
            self._num_tokens = int(event["usage"].get("completion_tokens") or 0)
        choices = event.get("choices") or [{}]
        text = (choices[0].get("delta") or {}).get("content")
        if text:
            self._first_at = self._first_at if self._parts else read_at
            self._last_at = read_at
            self._parts.append(text)
            self._on_text(text)

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def answer(self) -> Answer:
        num_tokens = self._num_tokens or len(self._parts)
        tpot_s = (self._last_at - self._first_at) / (num_tokens - 1) if num_tokens > 1 else None
        return Answer(self.text, num_tokens, self._first_at - self._sent_at, tpot_s)


async def stream_answer(
    client: HttpClient,
    model: str,
    messages: list[Message],
    on_text: Callable[[str], None],
    **sampling: float,
) -> Answer:
    """Raises HttpStatusError, NoAnswer. Cancelling it cancels the request."""
    payload = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling,
    }
    stream = _Stream(on_text)
    await client.post_stream("/v1/chat/completions", orjson.dumps(payload), stream.on_event, _TIMEOUT_S)
    if stream.error:
        raise NoAnswer(f"the answer broke off: {stream.error}")
    return stream.answer()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="server (default %(default)s)")
    parser.add_argument("--model", help="default: the first one that the server lists")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--temperature", type=float, default=0.2, help="0: greedy (default %(default)s)")
    parser.add_argument("-m", "--message", help="ask this, print the answer, end")


def run(args: argparse.Namespace) -> int:
    try:
        with asyncio.Runner() as runner:
            server = Server(args.url, load_command_settings().api_key)
            model = args.model or runner.run(served_model(server))
            history: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
            conversation = _Conversation(runner, server, args.temperature, model, history)
            if args.message is not None:
                return 0 if conversation.ask(args.message) else 1
            return conversation.loop()
    except (HttpStatusError, NoAnswer, ValueError) as error:
        raise CommandError(f"baton chat: {error}", exit_code=1) from error


class _Conversation:
    """The history; each answer runs on the loop, so that Ctrl-C can cancel it and nothing else."""

    def __init__(
        self,
        runner: asyncio.Runner,
        server: Server,
        temperature: float,
        model: str,
        history: list[Message],
    ) -> None:
        self._runner = runner
        self._server = server
        self._temperature = temperature
        self._model = model
        self._num_first = len(history)
        self._history = history

    def loop(self) -> int:
        print(f"{self._model} at {self._server}. {_HELP}.")
        while True:
            try:
                line = input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if line in ("/exit", "/quit"):
                return 0
            if line == "/clear":
                del self._history[self._num_first :]
            elif line.startswith("/"):
                print(_HELP)
            elif line:
                self._ask_and_go_on(line)

    def _ask_and_go_on(self, text: str) -> None:
        try:
            self.ask(text)
        except (HttpStatusError, NoAnswer) as error:
            print(error, file=sys.stderr)

    def ask(self, text: str) -> bool:
        """Whether the answer came to its end; what came of a cancelled one stays in the history."""
        messages = [*self._history, {"role": "user", "content": text}]
        printed: list[str] = []
        answer = self._runner.run(self._streamed(messages, printed))
        reply = "".join(printed)
        self._history = [*messages, {"role": "assistant", "content": reply}]
        print()
        print(f"[{answer.timing}]" if answer else "[stopped]", file=sys.stderr)
        return answer is not None

    async def _streamed(self, messages: list[Message], printed: list[str]) -> Answer | None:
        def show(text: str) -> None:
            printed.append(text)
            print(text, end="", flush=True)

        loop = asyncio.get_running_loop()
        async with HttpClient(self._server) as client:
            task = asyncio.create_task(
                stream_answer(client, self._model, messages, show, temperature=self._temperature)
            )
            loop.add_signal_handler(signal.SIGINT, task.cancel)
            try:
                return await task
            except asyncio.CancelledError:
                return None
            finally:
                loop.remove_signal_handler(signal.SIGINT)


async def ask_once(server: Server, text: str, on_text: Callable[[str], None]) -> Answer:
    """One question to the first model of a server; a short, greedy answer."""
    model = await served_model(server)
    async with HttpClient(server) as client:
        return await stream_answer(
            client, model, [{"role": "user", "content": text}], on_text, temperature=0, max_tokens=_SHORT
        )
