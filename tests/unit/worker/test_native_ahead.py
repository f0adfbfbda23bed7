"""The native step when it is computed ahead of its command."""

from __future__ import annotations

import contextlib

import pytest
import torch
from tiny_models import make_model

from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.model_runner import SequenceInput, Verdict
from fastserve_mega.worker.native.library import library_path
from fastserve_mega.worker.topology import Topology

UNKNOWN, GO_ON, ABANDON = Verdict

pytestmark = pytest.mark.skipif(
    not library_path().exists(), reason="the native step is not built (no compiler)"
)


def sequence(tokens, start, block):
    params = SamplingParams(max_tokens=9)
    return SequenceInput("r", tokens, start, [block], True, params, seed=0, prompt_tokens=1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_has_the_same_bits_or_leaves_nothing_that_counts(tmp_path, dtype, threads):
    make_model("llama", tmp_path)
    config = Config(
        model=ModelConfig(path=str(tmp_path), dtype=dtype),
        parallel=ParallelConfig(
            device="cpu", threads_per_rank=threads, cpu_engine="native", look_ahead=True
        ),
        kv_cache=KvCacheConfig(block_size=4, device_blocks=8),
    )
    with contextlib.closing(MegatronRunner(config, Topology(), "", 0)) as runner:
        assert runner.looks_ahead
        runner.execute([sequence([5, 6, 7], 0, 1)])
        step, engine = [sequence([8], 3, 1), sequence([9], 0, 4)], runner._engine
        logits = engine.run(step, lambda: None)
        expected = runner.execute(step)
        for answers in ([ABANDON], [UNKNOWN, ABANDON], [UNKNOWN, GO_ON], [UNKNOWN] * 9, [GO_ON]):
            asked = iter(answers)
            ahead = runner.execute_ahead(step, lambda asked=asked: next(asked))
            assert ahead == (None if ABANDON in answers else expected)
            if answers[0] is not UNKNOWN or answers[1] is not UNKNOWN:
                assert next(asked, None) is None
            assert torch.equal(engine.run(step, lambda: None), logits)
        with pytest.raises(ZeroDivisionError):
            runner.execute_ahead(step, lambda: 1 // 0)
