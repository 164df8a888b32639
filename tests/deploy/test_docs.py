"""The pages: every link leads somewhere, every command and name in them exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.ports import free_port
from kvstore.embedded import server_binary
from tests.deploy.tools import ROOT
from tests.e2e.stack import wait_until

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
FOLDERS = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier())
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in _LINK.findall(_CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in _anchors(file), target


def test_the_index_has_every_page() -> None:
    linked = {target.partition("#")[0] for target in _LINK.findall((DOCS / "README.md").read_text())}
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert pages <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_make_targets_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(rf"(?<![\w/])(?:{FOLDERS})/[\w./-]+\.(?:py|md|yml|yaml|sh|json|proto)\b", text):
        assert (ROOT / path).exists() or (page.parent / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z][a-z-]+)", text, re.MULTILINE)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_metrics_that_are_named_exist(page: Path) -> None:
    operations = (DOCS / "operations.md").read_text()
    known = set(re.findall(r"`(baton_\w+)`", operations)) | {"baton_router_", "baton_"}
    for name in re.findall(
        r"`(baton_(?:router|engine|worker|handoffs?|decode|prefill|fetch)_\w+)", page.read_text()
    ):
        stem = re.sub(r"_(bucket|sum|count)$", "", name)
        assert {name, stem, f"{name}_total"} & known, name


class TwoMachines:
    """The commands of docs/two-machines.md, with loopback addresses, free ports and own paths."""

    def __init__(self, directory: Path) -> None:
        self._blocks = re.findall(r"```sh\n(.*?)```", (DOCS / "two-machines.md").read_text(), re.DOTALL)
        self._ports = {
            number: str(free_port()) for number in ("6379", "7000", "7001", "8000", "9100", "9101")
        }
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []
        programs = directory / "bin"
        programs.mkdir()
        (programs / "redis-server").symlink_to(server_binary())
        (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (programs / "python").chmod(0o755)

    def block(self, word: str) -> str:
        [block] = [block for block in self._blocks if word in block]
        for ours, theirs in (("127.0.0.1", "10.0.0.1"), ("127.0.0.2", "10.0.0.2")):
            block = block.replace(theirs, ours)
        for number, port in self._ports.items():
            block = re.sub(rf"\b{number}\b", port, block)
        for path in ("/etc/baton", "/srv/models"):
            block = block.replace(path, f"{self._directory}{path}")
        return block

    def start(self, word: str) -> None:
        with (self._directory / f"{word}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    ["bash", "-ec", self.block(word)],
                    cwd=ROOT,
                    env=self._environment(),
                    stdout=log,
                    stderr=log,
                )
            )

    def run(self, word: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-ec", self.block(word)]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in self._directory.glob("*.log"))

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.kill()
            process.wait()

    def _environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("BATON_", "REDIS_URL"))}
        return inherited | {"PATH": f"{self._directory / 'bin'}:{os.environ['PATH']}"}


@pytest.fixture
def two_machines(tmp_path: Path) -> Iterator[TwoMachines]:
    machines = TwoMachines(tmp_path)
    try:
        yield machines
    finally:
        machines.stop()


@pytest.mark.e2e
@pytest.mark.slow
def test_the_commands_for_two_machines_work(two_machines: TwoMachines, tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    models = tmp_path / "srv" / "models"
    command = ["-m", "baton", "prepare-model", "--into", str(models), "baton-demo"]
    models.mkdir(parents=True)
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, timeout=150)
    for word in ("redis-server", "prefill_svc", "decode_svc", "m router"):
        two_machines.start(word)
    answers: list[subprocess.CompletedProcess[str]] = []

    def answers_now() -> bool:
        answers[:] = [two_machines.run("curl")]
        return answers[0].returncode == 0

    wait_until(answers_now, f"an answer; {two_machines.logs()}", timeout_s=90)
    assert '"completion_tokens":16' in answers[0].stdout
    assert "request_routed" in two_machines.logs()
