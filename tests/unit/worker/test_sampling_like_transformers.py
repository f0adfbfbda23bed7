"""Log probabilities and the repetition penalty beside those of transformers, same weights."""

from __future__ import annotations

import pytest
import torch
from generation import generate
from test_megatron_runner import BLOCK_SIZE, open_runner
from tiny_models import make_model, prompts

from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.model_runner import SequenceInput

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    return directory, make_model("llama", directory)


def test_logprobs(made):
    directory, model = made
    prompt = prompts()[1]
    blocks = range(1, 2 + len(prompt) // BLOCK_SIZE)
    params = SamplingParams(
        temperature=0.7, top_k=3, presence_penalty=1.0, logit_bias={5: 3.0}, logprobs=8
    )
    step = SequenceInput(
        RequestId("r"), prompt, 0, list(blocks), True, params, 0, len(prompt)
    )  # fmt: skip
    with open_runner(directory) as runner:
        output = runner.execute([step])
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    expected = torch.log_softmax(logits.float(), dim=-1)
    (told,) = output.logprobs
    assert told.top_ids == tuple(expected.topk(8).indices.tolist())
    assert told.top_logprobs == pytest.approx(expected.topk(8).values.tolist(), abs=1e-4)
    assert told.logprob == pytest.approx(float(expected[output.token_ids[0]]), abs=1e-4)


@pytest.mark.parametrize("penalty", [0.6, 1.4])
def test_repetition_penalty(made, penalty):
    directory, model = made

    def expected(prompt):
        ids = torch.tensor([prompt])
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
            do_sample=False, repetition_penalty=penalty, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return generated[0, len(prompt) :].tolist()

    params = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, repetition_penalty=penalty
    )
    plain = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    with open_runner(directory) as runner:
        outputs = generate(runner, prompts(), params, block_size=BLOCK_SIZE, chunk=7)
        assert outputs != generate(runner, prompts(), plain, block_size=BLOCK_SIZE)
    assert outputs == [expected(prompt) for prompt in prompts()]
