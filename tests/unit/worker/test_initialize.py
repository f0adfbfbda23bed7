"""Devices and process groups, with stand-ins for CUDA and NCCL."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fastserve_mega.system.config import ParallelConfig
from fastserve_mega.worker.megatron import initialize
from fastserve_mega.worker.megatron.initialize import (
    connect_stages,
    join_process_groups,
    lost_connection,
    name_of_device,
    plain_errors,
    select_device,
)
from fastserve_mega.worker.topology import Topology

LAST_OF_TWO = Topology(rank=1, world_size=2, local_rank=1, local_size=2)


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many CUDA devices this process sees; the numbers of those it selects."""
    selected = []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: selected.append(device.index))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", selected.append)

    def see(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        return selected

    return see


def test_a_rank_takes_the_device_of_its_number_and_no_attention_of_cudnn(gpus):
    selected = gpus(2)
    assert select_device(ParallelConfig(), LAST_OF_TWO) == torch.device("cuda", 1)
    assert selected == [1, False]


def test_a_launcher_may_show_each_rank_its_own_device(gpus, monkeypatch):
    gpus(1)
    with pytest.raises(ValueError, match="2 ranks on this machine, but only 1 CUDA devices"):
        select_device(ParallelConfig(), LAST_OF_TWO)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5b")
    assert select_device(ParallelConfig(), LAST_OF_TWO) == torch.device("cuda", 0)


def test_the_name_of_a_device_tells_ranks_that_share_one(gpus, monkeypatch):
    assert name_of_device(ParallelConfig(device="cpu"), LAST_OF_TWO) == ""
    gpus(1)
    first_of_two = dataclasses.replace(LAST_OF_TWO, rank=0, local_rank=0)

    def name(topology, shown, uuid):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        device = SimpleNamespace(uuid=uuid)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
        return name_of_device(ParallelConfig(), topology)

    shared = name(first_of_two, "0", "5b")
    assert shared == "cuda:0 of CUDA_VISIBLE_DEVICES=0, GPU-5b"
    assert name(LAST_OF_TWO, "0", "5b") == shared  # as under `serve`
    assert name(LAST_OF_TWO, "0", "6c") != shared  # as with srun --gpus-per-task
    assert name(LAST_OF_TWO, "MIG-7d", "5b") != shared  # slices of one device


def test_every_group_has_the_timeout_and_none_is_split_from_the_world(monkeypatch):
    opened, groups = [], []
    monkeypatch.setattr(dist, "TCPStore", lambda *args, **options: "store")
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **o: opened.append((backend, o))
    )
    monkeypatch.setattr(dist, "new_group", lambda ranks, **o: groups.append((ranks, o)))
    parallel = ParallelConfig(tensor=4, expert=2, timeout_s=7.0)
    four = Topology(rank=2, world_size=4, local_rank=2, local_size=4)
    join_process_groups(parallel, four, torch.device("cuda", 2), "host", 1)
    ((backend, options),) = opened
    assert backend == "nccl"
    assert "device_id" not in options
    assert {o["timeout"].total_seconds() for _, o in [*opened, *groups]} == {7.0}
    assert [(ranks, o["backend"]) for ranks, o in groups] == [
        ([2], "gloo"), ([0, 1, 2, 3], None), ([2, 3], None), ([0, 2], None),
    ]  # fmt: skip


def test_stages_meet_before_the_first_step(monkeypatch):
    """Each receives before it sends, so that no two wait for each other."""
    spoken = []
    monkeypatch.setattr(initialize.dist, "recv", lambda token, src: spoken.append(("from", src)))
    monkeypatch.setattr(initialize.dist, "send", lambda token, dst: spoken.append(("to", dst)))
    for rank in (1, 3, 5):
        topology = Topology(rank=rank, world_size=6, local_rank=rank, local_size=6)
        connect_stages(topology, 2, torch.device("cpu"))
    assert spoken == [("to", 3), ("from", 1), ("to", 5), ("from", 3)]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer "
            "[127.0.1.1]:55176",
            "Connection closed by peer [127.0.1.1]:55176",
        ),
        (
            "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process "
            "exited or there was a network error, NCCL version 2.21.5\n"
            "ncclRemoteError: A call failed possibly due to a network error or a remote process "
            "exiting prematurely.\nLast error:\nsocketProgress: Connection closed by remote peer",
            "socketProgress: Connection closed by remote peer",
        ),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:3690, invalid usage, NCCL version 2.27.5\n"
            "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
            "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
        ),
        (
            "NCCL error in: NCCLUtils.hpp:268, unhandled system error, NCCL version 2.21.5\n"
            "ncclSystemError: System call (e.g. socket, malloc) failed.",
            "ncclSystemError: System call (e.g. socket, malloc) failed.",
        ),
        ("[Rank 1] NCCL communicator was aborted.", "NCCL communicator was aborted."),
    ],
)
def test_a_lost_rank_is_named_in_a_sentence(message, reason):
    assert lost_connection(RuntimeError(message)) == reason
    assert lost_connection(RuntimeError("CUDA error: out of memory")) is None


def test_a_device_without_memory_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**29, 80 * 2**30))
    expected = "cuda:1 is out of memory, 0.50 of 80.00 GiB are free: lower kv_cache.device_memory"
    with pytest.raises(MemoryError, match=expected), plain_errors(torch.device("cuda", 1)):
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("[x.cpp:1]: can't allocate memory: you tried to allocate 64 bytes."),
         r"\(allocate 64 bytes\): lower kv_cache.device_memory_gb"),
        (MemoryError("buffers of the native step"), r"\(buffers of the native step\): lower"),
        (MemoryError(), r"\(Python's\): lower"),
    ],
)  # fmt: skip
def test_a_host_without_memory_is_told_in_a_sentence(error, told):
    with pytest.raises(MemoryError, match=told), plain_errors(torch.device("cpu")):
        raise error


def test_a_lost_connection_is_told_in_a_sentence():
    expected = "another rank is out of reach: NCCL communicator was aborted"
    with pytest.raises(ConnectionError, match=expected), plain_errors(torch.device("cpu")):
        raise RuntimeError("[Rank 1] NCCL communicator was aborted.")
    with pytest.raises(RuntimeError, match="another"), plain_errors(torch.device("cpu")):
        raise RuntimeError("another")
