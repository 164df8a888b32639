"""The shipped compose file, brought up by compose itself under a project name of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILE = ROOT / "deploy" / "compose.yaml"
_NAME = "baton-test"
_START_S = 240

_ASK_PROMETHEUS = """
import json, sys, urllib.parse, urllib.request
answers = []
for query in json.load(sys.stdin):
    url = "http://prometheus:9090/api/v1/query?" + urllib.parse.urlencode({"query": query})
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            answers.append(json.load(response))
    except urllib.error.HTTPError as error:
        answers.append(json.load(error))
print(json.dumps(answers))
"""
_KILL = """
import os, pathlib, signal
for entry in pathlib.Path("/proc").glob("[0-9]*"):
    command = (entry / "cmdline").read_bytes()
    if b"decode_svc" in command and b"-c" not in command.split(b"\\0") and b"init" not in command:
        os.kill(int(entry.name), signal.SIGKILL)
"""


def compose_command() -> list[str] | None:
    """Compose as the extra `containers` installs it, or the docker client's plugin; None without both."""
    own = Path(sys.executable).parent / "docker-compose"
    if own.exists():
        return [str(own)]
    if (
        shutil.which("docker")
        and not subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    ):
        return ["docker", "compose"]
    return None


class ComposeProject:
    def __init__(self, port: int) -> None:
        command = compose_command()
        assert command is not None
        self._command = [*command, "--project-name", _NAME, "--file", str(COMPOSE_FILE)]
        # float32: an answer's tokens must not depend on how its steps were cut.
        self._environment = {"COMPOSE_PROFILES": "cpu", "ROUTER_PORT": str(port), "DTYPE": "float32"}
        self.model = ""
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=180)

    def compose(self, *arguments: str, stdin: str = "", timeout_s: float = 900) -> str:
        ended = subprocess.run(
            [*self._command, *arguments],
            env=os.environ | self._environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert ended.returncode == 0, f"compose {' '.join(arguments)}:\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    def up(self, model: str, *options: str) -> None:
        """Until every container is healthy."""
        self._environment["MODEL"] = self.model = model
        wait = ("--detach", "--wait", "--wait-timeout", str(_START_S))
        try:
            self.compose("up", "--no-build", *wait, *options)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.compose('ps', '--all')}\n{self.logs()}") from error

    def down(self) -> None:
        self.client.close()
        self.compose("down", "--volumes", "--timeout", "5")

    def logs(self, *services: str) -> str:
        return self.compose("logs", "--no-color", "--tail", "60", *services)

    def containers(self, service: str = "") -> list[dict[str, Any]]:
        """As `docker inspect` shows them."""
        ids = self.compose("ps", "--all", "--quiet", *([service] if service else [])).split()
        return json.loads(docker("inspect", *ids)) if ids else []

    def execute(self, service: str, program: str, stdin: str = "") -> str:
        return self.compose("exec", "--no-TTY", service, "python", "-c", program, stdin=stdin)

    def kill_process(self, service: str) -> None:
        """As a crash would: the engine's restart policy sees it, unlike `docker kill`."""
        self.execute(service, _KILL)

    def query(self, *queries: str) -> list[Any]:
        """Prometheus' answers, asked from inside: it is not published."""
        answers = json.loads(self.execute("router", _ASK_PROMETHEUS, json.dumps(queries)))
        failed = [f"{q}: {a}" for q, a in zip(queries, answers, strict=True) if a["status"] != "success"]
        assert not failed, "\n".join(failed)
        return [answer["data"]["result"] for answer in answers]

    def value(self, query: str) -> float | None:
        """The sum over the series of a query; None when there are none."""
        [series] = self.query(query)
        return sum(float(one["value"][1]) for one in series) if series else None

    def chat(self, content: str, **fields: Any) -> Mapping[str, Any]:
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], **fields}
        response = self.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, f"{response.text}\n{self.logs('router')}"
        return response.json()

    def stream(self, prompt: list[int], max_tokens: int) -> Iterator[int]:
        """Greedy token ids as they arrive."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        body |= {"stream": True, "ignore_eos": True, "return_token_ids": True}
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, f"{event}\n{self.logs('router', 'decode-0', 'decode-1')}"
                    for choice in event["choices"]:
                        yield from choice.get("token_ids") or ()


def docker(*arguments: str) -> str:
    return subprocess.run(
        ["docker", *arguments], check=True, stdout=subprocess.PIPE, text=True, timeout=120
    ).stdout
