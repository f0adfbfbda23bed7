"""Device, threads and process groups of a rank."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from fastserve_mega.system.config import ModelConfig, ParallelConfig
from fastserve_mega.worker.network import listen_at
from fastserve_mega.worker.topology import Topology

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_BFLOAT16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}
"""In /proc/cpuinfo: x86 with AVX-512, x86 with AMX, Arm."""
_VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
_NO_MEMORY, _WANTED_BYTES = "can't allocate memory", re.compile("allocate [0-9]+ bytes")
"""In what torch says of memory of the host, for which it has no exception."""
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_REUSED_BYTES = 2**25
"""Buffers up to this size are reused; the largest value that every glibc accepts."""
_KEPT_BYTES = 2**30
"""Freed memory that the process keeps."""
_RETURNED_BYTES = 2**18
"""Buffers from this size on go back to the kernel when they are freed while weights are loaded."""


def select_device(parallel: ParallelConfig, topology: Topology) -> torch.device:
    """The device of this rank, made the current one.

    On a GPU machine that is the one numbered like the rank on its host, or the only one where the
    launcher shows each rank its own (srun --gpus-per-task, Kubernetes).

    Raises:
        ValueError: CUDA was asked for and is not there, or there are too few GPUs.
    """
    available = torch.cuda.is_available()
    if parallel.device == "cpu" or (parallel.device == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ValueError("parallel.device=cuda, but torch finds no CUDA device")
    count, number = torch.cuda.device_count(), topology.local_rank
    if count == 1 and _VISIBLE_DEVICES in os.environ:
        number = 0
    if number >= count:
        raise ValueError(
            f"{topology.local_size} ranks on this machine, but only {count} CUDA devices"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    # cuDNN makes a plan for each shape it has not seen, 0.1 to 0.4 s, and here they all differ.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def name_of_device(parallel: ParallelConfig, topology: Topology) -> str:
    """What `select_device` selects: ranks of a host with the same name share it; empty for a CPU.

    What a rank is shown is a part of it, as slices of a device may have its identity.
    """
    device = select_device(parallel, topology)
    if device.type != "cuda":
        return ""
    shown = f"{_VISIBLE_DEVICES}={os.environ.get(_VISIBLE_DEVICES, '')}"
    return f"{device} of {shown}, GPU-{torch.cuda.get_device_properties(device).uuid}"


def select_dtype(model: ModelConfig, device: torch.device) -> torch.dtype:
    """The precision of weights, activations and KV cache."""
    if model.dtype != "auto":
        return _DTYPES[model.dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _cpu_computes_bfloat16() else torch.float32


def _cpu_computes_bfloat16() -> bool:
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not _BFLOAT16_FEATURES.isdisjoint(words)


def set_up_cpu(parallel: ParallelConfig, topology: Topology) -> None:
    """Give each rank its share of the cores, and return memory that is freed to the kernel.

    More threads than cores make the ranks wait for each other inside every operation (decoding
    was measured 16 times slower), so the number is never left to chance.
    """
    cores = len(os.sched_getaffinity(0))
    threads = parallel.threads_per_rank or max(1, cores // topology.local_size)
    torch.set_num_threads(threads)
    # Packing a weight frees the plain one; on the heap, the holes would stay resident.
    _mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)


def keep_freed_memory() -> None:
    """Let glibc reuse large buffers instead of returning them to the kernel.

    Once the weights are loaded. Otherwise each temporary above 128 KiB is mapped and its pages
    faulted in anew; that was nine tenths of the time of a norm over 512 tokens.
    """
    _mallopt(_M_MMAP_THRESHOLD, _REUSED_BYTES)
    _mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _mallopt(option: int, value: int) -> None:
    """Set an option of glibc's malloc; other C libraries have none."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)


@dataclass(frozen=True, slots=True)
class ProcessGroups:
    """The groups that a rank belongs to."""

    tensor: dist.ProcessGroup
    """The ranks that share this rank's layers."""
    megatron: ProcessGroupCollection


def join_process_groups(
    parallel: ParallelConfig,
    topology: Topology,
    device: torch.device,
    master_address: str,
    master_port: int,
) -> ProcessGroups:
    """Meet the other ranks; blocks until all have come or `parallel.timeout_s` has passed."""
    timeout = timedelta(seconds=parallel.timeout_s)
    store: Any
    if topology.world_size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined] # no port
    else:
        is_master = topology.rank == 0
        store = dist.TCPStore(  # type: ignore[attr-defined] # public, but not exported
            master_address,
            master_port,
            topology.world_size,
            is_master=is_master,
            timeout=timeout,
            master_listen_fd=listen_at(master_address, master_port) if is_master else None,
        )
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=topology.rank,
        world_size=topology.world_size,
        timeout=timeout,
        # No device_id: with it NCCL makes new groups by splitting this one, which all of its ranks
        # would have to take part in.
    )
    alone = _new_group([topology.rank], timeout)
    tensor = alone
    if parallel.tensor > 1:
        first = topology.rank - topology.rank % parallel.tensor
        tensor = _new_group(list(range(first, first + parallel.tensor)), timeout)
    return ProcessGroups(
        tensor=tensor,
        megatron=_collect(parallel, topology.rank, tensor=tensor, alone=alone, timeout=timeout),
    )


