from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator

import pytest

from tests.deploy.compose_project import ROOT, ComposeProject, compose_command


@pytest.fixture(scope="session")
def engine() -> None:
    """A container engine answers. Skips where these tests were not asked for, or else fails."""
    wish = os.environ.get("BATON_TEST_CONTAINERS", "")
    if not wish:
        pytest.skip("`make test-containers` runs the tests with containers")
    reason = _what_is_missing()
    if reason and wish == "require":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


def _what_is_missing() -> str | None:
    if shutil.which("docker") is None:
        return "no docker client"
    if subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=30).returncode:
        return "no container engine answers `docker info`"
    if compose_command() is None:
        return "no compose: pip install 'baton-serve[containers]'"
    return None


@pytest.fixture(scope="module")
def project(engine: None) -> Iterator[ComposeProject]:
    """Images built, nothing started yet; all of it is gone afterwards, volumes too."""
    subprocess.run([ROOT / "deploy" / "new-secrets.sh"], check=True, stdout=subprocess.PIPE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    project = ComposeProject(port)
    try:
        project.compose("build", "router", "prefill", "model")  # decode has the image of prefill
        yield project
    finally:
        project.down()
