"""Real weights, memory for a few requests: every token as with plenty of memory."""

import asyncio
import threading
import time
from contextlib import contextmanager
from functools import cache

import pytest
import zmq
from system import check_swapping
from system.check_swapping import Case

from fastserve_mega.client import Client
from fastserve_mega.coordinator.main import CoordinatorProcess
from fastserve_mega.scheduling.kv.swapper import Swapper
from fastserve_mega.system.config_file import load_config

pytestmark = pytest.mark.model

REQUESTS = 6
TOKENS = 12
LONGEST_PROMPT = 60
SCARCE = 11
PLENTY = 128
SLOW_COPY_S = 0.1
START_S = 120
SMALL = (
    "scheduler.max_batch_size=2", "scheduler.max_batch_tokens=64", "kv_cache.host_blocks=128",
    "parallel.threads_per_rank=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def prompts(prompts_file, model_directory):
    prompts = check_swapping.read_prompts(prompts_file, model_directory, 4 * REQUESTS)
    return [prompt for prompt in prompts if len(prompt) <= LONGEST_PROMPT][:REQUESTS]


@contextmanager
def one_rank(model_directory, case, *overrides, copy_delay_s=0.0):
    """Coordinator and rank as threads of the test; yields the clients' endpoint."""
    from fastserve_mega.worker.loop import WorkerLoop, connect_to_coordinator
    from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
    from fastserve_mega.worker.topology import Topology

    settings = (
        f"model.path={model_directory}", "coordinator.client_endpoint=tcp://127.0.0.1:0",
        "coordinator.drain_timeout_s=0.001",
    )  # fmt: skip
    settings += (*check_swapping.settings_of(case), *SMALL, *overrides)
    config = load_config(check_swapping.CONFIG, settings)
    runner = MegatronRunner(config, Topology(), "", 0)
    move = runner.copies._move

    def move_late(copy):
        time.sleep(copy_delay_s)
        move(copy)

    runner.copies._move = move_late
    process = CoordinatorProcess(config, stop_on_stdin_close=False)
    context = zmq.Context()
    socket = connect_to_coordinator(context, process._workers.endpoint, 0)
    loop = WorkerLoop(socket, 0, runner, lambda: True)
    threads = [threading.Thread(target=target) for target in (process.run, loop.run)]
    for thread in threads:
        thread.start()
    try:
        endpoint = process._front_door.endpoint
        with Client(endpoint, timeout_s=START_S):  # from here on it answers
            pass
        yield endpoint
    finally:
        process.stop()
        for thread in threads:
            thread.join(START_S)
            assert not thread.is_alive()
        context.term()
        runner.close()


@pytest.fixture(scope="module")
def run(prompts, model_directory):
    """Case → (tokens, figures)"""

    @cache
    def run(case):
        if case.pipeline > 1:
            overrides = (f"model.path={model_directory}", *SMALL)
            return check_swapping.run_engine(case, prompts, TOKENS, overrides)
        with one_rank(model_directory, case) as endpoint:
            return asyncio.run(check_swapping.generate(endpoint, case, prompts, TOKENS))

    return run


CASES = [
    *((strategy, 1) for strategy in check_swapping.STRATEGIES),
    pytest.param("proactive", 2, marks=pytest.mark.distributed),
]


@pytest.mark.parametrize(("strategy", "pipeline"), CASES)
def test_swapped_requests_get_the_tokens_of_an_undisturbed_run(run, strategy, pipeline):
    expected, undisturbed = run(Case("none", 1, PLENTY))
    assert undisturbed.preemptions == 0
    outputs, figures = run(Case(strategy, pipeline, SCARCE))
    print(figures)
    assert outputs == expected
    # How often depends on the machine's timing; several times each with system/check_swapping.py.
    assert (figures.preemptions > 0) == (strategy != "none")
    if strategy in ("proactive", "reactive"):
        assert figures.swap_ins > 0
        assert figures.recomputed_tokens == 0
    else:
        assert figures.blocks_out == figures.blocks_in == 0


class HastySwapper(Swapper):
    """Frees the blocks that are being copied out before CopyDone."""

    def _copy_out(self, request, sources, leaving, precedes_step):
        self._device.free(list(leaving))
        super()._copy_out(request, sources, (), precedes_step)


@pytest.mark.parametrize("swapper", [Swapper, HastySwapper])
def test_the_check_can_fail(swapper, run, prompts, model_directory, monkeypatch):
    """With copies of several steps' time, freeing blocks before CopyDone gives wrong tokens."""
    expected, _ = run(Case("none", 1, PLENTY))
    monkeypatch.setattr("fastserve_mega.scheduling.kv.manager.Swapper", swapper)
    case = Case("proactive", 1, SCARCE)
    with one_rank(model_directory, case, copy_delay_s=SLOW_COPY_S) as endpoint:
        outputs, _ = asyncio.run(check_swapping.generate(endpoint, case, prompts, TOKENS))
    assert (outputs == expected) == (swapper is Swapper)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["proactive", "reactive"])
def test_swapped_requests_on_a_gpu(strategy, prompts, model_directory):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    answers = []
    for case in (Case("none", 1, PLENTY), Case(strategy, 1, SCARCE)):
        with one_rank(model_directory, case, "parallel.device=cuda") as endpoint:
            answers.append(asyncio.run(check_swapping.generate(endpoint, case, prompts, TOKENS)))
    (expected, _), (outputs, figures) = answers
    assert outputs == expected
    assert figures.swap_ins >= REQUESTS