def connect_stages(topology: Topology, tensor_size: int, device: torch.device) -> None:
    """Send something along the pipeline, so that the first step need not connect the stages.

    NCCL connects two ranks when they first speak to each other, which takes seconds.
    """
    token = torch.zeros(1, device=device)
    if topology.rank >= tensor_size:
        dist.recv(token, src=topology.rank - tensor_size)
    if topology.rank + tensor_size < topology.world_size:
        dist.send(token, dst=topology.rank + tensor_size)


def _new_group(ranks: list[int], timeout: timedelta) -> dist.ProcessGroup:
    """Only its members take part in creating it. A rank alone needs no NCCL."""
    backend = "gloo" if len(ranks) == 1 else None
    group: dist.ProcessGroup = dist.new_group(
        ranks, timeout=timeout, backend=backend, use_local_synchronization=True
    )
    return group


def _collect(
    parallel: ParallelConfig,
    rank: int,
    *,
    tensor: dist.ProcessGroup,
    alone: dist.ProcessGroup,
    timeout: timedelta,
) -> ProcessGroupCollection:
    """Megatron's view: each stage is to it a model of its own, so all else is this rank alone.

    Except that the tensor ranks of the stage are also those that divide its experts.
    """
    groups = ProcessGroupCollection()
    groups.tp = groups.tp_ep = groups.tp_cp = groups.tp_dp_cp = tensor
    for name in ("pp", "cp", "dp", "expt_dp"):
        setattr(groups, name, alone)
    groups.embd = None
    groups.ep, groups.expt_tp = _expert_groups(parallel, rank, tensor, alone, timeout)
    return groups


def _expert_groups(
    parallel: ParallelConfig,
    rank: int,
    tensor: dist.ProcessGroup,
    alone: dist.ProcessGroup,
    timeout: timedelta,
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks with the other experts, and the ranks with the other columns of these experts.

    The order is that of Partition: ranks that share an expert are neighbours.
    """
    if parallel.expert == 1:
        return alone, tensor
    if parallel.expert == parallel.tensor:
        return tensor, alone
    sharing = parallel.tensor // parallel.expert
    first = rank - rank % parallel.tensor
    neighbours = range(rank - rank % sharing, rank - rank % sharing + sharing)
    others = range(first + rank % sharing, first + parallel.tensor, sharing)
    sharing_group = _new_group(list(neighbours), timeout)
    return _new_group(list(others), timeout), sharing_group


@contextmanager
def left_on_error() -> Iterator[None]:
    """Leave the process groups if it fails; else this process could not try again."""
    try:
        yield
    except BaseException:
        dist.destroy_process_group()
        raise


@contextmanager
def plain_errors(device: torch.device) -> Iterator[None]:
    """Say in one sentence what of torch's errors is nothing of ours.

    Raises:
        ConnectionError: another rank does not take part.
        MemoryError: the device or the host has too little memory.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        free, total = torch.cuda.mem_get_info(device)
        raise MemoryError(
            f"{device} is out of memory, {free / 2**30:.2f} of {total / 2**30:.2f} GiB are free: "
            "lower kv_cache.device_memory_utilization (or device_blocks, device_memory_gb) or "
            "scheduler.max_batch_tokens, or use more ranks"
        ) from None
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or _NO_MEMORY in str(error):
            asked = _WANTED_BYTES.search(str(error))
            what = asked[0] if asked else str(error) or "Python's"
            raise MemoryError(
                f"the host gives this rank no more memory ({what}): lower "
                "kv_cache.device_memory_gb (or device_blocks), host_memory_gb or "
                "scheduler.max_batch_tokens, or raise its limit (ulimit -v, that of its container)"
            ) from None
        if (reason := lost_connection(error)) is None:
            raise
        raise ConnectionError(f"another rank is out of reach: {reason}") from None


def lost_connection(error: RuntimeError) -> str | None:
    """What gloo or NCCL says of a rank that is lost; None when the error is another one.

    That is the line of its message that says what happened, without its place in a file.
    """
    text = str(error)
    names = ("gloo", "NCCL", "ncclRemoteError")
    if not isinstance(error, dist.DistError) and not any(name in text for name in names):
        return None
    lines = text.splitlines() or [type(error).__name__]
    named = (line for line in lines if line.startswith("nccl") and ": " in line)
    # What NCCL says behind its general words is the cause, such as ranks that share a device.
    cause = lines[lines.index("Last error:") + 1 :] if "Last error:" in lines else []
    return next(iter(cause), next(named, lines[0])).rpartition("] ")[2]
