"""The real model: what is sampled depends on the request alone, whatever runs beside it."""

import asyncio
import json

import pytest
from system import check_swapping
from system.check_swapping import Case
from test_smollm2 import deployment
from test_swapping import one_rank

from fastserve_mega.client import AsyncClient
from fastserve_mega.types import FinishReason, SamplingParams, StructuredOutput

pytest.importorskip("llguidance")
pytestmark = pytest.mark.model

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "likes": {"type": "array", "items": {"enum": ["tea", "music", "trains"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
BASE = {"max_tokens": 16, "temperature": 0.9, "ignore_eos": True}
REQUESTS = {
    "plain": SamplingParams(**BASE, seed=1, top_p=0.95),
    "penalties": SamplingParams(
        **BASE, seed=2, presence_penalty=0.8, frequency_penalty=0.6, repetition_penalty=1.3,
        min_p=0.02, logit_bias={260: -5.0},
    ),
    "logprobs": SamplingParams(**BASE, seed=3, top_k=40, logprobs=2),
    "schema": SamplingParams(
        max_tokens=60, temperature=0.9, seed=4, structured=StructuredOutput(
            json_schema=json.dumps(SCHEMA)
        ),
    ),
}  # fmt: skip
OTHERS = 12
SWAPPED_OTHERS = 4
QUESTION = [{"role": "user", "content": "Tell me about somebody you know: name, age, interests."}]
PLENTY, SCARCE = 256, 16
FEW = ("scheduler.max_batch_size=3",)


async def one_by_one(endpoint):
    async with AsyncClient(endpoint) as client:
        return {name: await ask(client, params) for name, params in REQUESTS.items()}


async def ask(client, params, salt=""):
    return await (await client.chat(QUESTION, params, cache_salt=salt)).wait()


async def among_others(endpoint, count):
    """All at once, with others that share neither seed nor KV; also how often KV was moved."""
    async with AsyncClient(endpoint) as client:
        others = [
            ask(client, SamplingParams(**BASE, seed=100 + i), salt=str(i)) for i in range(count)
        ]
        mine = [ask(client, params, salt=name) for name, params in REQUESTS.items()]
        done = (await asyncio.gather(*others, *mine))[count:]
        metrics = await client.metrics()
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[0] != "#")
    swap_ins = float(values['fastserve_copy_seconds_count{direction="in"}'])
    return dict(zip(REQUESTS, done, strict=True)), swap_ins


@pytest.fixture(scope="module")
def run_with_plenty(model_directory):
    """Alone, and in a batch of sixteen; one start of the model for both."""
    overrides = ("scheduler.max_batch_size=16", "scheduler.max_batch_tokens=512")
    with one_rank(model_directory, Case("none", 1, PLENTY), *overrides) as endpoint:
        return asyncio.run(one_by_one(endpoint)), asyncio.run(among_others(endpoint, OTHERS))


@pytest.fixture(scope="module")
def alone(run_with_plenty):
    return run_with_plenty[0]


def check_same(alone, again):
    for name, expected in alone.items():
        assert again[name].token_ids == expected.token_ids, name
        assert again[name].text == expected.text
        top = [[each.top_ids for each in answer.logprobs] for answer in (expected, again[name])]
        assert top[0] == top[1]


def test_alone(alone):
    person = json.loads(alone["schema"].text)
    assert set(person) == {"name", "age", "likes"}
    assert 1 <= person["age"] <= 99
    assert alone["schema"].finish_reason is FinishReason.STOP
    assert len({answer.text for answer in alone.values()}) == len(REQUESTS)
    assert all(len(each.top_ids) == 2 for each in alone["logprobs"].logprobs)


def test_in_a_batch_of_sixteen(alone, run_with_plenty):
    check_same(alone, run_with_plenty[1][0])


def test_preempted_and_swapped(alone, model_directory):
    with one_rank(model_directory, Case("proactive", 1, SCARCE), *FEW) as endpoint:
        again, swap_ins = asyncio.run(among_others(endpoint, SWAPPED_OTHERS))
    assert swap_ins > 0
    check_same(alone, again)


@pytest.mark.distributed
def test_on_two_pipeline_stages(alone, model_directory, free_port):
    settings = (*check_swapping.settings_of(Case("proactive", 2, SCARCE)), *FEW)
    with deployment(model_directory, free_port, *settings) as config:
        again, swap_ins = asyncio.run(
            among_others(config.coordinator.client_endpoint, SWAPPED_OTHERS)
        )
    assert swap_ins > 0
    check_same(alone, again)
