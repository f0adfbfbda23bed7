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
        conversation = [{"role": "user", "content": "hi"}]
        [answer] = llm.chat([conversation], GREEDY)
        assert answer.usage.completion_tokens == 6
        # One needs no list around it, and each may have params of its own.
        [alone] = llm.chat(conversation, GREEDY)
        assert alone.token_ids == answer.token_ids
        [alone] = llm.generate(PROMPTS[0], GREEDY)
        assert alone.token_ids == answers[0].token_ids
        each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 1, 2)]
        lengths = [answer.usage.completion_tokens for answer in llm.generate(PROMPTS, each)]
        assert lengths == [3, 1, 2]
        assert llm.generate([], each[:0]) == []
        with pytest.raises(ValueError, match="there are 3 params for 2 prompts"):
            llm.generate(PROMPTS[:2], each)


def test_a_wrong_setting_is_said_before_anything_starts(model_directory):
    with pytest.raises(ValueError, match=r"unknown field 'model\.colour'"):
        LLM(str(model_directory), settings=["model.colour=red"])


def test_under_mpirun_the_first_rank_goes_on_with_the_program(model_directory):
    command = [*mpirun_command(2), sys.executable, "-c", PROGRAM, str(model_directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    wanted = [tuple(expected_tokens(prompt, 6)) for prompt in ([1, 2, 3], [4, 5])]
    assert done.stdout.strip() == str(wanted)
