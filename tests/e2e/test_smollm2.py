"""The real model through the whole system: mpirun, ranks, coordinator, clients, HTTP."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from tiny_models import greedy_after_each

from fastserve_mega.client import AsyncClient
from fastserve_mega.launcher import Deployment, http_url
from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.system.config_file import load_config
from fastserve_mega.text.tokenizer import Tokenizer
from fastserve_mega.types import FinishReason, SamplingParams

pytestmark = [pytest.mark.model, pytest.mark.distributed]

CONFIG = "configs/smollm2-135m-cpu.yaml"
PROMPTS = 20
NEW_TOKENS = 64
CONCURRENT = 8


@contextmanager
def deployment(model_directory, free_port, *overrides, http=False):
    sets = [
        f"model.path={model_directory}",
        "model.dtype=float32",
        f"coordinator.client_endpoint=tcp://127.0.0.1:{free_port()}",
        f"server.port={free_port()}",
        *overrides,
    ]
    config = load_config(CONFIG, sets)
    arguments = ["--config", CONFIG, *(word for value in sets for word in ("--set", value))]
    with Deployment(config, arguments, http=http) as running:
        running.start()
        yield config


@pytest.fixture(scope="module")
def prompts(prompts_file, model_directory):
    """Chat prompts of very different lengths, as token ids."""
    tokenizer = Tokenizer(model_directory)
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    step = len(rows) // PROMPTS
    turns = [row["turns"][0] for row in rows[::step]][:PROMPTS]
    return [tokenizer.apply_chat_template([{"role": "user", "content": turn}]) for turn in turns]


@pytest.fixture(scope="module")
def two_stages(model_directory, free_port):
    """A configuration that is being served, also over HTTP, with little memory."""
    overrides = (
        "scheduler.max_batch_tokens=64",  # long prompts in chunks, beside others that decode
        "kv_cache.device_blocks=40",  # too few for 8 requests: some are preempted
    )
    with deployment(model_directory, free_port, *overrides, http=True) as config:
        yield config


async def generate_all(endpoint, prompts):
    """All prompts, `CONCURRENT` at a time."""
    slots = asyncio.Semaphore(CONCURRENT)
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0)

    async def one(client, prompt):
        async with slots:
            answer = await client.submit(prompt, params)
            return (await answer.wait()).token_ids

    async with AsyncClient(endpoint) as client:
        return await asyncio.gather(*(one(client, prompt) for prompt in prompts))


@pytest.fixture(scope="module")
def outputs(two_stages, prompts):
    return asyncio.run(generate_all(two_stages.coordinator.client_endpoint, prompts))


def test_each_token_is_the_likeliest_for_transformers(outputs, prompts, model_directory):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype="float32").eval()
    ends = load_architecture(model_directory).eos_token_ids
    assert len(outputs) == len(prompts) == PROMPTS
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output) == greedy_after_each(model, prompt, list(output))
        assert len(output) == NEW_TOKENS or output[-1] in ends
        assert not set(output[:-1]) & set(ends)


def test_one_rank_generates_what_two_stages_do(outputs, model_directory, free_port, prompts):
    overrides = (
        "parallel.pipeline=1",
        "parallel.threads_per_rank=1",
        "scheduler.max_batch_tokens=64",
        "kv_cache.device_blocks=64",
    )
    with deployment(model_directory, free_port, *overrides) as config:
        endpoint = config.coordinator.client_endpoint
        assert asyncio.run(generate_all(endpoint, prompts)) == outputs


def test_openai_client_over_http(two_stages):
    from openai import BadRequestError, OpenAI

    url, name = f"{http_url(two_stages)}/v1", two_stages.model.name
    with OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [name]

        def ask(question):
            return client.chat.completions.create(
                model=name,
                messages=[{"role": "user", "content": question}],
                max_tokens=24,
                temperature=0,
            )

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, ["What is the capital of France?"] * 4))
        assert len({answer.choices[0].message.content for answer in answers}) == 1
        assert "Paris" in answers[0].choices[0].message.content
        assert answers[0].usage.completion_tokens <= 24

        stream = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=24,
            temperature=0,
            stream=True,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert text == answers[0].choices[0].message.content

        # The pool has no room for the 4096 tokens of the configuration.
        with pytest.raises(BadRequestError, match=r"the context is 624 tokens"):
            client.completions.create(model=name, prompt=[1] * 4090, max_tokens=7)


def test_openai_client_gets_what_a_schema_asks_for(two_stages):
    from openai import OpenAI

    with OpenAI(base_url=f"{http_url(two_stages)}/v1", api_key="none", timeout=60) as client:
        schema = {
            "type": "object",
            "properties": {"capital": {"enum": ["Paris", "London", "Rome"]}},
            "required": ["capital"],
            "additionalProperties": False,
        }
        held = client.chat.completions.create(
            model=two_stages.model.name,
            messages=[{"role": "user", "content": "What is the capital of France? As JSON."}],
            max_tokens=64,
            temperature=0,
            logprobs=True,
            response_format={
                "type": "json_schema", "json_schema": {"name": "answer", "schema": schema},
            },
        ).choices[0]  # fmt: skip
        assert json.loads(held.message.content) == {"capital": "Paris"}
        assert held.finish_reason == "stop"
        data = b"".join(bytes(token.bytes) for token in held.logprobs.content)
        assert data.decode() == held.message.content


def test_sampled_text_depends_on_the_seed_only(two_stages):
    """Alone, and among fifteen others with little memory."""
    params = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.9, seed=7)
    question = [{"role": "user", "content": "Tell me a story."}]

    async def run(endpoint):
        async with AsyncClient(endpoint) as client:
            alone = await (await client.chat(question, params)).wait()
            among = [await client.chat(question, SamplingParams(max_tokens=24)) for _ in range(15)]
            again = await (await client.chat(question, params)).wait()
            for answer in among:
                assert (await answer.wait()).finish_reason in {
                    FinishReason.LENGTH,
                    FinishReason.STOP,
                }
            return alone, again

    alone, again = asyncio.run(run(two_stages.coordinator.client_endpoint))
    assert alone.token_ids == again.token_ids
