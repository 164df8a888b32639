"""A real stack with everything locked: HTTPS, mutual TLS inside, API keys, and all logs at DEBUG."""

from __future__ import annotations

import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from tests.e2e.conftest import HANDS_OFF, SMALL, random_prompt
from tests.e2e.stack import Stack, running_stack, wait_until

MARKER = "xylophone-quagmire-31337"
DEBUG = {f"BATON_{service}_LOG_LEVEL": "DEBUG" for service in ("ROUTER", "PREFILL", "DECODE")}


def baton(*arguments: str) -> str:
    command = [sys.executable, "-m", "baton", *arguments]
    return subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout


class LockedStack:
    def __init__(self, stack: Stack, certs: Path) -> None:
        self.stack = stack
        self.certs = certs
        self._redis_url = stack.state()["redis_url"]
        self._context = ssl.create_default_context(cafile=certs / "ca.pem")

    def key(self, name: str, *options: str) -> str:
        return baton("key", "--redis-url", self._redis_url, "create", name, *options).strip()

    def revoke(self, name: str) -> None:
        baton("key", "--redis-url", self._redis_url, "revoke", name)

    def listing(self) -> str:
        return baton("key", "--redis-url", self._redis_url, "list")

    def client(self, key: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        url = self.stack.state()["url"]
        assert url.startswith("https://")
        return httpx.Client(base_url=url, verify=self._context, headers=headers, timeout=60, trust_env=False)

    def complete(self, client: httpx.Client, prompt: object, **fields: object) -> httpx.Response:
        body = {"model": self.stack.model, "prompt": prompt, "temperature": 0, "ignore_eos": True, **fields}
        return client.post("/v1/completions", json=body)


@pytest.fixture(scope="module")
def locked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LockedStack]:
    certs = tmp_path_factory.mktemp("pki") / "certs"
    baton("certs", str(certs))
    environment = {**DEBUG, "BATON_ROUTER_REQUIRE_API_KEY": "true"}
    work_dir = tmp_path_factory.mktemp("locked")
    options = (*SMALL, *HANDS_OFF, "--tls", str(certs))
    with running_stack(tiny_model, work_dir, *options, environment=environment) as stack:
        yield LockedStack(stack, certs)


def test_a_key_made_by_the_command_opens_the_router_and_a_revoked_one_does_not(locked: LockedStack) -> None:
    with locked.client() as stranger:
        assert locked.complete(stranger, "hello").status_code == 401
    with locked.client(locked.key("visitor")) as client:
        assert locked.complete(client, "hello", max_tokens=2).status_code == 200
        assert re.search(r"visitor .*normal", locked.listing())
        locked.revoke("visitor")
        wait_until(
            lambda: locked.complete(client, "hello", max_tokens=1).status_code == 401,
            "the revoked key is refused",
            timeout_s=5,
        )


def test_tenants_never_share_blocks(locked: LockedStack) -> None:
    """Over real workers: the second time is a hit for who asked first, and for nobody else."""
    prompt = random_prompt(11, 200)
    hits, texts = {}, {}
    with (
        locked.client(locked.key("ada", "--tenant", "first")) as ada,
        locked.client(locked.key("bob", "--tenant", "second")) as bob,
        locked.client(locked.key("eve", "--tenant", "first")) as eve,
    ):
        for name, client in (("ada", ada), ("ada again", ada), ("bob", bob), ("eve", eve)):
            answer = locked.complete(client, prompt, max_tokens=8).json()
            hits[name] = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            texts[name] = answer["choices"][0]["text"]
    assert hits["ada"] == hits["bob"] == 0
    assert hits["ada again"] >= 192 and hits["eve"] >= 192
    assert len(set(texts.values())) == 1


def test_a_hand_off_crosses_mutual_tls(locked: LockedStack) -> None:
    with locked.client(locked.key("walker")) as client:
        response = locked.complete(client, random_prompt(12, 150), max_tokens=4)
    assert response.status_code == 200
    assert "prefill=prefill-0" in response.headers["x-baton-route"]
    [decode] = locked.stack.processes("decode")
    assert locked.stack.metrics(decode)["baton_handoff_bytes_total"] > 0


