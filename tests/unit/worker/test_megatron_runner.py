"""One rank in this process: the same runner as under mpirun, without its launch time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from generation import embed, generate
from runners import BLOCK_SIZE, GREEDY, MAX_TOKENS, open_runner
from tiny_models import LAYERS, MODELS, SMOLLM2, greedy, last_hidden_state, prompts

from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.megatron import megatron_runner
from fastserve_mega.worker.megatron.safetensors_files import SafetensorsFiles
from fastserve_mega.worker.model_runner import SequenceInput


@pytest.fixture
def llama(made):
    with open_runner(made("llama")[0]) as runner:
        yield runner


def computing(request):
    """Options of a runner that computes as a test's parameter says."""
    if request != "cuda":
        return {"cpu_engine": request}
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return {"device": "cuda"}


@pytest.mark.parametrize("engine", ["auto", "torch", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", MODELS)
def test_greedy_tokens_equal_transformers(made, family, engine):
    directory, model = made(family)
    expected = [greedy(model, prompt, MAX_TOKENS) for prompt in prompts()]
    with open_runner(directory, **computing(engine)) as runner:
        assert runner.is_sampling_rank
        assert runner.device_blocks == 80
        for chunk in (7, 512):
            outputs = generate(runner, prompts(), GREEDY, block_size=BLOCK_SIZE, chunk=chunk)
            assert outputs == expected
        # What does not move the best token, like a limit on the logits, shows in their values.
        torch.testing.assert_close(
            logits_of(runner, prompts()[5]).cpu(), last_logits(model, prompts()[5])
        )


def logits_of(runner, prompt):
    """Of the token after a prompt, as they reach the sampler."""
    seen, sampler = [], runner._sampler

    def sample(logits, sequences):
        seen.append(logits)
        return sampler(logits, sequences)

    sample.prepare = sampler.prepare
    runner._sampler = sample
    generate(runner, [prompt], SamplingParams(max_tokens=1, temperature=0.0), block_size=BLOCK_SIZE)
    return seen[0][0]


@pytest.mark.parametrize("cpu_engine", ["auto", "torch"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_probabilities_of_prompts_equal_transformers(made, family, cpu_engine):
    """In chunks, and beside sequences that ask for none or only for those of their output."""
    directory, model = made(family)
    asking = SamplingParams(max_tokens=2, temperature=0.0, logprobs=3, prompt_logprobs=True)
    told = {}
    with open_runner(directory, cpu_engine=cpu_engine) as runner:
        execute = runner.execute

        def watch(batch):
            output = execute(batch)
            for scored in output.scored:
                told.setdefault(batch[scored.index].request_id, []).extend(
                    enumerate(scored.logprobs, scored.start)
                )
            return output

        runner.execute = watch
        every = [asking, GREEDY, asking, SamplingParams(max_tokens=2, logprobs=1), asking, asking]
        outputs = [
            generate_each(runner, prompts()[: len(every)], every, chunk) for chunk in (5, 512)
        ]
        assert outputs[0] == outputs[1]
    for index, (prompt, params) in enumerate(zip(prompts(), every, strict=False)):
        positions = [position for position, _ in told.get(f"request-{index}", [])]
        expected = [*range(1, len(prompt))] * 2 if params.prompt_logprobs else []
        assert positions == expected
        with torch.inference_mode():
            logits = model(torch.tensor([prompt]), use_cache=False).logits[0]
        logprobs = torch.log_softmax(logits, dim=-1)
        for position, each in told.get(f"request-{index}", []):
            row = logprobs[position - 1]
            assert each.logprob == pytest.approx(float(row[prompt[position]]), abs=1e-4)
            assert each.top_logprobs == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("engine", ["auto", "torch", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_embeddings_equal_transformers(made, family, engine):
    """The last hidden state behind the final norm, whatever the chunks and whoever is beside."""
    directory, model = made(family)
    with open_runner(directory, **computing(engine)) as runner:
        found = [embed(runner, prompts(), block_size=BLOCK_SIZE, chunk=chunk) for chunk in (5, 512)]
    for index, prompt in enumerate(prompts()):
        expected = last_hidden_state(model, prompt)
        for embeddings in found:
            torch.testing.assert_close(torch.tensor(embeddings[index]), expected)


def generate_each(runner, prompts, params, chunk):
    """`generate` with parameters for each prompt."""
    from generation import Generation

    generations = [
        Generation(i, p, q) for i, (p, q) in enumerate(zip(prompts, params, strict=True))
    ]
    free = list(range(1, runner.device_blocks))
    while unfinished := [each for each in generations if not each.finished]:
        batch = [each.next_input(chunk, BLOCK_SIZE, free) for each in unfinished]
        tokens = iter(runner.execute(batch).token_ids)
        for each, piece in zip(unfinished, batch, strict=True):
            each.cached += len(piece.token_ids)
            if piece.samples:
                each.tokens.append(next(tokens))
    return [each.output for each in generations]


def last_logits(model, prompt):
    with torch.inference_mode():
        return model(torch.tensor([prompt]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe"])
def test_all_experts_of_a_layer_may_be_two_tensors(made, tmp_path, family):
    """As transformers 5 keeps them in memory, and writes them when told to."""
    _, model = made(family)
    model.save_pretrained(tmp_path, save_original_format=False)
    expected = greedy(model, prompts()[1], MAX_TOKENS)
    with open_runner(tmp_path) as runner:
        assert "model.layers.1.mlp.experts.gate_up_proj" in SafetensorsFiles(tmp_path)
        assert generate(runner, prompts()[1:2], GREEDY, block_size=BLOCK_SIZE) == [expected]


@pytest.mark.parametrize(
    ("family", "kv_heads", "head_dim"),
    [("llama", 2, 8), ("llama-one-kv-head", 1, 8), ("qwen3", 2, 16), ("opt", 4, 8)],
)
def test_blocks_are_counted_by_the_key_value_heads(made, family, kv_heads, head_dim):
    """Which are fewer than the query heads (4), and whose size need not be hidden / heads."""
    directory, _ = made(family)
    block_bytes = LAYERS * 2 * kv_heads * BLOCK_SIZE * head_dim * torch.float32.itemsize
    memory_gb = 100.5 * block_bytes / 2**30
    with open_runner(
        directory, device_blocks=None, device_memory_gb=memory_gb, host_memory_gb=memory_gb / 2
    ) as runner:
        assert runner.block_bytes == block_bytes
        assert (runner.device_blocks, runner.host_blocks) == (100, 50)


def test_an_eight_bit_cache_is_close_and_does_not_depend_on_chunks(made):
    directory, model = made("llama")
    prompt = prompts()[5]
    with open_runner(directory, kv_dtype="fp8") as runner:
        assert runner.block_bytes == LAYERS * 2 * 2 * BLOCK_SIZE * (8 + 2)
        whole, chunks = (
            generate(runner, [prompt], GREEDY, block_size=BLOCK_SIZE, chunk=chunk)[0]
            for chunk in (512, 7)
        )
        assert whole == chunks
        logits = logits_of(runner, prompt)
    expected = last_logits(model, prompt)
    assert 0 < (logits - expected).std() < 0.2 * expected.std()


def test_prompts_longer_than_a_tile_of_attention(made):
    """More new tokens than attend at a time, in one step and in two, with and without a window."""
    generator = torch.Generator().manual_seed(2)
    prompt = torch.randint(3, 131, (300,), generator=generator).tolist()
    for family in ("llama", "mistral"):
        directory, model = made(family)
        expected = greedy(model, prompt, 2)
        with open_runner(directory) as runner:
            params = SamplingParams(max_tokens=2, temperature=0.0)
            for chunk in (150, 300):
                outputs = generate(runner, [prompt], params, block_size=BLOCK_SIZE, chunk=chunk)
                assert outputs == [expected]


@pytest.mark.model
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"{SMOLLM2} is missing (make model)")
def test_smollm2_equals_transformers():
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype="float32").eval()
    texts = [[504, 3575, 282, 4649, 314], list(range(300, 340))]
    params = SamplingParams(max_tokens=8, temperature=0.0)
    with open_runner(SMOLLM2) as runner:
        outputs = generate(runner, texts, params, block_size=BLOCK_SIZE, chunk=16)
    assert outputs == [greedy(model, text, 8) for text in texts]


def test_nan_of_a_blocks_last_owner_does_not_reach_the_next(llama):
    clean = generate(llama, prompts(), GREEDY, block_size=BLOCK_SIZE, chunk=7)
    llama.cache.pool[1:] = torch.nan
    assert generate(llama, prompts(), GREEDY, block_size=BLOCK_SIZE, chunk=7) == clean
    llama.cache.pool[1:] = torch.inf
    assert generate(llama, prompts(), GREEDY, block_size=BLOCK_SIZE, chunk=512) == clean
    assert not llama.cache.pool[0].any()


def test_blocks_may_move(llama):
    """Swapped out, scribbled over, and swapped in at other ids: the same tokens."""
    prompt = prompts()[1]
    expected = generate(llama, [prompt], GREEDY, block_size=BLOCK_SIZE)[0]
    params = SamplingParams(max_tokens=5, temperature=0.0)
    begun = generate(llama, [prompt], params, block_size=BLOCK_SIZE)[0]
    count = len(prompt) + len(begun) - 1
    old = [llama.device_blocks - 1 - i for i in range(-(-count // BLOCK_SIZE))]
    saved = llama.cache.pool[old].clone()
    llama.cache.pool[1:] = torch.nan
    new = list(range(1, 1 + len(old)))
    llama.cache.pool[new] = saved
    tokens = list(begun)
    while len(tokens) < MAX_TOKENS:
        start = len(prompt) + len(tokens) - 1
        step = SequenceInput(
            request_id=RequestId("moved"),
            token_ids=tokens[-1:],
            start=start,
            block_table=[*new, 40, 41, 42],
            samples=True,
            params=GREEDY,
            seed=0,
            prompt_tokens=len(prompt),
        )
        tokens += llama.execute([step]).token_ids
    assert tokens == expected


def test_sampled_stream_is_the_same_alone_resumed_or_in_a_crowd(llama):
    params = [
        SamplingParams(max_tokens=MAX_TOKENS, temperature=1.2, top_p=0.95, seed=seed)
        for seed in range(len(prompts()))
    ]
    crowd = generate(llama, prompts(), params, block_size=BLOCK_SIZE, chunk=7)
    alone = [
        generate(llama, [prompt], [p], block_size=BLOCK_SIZE)[0]
        for prompt, p in zip(prompts(), params, strict=True)
    ]
    assert crowd == alone
    # Recomputed from prompt and answer so far, as after the loss of its KV.
    resumed = [prompts()[1] + alone[1][:5]]
    rest = SamplingParams(max_tokens=MAX_TOKENS - 5, temperature=1.2, top_p=0.95, seed=1)
    assert generate(llama, resumed, [rest], block_size=BLOCK_SIZE)[0] == alone[1][5:]


def test_an_empty_batch_and_a_batch_that_samples_nothing(llama, monkeypatch):
    assert llama.execute([]).token_ids == []
    chunk = SequenceInput(
        request_id=RequestId("chunk"),
        token_ids=[1, 2],
        start=0,
        block_table=[1],
        samples=False,
        params=GREEDY,
        seed=0,
        prompt_tokens=4,
    )
    waited = []
    monkeypatch.setattr(megatron_runner, "wait_for", waited.append)
    assert llama.execute([chunk]).token_ids == []
    # The time until the result is what the chunk is charged, and on a GPU nothing else waits.
    assert waited == [torch.device("cpu")]
    llama.execute([dataclasses.replace(chunk, samples=True)])
    assert len(waited) == 1
