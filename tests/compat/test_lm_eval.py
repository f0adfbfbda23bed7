"""lm-evaluation-harness against the server: a task that ranks continuations by their likelihood."""

import json

import pytest

pytest.importorskip("lm_eval", reason="needs tools/compat.sh lm-eval")

import lm_eval
from lm_eval.tasks import TaskManager

from fastserve_mega.messaging.messages import Finished, PromptLogprobs, Submit, Tokens
from fastserve_mega.types import FinishReason, TokenLogprobs, Usage

pytestmark = pytest.mark.filterwarnings("ignore")  # not ours

QUESTIONS = [
    {"question": "fox", "choices": ["the lazy dog", "quick"], "answer": 1},
    {"question": "日本", "choices": ["語", "the brown fox"], "answer": 0},
    {"question": "wrong", "choices": ["a", "jumps over the lazy dog"], "answer": 1},
]
TASK = """
task: ranked
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def scoring(submit: Submit):
    """Every token of a prompt has the same probability: the continuation with fewer tokens wins."""
    if submit.params.prompt_logprobs:
        told = tuple(TokenLogprobs(-1.0, (0,), (-0.5,)) for _ in submit.prompt[1:])
        yield PromptLogprobs(submit.request_id, 1, told)
    # The end of sequence, at once: it counts as the one token that was asked for.
    yield Tokens(submit.request_id, 0, (2,), (TokenLogprobs(-1.0, (2,), (-1.0,)),))
    yield Finished(submit.request_id, FinishReason.STOP, Usage(len(submit.prompt), 1))


def test_a_task_of_likelihoods(url, running, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    coordinator, _ = running
    coordinator.reset()
    coordinator.behaviour = scoring
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    (tmp_path / "ranked.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    results = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny",
            "base_url": f"{url}/completions",
            "tokenizer": str(tokenizer.directory),
            "max_length": 2048,
        },
        tasks=["ranked"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=4,
    )
    assert results["results"]["ranked"]["acc,none"] == pytest.approx(2 / 3)
    samples = results["samples"]["ranked"]
    for sample, question in zip(samples, QUESTIONS, strict=True):
        for (told, _), choice in zip(sample["filtered_resps"], question["choices"], strict=True):
            assert -float(told) == len(tokenizer.encode(f" {choice}"))
