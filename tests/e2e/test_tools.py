"""Evaluation and load tools as they are installed by `make test-tools`, against a whole stack."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stack import Stack

_TASK = """
task: ways
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["left", "right", "straight ahead"]
doc_to_target: answer
metric_list:
  - metric: acc
"""
_QUESTIONS = ["Which way to the station?", "And to the harbour?", "Where is the old bridge", "Home:"]
_CHOICES = ["left", "right", "straight ahead"]

Scores = Callable[[str, str], float]


@pytest.fixture(scope="session")
def tools() -> Path:
    given = os.environ.get("BATON_TOOLS")
    if not given:
        pytest.skip("make test-tools installs the tools and runs this")
    return Path(given) / "bin"


@pytest.fixture(scope="session")
def score(tiny_model: Path) -> Scores:
    """The log-likelihood of a continuation, by transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def of(context: str, continuation: str) -> float:
        context_ids = tokenizer.encode(context, add_special_tokens=False)
        ids = tokenizer.encode(context + continuation, add_special_tokens=False)
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = range(len(context_ids), len(ids))
        return float(sum(logprobs[place - 1, ids[place]] for place in places))

    return of


def run(command: list[str], work_dir: Path, timeout_s: float = 150) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    environment["HF_HOME"] = str(work_dir / "hf")
    done = subprocess.run(
        command,
        cwd=work_dir,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_lm_eval_scores_choices_as_transformers_does(
    stack: Stack, tools: Path, score: Scores, tmp_path: Path
) -> None:
    data = tmp_path / "ways.jsonl"
    rows = [{"question": text, "answer": place % 3} for place, text in enumerate(_QUESTIONS)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "ways.yaml").write_text(_TASK.format(data=data))
    arguments = f"model=tiny,base_url={stack.url}/v1/completions,num_concurrent=2,tokenizer_backend=remote"
    command = [str(tools / "lm_eval"), "run", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "ways", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    run([*command, "--log_samples"], tmp_path)
    [samples] = (tmp_path / "out").rglob("samples_ways_*.jsonl")
    checked = 0
    for line in samples.read_text().splitlines():
        sample: dict[str, Any] = json.loads(line)
        question = sample["doc"]["question"]
        for choice, response in zip(_CHOICES, sample["filtered_resps"], strict=True):
            assert float(response[0]) == pytest.approx(score(question, f" {choice}"), abs=2e-3)
            checked += 1
    assert checked == len(_QUESTIONS) * len(_CHOICES)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])
def test_aiperf_measures_a_stream(
    stack: Stack, tools: Path, tiny_model: Path, tmp_path: Path, endpoint: str
) -> None:
    command = [str(tools / "aiperf"), "profile", "--model", "tiny", "--url", stack.url, "--streaming"]
    command += ["--endpoint-type", endpoint, "--tokenizer", str(tiny_model), "--concurrency", "2"]
    command += ["--request-count", "6", "--synthetic-input-tokens-mean", "50", "--output-tokens-mean", "12"]
    command += ["--output-artifact-dir", str(tmp_path / "out"), "--ui", "none"]
    run(command, tmp_path)
    [report] = (tmp_path / "out").rglob("profile_export_aiperf.json")
    told = json.loads(report.read_text())
    assert told["request_count"]["avg"] == 6
    assert told["time_to_first_token"]["avg"] > 0
