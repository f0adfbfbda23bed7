"""What ranks say to each other in a step: those of a group the same, in the same order.

Each rank of a mesh runs the same batches beside torch's fake process groups, whose collectives do
nothing, and what it asks of them is logged. NCCL would wait for ever, or mix up what is said, where
two ranks of a group differ.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tiny_models import make_model
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
from fastserve_mega.types import RequestId, SamplingParams
from fastserve_mega.worker.megatron import initialize, megatron_runner
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.model_runner import SequenceInput
from fastserve_mega.worker.topology import Topology

LAYERS = 3
NAMES = ("all_reduce", "all_gather", "broadcast", "isend", "recv", "barrier", "all_to_all")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    made = {}
    for family in ("llama", "qwen3-moe"):
        made[family] = tmp_path_factory.mktemp(family)
        make_model(family, made[family])
    return made


@pytest.fixture
def said(monkeypatch):
    """Logs the collectives: their names, ranks, or the one that is spoken to, sizes and types."""
    log = []
    real_open, real_group = dist.init_process_group, dist.new_group
    monkeypatch.setattr(
        initialize.dist,
        "init_process_group",
        lambda backend, store, **o: real_open("fake", store=FakeStore(), **o),
    )
    monkeypatch.setattr(
        initialize.dist, "new_group", lambda ranks, **o: real_group(ranks, backend="fake")
    )
    monkeypatch.setattr(initialize.dist, "TCPStore", lambda *a, **o: None)
    monkeypatch.setattr(initialize, "listen_at", lambda *a: None)
    monkeypatch.setattr(megatron_runner, "connect_stages", lambda *a: None)
    for name in NAMES:
        monkeypatch.setattr(dist, name, _logged(name, getattr(dist, name), log))
    return log


def _logged(name, real, log):
    def say(*arguments, **options):
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        shapes = tuple((tuple(t.shape), t.dtype) for t in tensors)
        peer = options.get("src", options.get("dst"))
        members = tuple(dist.get_process_group_ranks(options.get("group")))
        log.append((name, members if peer is None else peer, shapes))
        if name in ("isend", "recv"):
            return None
        return real(*arguments, **options)

    return say


def sequence(row, tokens, start, samples=True):
    return SequenceInput(
        request_id=RequestId(str(row)),
        token_ids=[3] * tokens,
        start=start,
        block_table=range(1 + 5 * row, 6 + 5 * row),
        samples=samples,
        params=SamplingParams(max_tokens=9, temperature=0.7, logprobs=2, prompt_logprobs=None),
        seed=row,
        prompt_tokens=start + tokens,
    )


BATCHES = (
    [sequence(0, 7, 0, samples=False)],
    [sequence(0, 3, 7), sequence(1, 5, 0)],
    [sequence(0, 1, 10), sequence(1, 1, 5), sequence(2, 9, 0, samples=False)],
    [sequence(1, 1, 6)],
)


def steps_of(rank, directory, said, **mesh):
    """What a rank says in each of the steps."""
    parallel = ParallelConfig(device="cpu", threads_per_rank=1, cpu_engine="torch", **mesh)
    size = parallel.world_size
    config = Config(
        model=ModelConfig(path=str(directory), dtype="float32"),
        parallel=parallel,
        kv_cache=KvCacheConfig(block_size=4, device_blocks=20),
    )
    runner = MegatronRunner(config, Topology(rank, size, rank, size), "", 0)
    try:
        steps = []
        for batch in BATCHES:
            said.clear()
            runner.execute(batch)
            steps.append(list(said))
        return steps
    finally:
        runner.close()


MESHES = (
    ("llama", {"tensor": 2}),
    ("llama", {"pipeline": 2}),
    ("llama", {"tensor": 2, "pipeline": 3}),
    ("qwen3-moe", {"tensor": 2, "expert": 2}),
    ("qwen3-moe", {"tensor": 4, "expert": 2}),
)


@pytest.mark.parametrize(("family", "mesh"), MESHES)
def test_ranks_of_a_group_say_the_same_in_the_same_order(directories, said, family, mesh):
    tensor, pipeline = mesh.get("tensor", 1), mesh.get("pipeline", 1)
    ranks = [steps_of(rank, directories[family], said, **mesh) for rank in range(tensor * pipeline)]
    hidden = load_architecture(directories[family]).hidden_size
    for number, batch in enumerate(BATCHES):
        tokens = sum(len(each.token_ids) for each in batch)
        rows = ((tokens, hidden), torch.float32)
        for stage in range(pipeline):
            first = stage * tensor
            together = [ranks[first + local][number] for local in range(tensor)]
            grouped = [
                [each for each in told if each[0] not in ("isend", "recv")] for told in together
            ]
            assert all(each == grouped[0] for each in grouped)
            members = tuple(range(first, first + tensor))
            assert all(each[1] == members for each in grouped[0])
            names = [name for name, _, _ in grouped[0]]
            samples = any(each.samples for each in batch)
            if tensor > 1:
                layers = LAYERS // pipeline
                embeds, gathers = stage == 0, stage == pipeline - 1 and samples
                assert names == ["all_reduce"] * (embeds + 2 * layers) + ["all_gather"] * gathers
            else:
                assert names == []
            for local, told in enumerate(together):
                # What is received comes before all else, and what is sent after it.
                spoken = [each for each in told if each[0] in ("isend", "recv")]
                expected = []
                if stage > 0:
                    expected.append(("recv", first + local - tensor, (rows,)))
                if stage < pipeline - 1:
                    expected.append(("isend", first + local + tensor, (rows,)))
                assert spoken == expected
                ends = told[: stage > 0] + told[len(told) - (stage < pipeline - 1) :]
                assert ends == spoken


def test_a_rank_that_differs_is_found(directories, said, monkeypatch):
    """One that leaves a collective out where it has nothing to add."""
    steps = []
    for rank in range(2):
        if rank == 1:
            monkeypatch.setattr(dist, "all_gather", lambda *arguments, **options: None)
        steps.append(steps_of(rank, directories["llama"], said, tensor=2))
    assert steps[0] != steps[1]
