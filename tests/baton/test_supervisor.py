import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from baton.up import group_runner
from baton.up.child_process import ChildProcess
from baton.up.group_runner import GroupFailed
from baton.up.plan import GroupSpec, ProcessSpec
from baton.up.supervisor import Supervisor

SLEEPER = "import signal; print('running', flush=True); signal.pause()"
STUBBORN = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('running', flush=True); "
    "[signal.pause() for _ in iter(int, 1)]"
)
ONE_LINE_AND_OUT = (
    "import os, sys; print('could not read tensor 7', flush=True); sys.exit(int(os.environ['CODE']))"
)


def group(name, *members, role="decode", **environment):
    specs = [
        ProcessSpec(
            name=member,
            role=role,
            environment=environment,
            address=f"127.0.0.1:{index}",
            metrics_address=f"127.0.0.1:{index}",
            num_threads=1,
            ep_rank=index,
        )
        for index, member in enumerate(members)
    ]
    return GroupSpec(name=name, role=role, members=tuple(specs))


@pytest.fixture
def scripts(monkeypatch):
    """What `python -m MODULE` is replaced by, by module name."""
    programs = {"router": SLEEPER, "prefill_svc": SLEEPER, "decode_svc": SLEEPER}
    monkeypatch.setattr(group_runner, "module_argv", lambda module: [sys.executable, "-c", programs[module]])
    return programs


@contextlib.asynccontextmanager
async def running(tmp_path, *groups):
    supervisor = Supervisor(groups, {}, tmp_path)
    task = asyncio.create_task(supervisor.run())
    try:
        yield supervisor, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_cancelling_the_supervisor_ends_every_process(tmp_path, scripts):
    async with running(tmp_path, group("d", "d.0", "d.1"), group("p", "p", role="prefill")) as (
        supervisor,
        _,
    ):
        statuses = supervisor.statuses.values()
        await supervisor.wait_until(lambda: all(status.state == "starting" for status in statuses))
        pids = [status.pid for status in statuses]
        assert all(is_alive(pid) for pid in pids)
    assert not any(is_alive(pid) for pid in pids)
    assert {status.state for status in statuses} == {"stopped"}


async def test_a_process_that_ignores_the_request_to_end_is_killed(tmp_path, scripts, monkeypatch):
    scripts["decode_svc"] = STUBBORN
    monkeypatch.setattr(group_runner, "STOP_GRACE_S", 0.1)
    said = asyncio.Event()
    async with running(tmp_path, group("d", "d")) as (supervisor, _):
        supervisor.on_log_line(lambda status, line: said.set())
        await said.wait()
        pid = supervisor.statuses["d"].pid
    assert not is_alive(pid)


async def test_a_killed_rank_takes_its_group_down_and_all_start_again(tmp_path, scripts):
    async with running(tmp_path, group("d", "d.0", "d.1"), group("p", "p", role="prefill")) as (
        supervisor,
        _,
    ):
        first, second, other = supervisor.statuses.values()
        await supervisor.wait_until(lambda: all(s.pid for s in supervisor.statuses.values()))
        old_pids = {first.pid, second.pid}
        other_pid = other.pid
        for name in supervisor.statuses:
            supervisor.mark_ready(name, incarnation="1")
        os.kill(second.pid, signal.SIGKILL)
        await supervisor.wait_until(lambda: first.num_starts == 2 and second.num_starts == 2)
        assert not {first.pid, second.pid} & old_pids
        assert not any(is_alive(pid) for pid in old_pids)
        assert other.pid == other_pid


async def test_the_registration_of_the_dead_process_does_not_make_the_new_one_ready(tmp_path, scripts):
    async with running(tmp_path, group("d", "d")) as (supervisor, _):
        status = supervisor.statuses["d"]
        await supervisor.wait_until(lambda: status.state == "starting")
        supervisor.mark_ready("d", incarnation="1")
        os.kill(status.pid, signal.SIGKILL)
        await supervisor.wait_until(lambda: status.num_starts == 2 and status.state == "starting")
        supervisor.mark_ready("d", incarnation="1")
        assert status.state == "starting"
        supervisor.mark_ready("d", incarnation="2")
        assert supervisor.is_ready


async def test_a_mistake_in_the_settings_ends_the_run_with_the_services_own_words(tmp_path, scripts):
    scripts["decode_svc"] = ONE_LINE_AND_OUT
    async with running(tmp_path, group("d", "d", CODE="2")) as (supervisor, task):
        with pytest.raises(GroupFailed, match=r"(?s)d ended with exit code 2.*d \| could not read tensor 7"):
            await task
        assert supervisor.statuses["d"].num_starts == 1
        assert supervisor.statuses["d"].state == "failed"


async def test_a_service_that_never_comes_up_is_given_up_after_three_starts(tmp_path, scripts):
    scripts["decode_svc"] = ONE_LINE_AND_OUT
    async with running(tmp_path, group("d", "d", CODE="1")) as (supervisor, task):
        with pytest.raises(GroupFailed):
            await task
        assert supervisor.statuses["d"].num_starts == 3


async def test_losing_the_prefill_workers_for_good_does_not_end_a_run_that_served(
    tmp_path, scripts, monkeypatch
):
    monkeypatch.setattr(group_runner.RestartPolicy, "delay_after_exit", lambda *a, **k: None)
    async with running(tmp_path, group("d", "d"), group("p", "p", role="prefill")) as (supervisor, task):
        prefill = supervisor.statuses["p"]
        await supervisor.wait_until(lambda: all(s.pid for s in supervisor.statuses.values()))
        for name in supervisor.statuses:
            supervisor.mark_ready(name, incarnation="1")
        os.kill(prefill.pid, signal.SIGKILL)
        await supervisor.wait_until(lambda: prefill.state == "failed")
        os.kill(supervisor.statuses["d"].pid, signal.SIGKILL)
        with pytest.raises(GroupFailed, match="d was killed by SIGKILL"):
            await task


async def test_all_output_is_in_the_log_file_and_the_last_lines_are_at_hand(tmp_path):
    program = "import sys; [print('line', i) for i in range(100)]; sys.stdout.write('x' * 200000)"
    lines = []
    child = await ChildProcess.start(
        [sys.executable, "-c", program],
        environment={},
        cwd=tmp_path,
        log_path=tmp_path / "log",
        on_line=lines.append,
    )
    assert await child.wait() == 0
    assert lines[:2] == ["line 0", "line 1"]
    assert len(lines) == 101
    assert (tmp_path / "log").read_text() == "\n".join(lines)
    assert child.last_lines[-2] == "line 99"


def test_children_die_when_their_parent_is_killed(tmp_path):
    parent = textwrap.dedent(
        """
        import asyncio, sys
        from pathlib import Path
        from baton.up.child_process import ChildProcess
        async def main():
            child = await ChildProcess.start(
                [sys.executable, "-c", "import signal; signal.pause()"],
                environment={}, cwd=Path("."), log_path=Path(sys.argv[1]), on_line=print)
            print(child.pid, flush=True)
            await child.wait()
        asyncio.run(main())
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, str(tmp_path / "log")],
        stdout=subprocess.PIPE,
        cwd=group_runner.CODE_ROOT,
    )
    child_pid = int(process.stdout.readline())
    descriptor = os.pidfd_open(child_pid)
    process.kill()
    process.communicate()
    try:
        ended, _, _ = select.select([descriptor], [], [], 10)
        assert ended
    finally:
        os.close(descriptor)