def test_workers_do_not_talk_to_strangers(locked: LockedStack, tmp_path: Path) -> None:
    baton("certs", str(tmp_path / "other"))
    ours, others = locked.certs, tmp_path / "other"
    ca = (ours / "ca.pem").read_bytes()
    wrong = grpc.ssl_channel_credentials(
        ca, (others / "router.key").read_bytes(), (others / "router.pem").read_bytes()
    )
    right = grpc.ssl_channel_credentials(
        ca, (ours / "router.key").read_bytes(), (ours / "router.pem").read_bytes()
    )
    options = [("grpc.ssl_target_name_override", "baton-worker")]
    for process in [*locked.stack.processes("prefill"), *locked.stack.processes("decode")]:
        address = process["address"]
        for channel in (grpc.insecure_channel(address), grpc.secure_channel(address, wrong, options)):
            with channel, pytest.raises(grpc.FutureTimeoutError):
                grpc.channel_ready_future(channel).result(timeout=1.0)
        with grpc.secure_channel(address, right, options) as channel:
            grpc.channel_ready_future(channel).result(timeout=10.0)


def test_plain_http_is_not_served(locked: LockedStack) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{locked.stack.port}/health", timeout=10)


def test_quotas_hold_over_the_real_stack(locked: LockedStack) -> None:
    with locked.client(locked.key("small", "--requests-per-minute", "2")) as client:
        statuses = [locked.complete(client, "hello", max_tokens=1).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]


def test_keys_prompts_and_outputs_are_in_no_log_and_no_metric(locked: LockedStack) -> None:
    """At DEBUG, with good and bad requests, streams and a client that leaves."""
    key = locked.key("writer")
    ids = random_prompt(13, 60)
    with locked.client(key) as client:
        chat = {"model": locked.stack.model, "messages": [{"role": "user", "content": f"say {MARKER}"}]}
        answers = [
            locked.complete(client, f"{MARKER} " * 20, max_tokens=24).json()["choices"][0]["text"],
            client.post("/v1/chat/completions", json={**chat, "max_tokens": 24}).json()["choices"][0][
                "message"
            ]["content"],
        ]
        locked.complete(client, ids, max_tokens=8, user=MARKER, stop=[MARKER])
        messages = {**chat, "max_tokens": 16, "system": MARKER}
        assert client.post("/v1/messages", json=messages).status_code == 200
        responses = {"model": locked.stack.model, "input": MARKER, "max_output_tokens": 16}
        assert client.post("/v1/responses", json=responses).status_code == 200
        tool = {"type": "function", "function": {"name": "find", "description": MARKER, "parameters": {}}}
        assert client.post("/v1/chat/completions", json={**chat, "max_tokens": 8, "tools": [tool]}).is_success
        assert client.post("/tokenize", json={"prompt": MARKER}).status_code == 200
        for bad in (
            f'{{"prompt": "{MARKER}"',
            f'{{"prompt": "{MARKER}", "max_tokens": "{MARKER}"}}',
            f'{{"prompt": "{MARKER}", "{MARKER}": 1, "model": "{MARKER}"}}',
        ):
            assert client.post("/v1/completions", content=bad).status_code in (400, 404)
        client.get(f"/v1/models/{MARKER}")
        stream = {"model": locked.stack.model, "prompt": MARKER, "max_tokens": 200, "stream": True}
        with client.stream("POST", "/v1/completions", json={**stream, "ignore_eos": True}) as response:
            next(response.iter_lines())
    with locked.client(f"baton-{MARKER}") as stranger:
        assert locked.complete(stranger, MARKER).status_code == 401
    secrets = {key, key.removeprefix("baton-"), MARKER, str(ids)[1:40]}
    secrets |= {text[:16] for text in answers if len(text.strip()) >= 8}
    assert len(secrets) > 4
    pages = {path.name: path.read_text(errors="replace") for path in locked.stack.log_dir.iterdir()}
    pages["console"] = locked.stack.console
    assert any('"level": "debug"' in page for page in pages.values()), "DEBUG was not on"
    for process in [*locked.stack.processes("prefill"), *locked.stack.processes("decode")]:
        pages[process["name"]] = httpx.get(f"http://{process['metrics_address']}/metrics").text
    found = [(name, secret) for name, page in pages.items() for secret in secrets if secret in page]
    assert found == []
