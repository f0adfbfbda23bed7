"""A model inside a program, with ranks that compute nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
from fake_server import expected_tokens

from fastserve_mega import LLM, SamplingParams
from fastserve_mega.launcher import mpirun_command

pytestmark = pytest.mark.distributed
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
PROGRAM = """
import sys
from fastserve_mega import LLM, SamplingParams
llm = LLM(sys.argv[1], pipeline=2, settings=["kv_cache.device_blocks=64"], runner="fake")
params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
print([each.token_ids for each in llm.generate([[1, 2, 3], [4, 5]], params)])
"""


def test_answers_come_in_the_order_of_the_prompts(model_directory, monkeypatch):
    monkeypatch.setattr("fastserve_mega.offline.llm._AT_ONCE", 2)
    with LLM(str(model_directory), runner="fake") as llm:
        answers = llm.generate(PROMPTS, GREEDY)
        assert [each.token_ids for each in answers] == [
            tuple(expected_tokens(prompt, 6)) for prompt in PROMPTS
        ]
        assert {each.finish_reason for each in answers} == {"length"}
        assert len(llm.generate("the fox", GREEDY)) == 1
        [answer] = llm.chat([[{"role": "user", "content": "hi"}]], GREEDY)
        assert answer.usage.completion_tokens == 6


def test_a_wrong_setting_is_said_before_anything_starts(model_directory):
    with pytest.raises(ValueError, match=r"unknown field 'model\.colour'"):
        LLM(str(model_directory), settings=["model.colour=red"])


def test_under_mpirun_the_first_rank_goes_on_with_the_program(model_directory):
    command = [*mpirun_command(2), sys.executable, "-c", PROGRAM, str(model_directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    wanted = [tuple(expected_tokens(prompt, 6)) for prompt in ([1, 2, 3], [4, 5])]
    assert done.stdout.strip() == str(wanted)
