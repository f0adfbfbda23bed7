"""Which recorded step computes a batch, and what it is given."""

from __future__ import annotations

import contextlib

import pytest
import torch
from decode_steps import Again, decodes
from kernel_device import DEVICE

from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.kernels.sampling import draw
from fastserve_mega.worker.megatron.decode_graphs import CudaRecorder, DecodeGraphs, recorded_sizes
from fastserve_mega.worker.sampler import Sampler


def test_a_step_takes_the_next_larger_graph_or_none():
    computed = []

    def compute(step, hidden):
        computed.append(step.contexts.shape[0])
        return step.contexts[:, None].clone()

    graphs = DecodeGraphs(
        compute, block_size=16, device=torch.device("cpu"), hidden=None, recorder=Again()
    )
    assert graphs.record(max_sequences=4, max_context=160) == 3
    assert computed == [4, 2, 1]
    result, drawn = graphs.run([*decodes(1, 90), *decodes(2, 160)], lambda: None)
    assert drawn is None
    assert result.flatten().tolist() == [160, 160, 90]
    assert computed[3:] == [4]
    prefill = decodes(1)[0]
    object.__setattr__(prefill, "token_ids", [1, 2])
    for batch in (decodes(5), decodes(1, 161), [prefill]):
        assert graphs.run(batch, lambda: None) is None
    assert computed[3:] == [4]


def test_what_an_earlier_stage_hands_over_is_copied_to_where_the_graph_reads_it():
    graphs = DecodeGraphs(
        lambda step, hidden: hidden * 2,
        block_size=16,
        device=torch.device("cpu"),
        hidden=(3, torch.float32),
        recorder=Again(),
    )
    graphs.record(max_sequences=2, max_context=160)
    for value in (1.0, 5.0):
        received = torch.full((2, 3), value)
        result, _ = graphs.run(decodes(2), lambda received=received: received)
        assert torch.equal(result, 2 * received)


@pytest.mark.parametrize("hidden", [None, (3, torch.float32)])
def test_tokens_are_drawn_in_the_graph_by_the_rules_of_each_step(hidden):
    """And are those that the sampler draws of the same logits, one kernel after the other."""
    logits = torch.randn((4, 150), generator=torch.Generator().manual_seed(7)).to(DEVICE)
    graphs = DecodeGraphs(
        lambda step, hidden: logits[step.token_ids[step.sample_rows]],
        block_size=16, device=DEVICE, hidden=hidden, recorder=Again(), draw=draw,
    )  # fmt: skip
    graphs.record(max_sequences=4, max_context=160)
    rules_of_rows = ({"temperature": 0.0}, {"temperature": 2.0}, {"temperature": 1.5, "top_k": 9})
    sampler, seen = Sampler((3,), draw=draw), set()
    for position in (20, 21):
        batch = decodes(3, position)
        for row, (each, rules) in enumerate(zip(batch, rules_of_rows, strict=True)):
            object.__setattr__(each, "token_ids", [row])
            object.__setattr__(each, "params", SamplingParams(**rules))
        result, drawn = graphs.run(batch, lambda: torch.zeros((3, 3), device=DEVICE))
        output = sampler(result, batch, drawn)
        assert output.token_ids == Sampler((3,))(logits[:3], batch).token_ids
        seen.add(tuple(output.token_ids))
    assert len(seen) == 2


def test_what_is_drawn_in_the_graph_does_not_count_where_requests_change_the_logits():
    logits = torch.zeros((1, 8), device=DEVICE)
    batch = decodes(1)
    greedy = SamplingParams(temperature=0.0, logit_bias={5: 2.0})
    object.__setattr__(batch[0], "params", greedy)
    drawn = torch.tensor([[3.0, 0.0]], dtype=torch.float64, device=DEVICE)
    assert Sampler((), draw=draw)(logits, batch, drawn).token_ids == [5]


def test_all_sizes_leave_what_they_compute_in_the_same_memory():
    graphs = DecodeGraphs(
        lambda step, hidden: step.contexts[:, None] * torch.ones(1, 150),
        block_size=16, device=torch.device("cpu"), hidden=None, recorder=Again(),
    )  # fmt: skip
    graphs.record(max_sequences=16, max_context=160)
    results = []
    for count in (16, 1, 2, 7):
        result, _ = graphs.run(decodes(count, 90 + count), lambda: None)
        assert torch.equal(result, torch.full((count, 150), 90.0 + count))
        results.append(result)
    assert len({result.data_ptr() for result in results}) == 1


def test_a_graph_is_recorded_behind_a_first_run_on_a_stream_of_its_own(monkeypatch):
    """And nothing that another thread asks of the device meanwhile spoils it."""
    log = []

    class Stream:
        def __init__(self, name="aside"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def pool(self):
            return "pool"

        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def recording(graph, *, pool, stream, capture_error_mode):
        log.append(f"begin {pool} {stream.name} {capture_error_mode}")
        yield
        log.append("end")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    recorder = CudaRecorder()
    for _ in range(2):
        replay = recorder.record(lambda: log.append("compute"))
    replay()
    once = ["aside waits for main", "compute", "main waits for aside"]
    assert log == [
        *once, "begin None aside thread_local", "compute", "end",
        *once, "begin pool aside thread_local", "compute", "end", "replay",
    ]  # fmt: skip


def test_few_graphs_for_any_number_of_sequences():
    assert recorded_sizes(3) == [1, 2, 3]
    assert recorded_sizes(16) == [1, 2, 4, 8, 16]
    assert len(recorded_sizes(256)) < 30
    assert recorded_sizes(250)[-2:] == [240, 250]
