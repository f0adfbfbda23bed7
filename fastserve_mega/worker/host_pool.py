"""The KV pool of one rank in host memory, and the copies between it and the device's."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastserve_mega.plan import BlockCopy, CopyDirection
from fastserve_mega.worker.copy_engine import CopyEngine
from fastserve_mega.worker.transfer import to_device

_STAGING_BYTES = 2**26
"""Device memory through which blocks are gathered and scattered; a few milliseconds of PCIe."""
_LARGE_BLOCK_BYTES = 2**19
"""Blocks of this size saturate PCIe one by one, and need no staging."""
_PAGE_BYTES = 2**12
_TOUCHED_BYTES = 2**28
"""Memory that a thread takes from the system at a time."""


class HostPool:
    """Room for the blocks of preempted requests: [blocks, *shape of a block].

    Page-locked when the device pool is on CUDA, which copies without page-locking would halve in
    speed and make wait for the CPU. The memory of a plain pool is taken page by page as it is
    first used.

    Args:
        num_blocks: block 0, the null block, included; 0 makes an empty pool.
        device_pool: of the same rank, [device blocks, *shape of a block].

    Raises:
        ValueError: the system does not page-lock that much memory.
    """

    def __init__(self, num_blocks: int, device_pool: Tensor) -> None:
        shape = (num_blocks, *device_pool.shape[1:])
        self.pool = torch.empty(shape, dtype=device_pool.dtype)
        self._is_locked = device_pool.device.type == "cuda" and self.pool.nbytes > 0
        if self._is_locked:
            # Page-locking would take the pages in one thread, up to a second for each GiB.
            touch_pages(self.pool)
            # Not torch's pinned allocator: that rounds a pool of 65 GiB up to 128 GiB.
            _check_cuda(
                _cudart().cudaHostRegister(self.pool.data_ptr(), self.pool.nbytes, 0),
                f"cannot page-lock {self.pool.nbytes / 2**30:.2f} GiB for the host pool "
                "(kv_cache.host_blocks, kv_cache.host_memory_gb)",
            )

    @property
    def num_blocks(self) -> int:
        return self.pool.shape[0]

    def close(self) -> None:
        """Unlock the memory; no copy may be under way."""
        if self._is_locked:
            status = _cudart().cudaHostUnregister(self.pool.data_ptr())
            self._is_locked = False
            _check_cuda(status, "cannot unlock the host pool")


def touch_pages(pool: Tensor) -> None:
    """Take the memory of a pool from the system, in as many threads as there are cores."""
    everything = pool.view(-1).view(torch.uint8).numpy()

    def touch(first: int) -> None:
        # NumPy gives back the GIL meanwhile.
        everything[first : first + _TOUCHED_BYTES : _PAGE_BYTES] = 0

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for _ in threads.map(touch, range(0, everything.size, _TOUCHED_BYTES)):
            pass


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call] # torch


def _event(**options: bool) -> torch.cuda.Event:
    return torch.cuda.Event(**options)  # type: ignore[no-untyped-call] # torch


def _check_cuda(status: Any, message: str) -> None:
    if int(status) != 0:
        raise ValueError(f"{message}: {status}")


def open_copy_engine(device_pool: Tensor, host: HostPool, timeout_s: float) -> CopyEngine:
    """What copies between these two pools, by the kind of the device."""
    if device_pool.device.type == "cuda":
        return CudaCopyEngine(device_pool, host.pool, timeout_s)
    return CpuCopyEngine(device_pool, host.pool, timeout_s)


class CpuCopyEngine(CopyEngine):
    """Copies in the thread, with no help of torch's own threads.

    Those would make a second team beside that of the computation and take its cores.
    """

    def __init__(self, device_pool: Tensor, host_pool: Tensor, timeout_s: float) -> None:
        super().__init__(self._copy, timeout_s)
        self._device = _as_bytes(device_pool)
        self._host = _as_bytes(host_pool)

    def _copy(self, copy: BlockCopy) -> None:
        source, target = self._device, self._host
        if copy.direction is CopyDirection.SWAP_IN:
            source, target = target, source
        for first_source, first_target, count in _runs(copy):
            # NumPy gives back the GIL while it copies a slice.
            target[first_target : first_target + count] = source[
                first_source : first_source + count
            ]


class CudaCopyEngine(CopyEngine):
    """Issues copies on a stream of their own; the thread only waits for their events.

    Large blocks are copied as they are. Small ones are gathered into a staging buffer on the
    device (or scattered from it), so that each run of neighbouring host blocks is one large
    transfer, whatever the device's blocks are.
    """

    def __init__(self, device_pool: Tensor, host_pool: Tensor, timeout_s: float) -> None:
        super().__init__(self._await_event, timeout_s)
        self._device_pool = device_pool
        self._host_pool = host_pool
        self._device = device_pool.device
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call] # torch
        self._begun: dict[int, torch.cuda.Event] = {}
        self._events: dict[int, torch.cuda.Event] = {}
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        block_bytes = max(host_pool[:1].nbytes, 1)
        self._needs_staging = block_bytes < _LARGE_BLOCK_BYTES
        self._staging_blocks = max(_STAGING_BYTES // block_bytes, 1)

    def start(self, copies: Sequence[BlockCopy]) -> None:
        """Issue the copies behind all computation issued so far, which wrote what they read."""
        if not copies:
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for copy in copies:
                # A copy takes no longer because a step is computed before it.
                begun = self._begun[copy.copy_id] = _event(enable_timing=True)
                begun.record(self._stream)
                self._issue(copy)
                # Recorded after the copy; blocking, so that who waits for it does not spin.
                event = _event(blocking=True, enable_timing=True)
                event.record(self._stream)
                self._events[copy.copy_id] = event
        super().start(copies)

    def wait(self, copy_ids: Collection[int]) -> None:
        """Hold back computation issued from here on, not the caller."""
        # Who is no longer listed has ended.
        events = [event for copy_id in copy_ids if (event := self._events.get(copy_id))]
        if not events:
            return
        compute = torch.cuda.current_stream(self._device)
        before, after = (_event(enable_timing=True) for _ in range(2))
        before.record(compute)
        for event in events:
            compute.wait_event(event)
        after.record(compute)
        self._measure_waits()
        self._waits.append((before, after))

    def take_wait_s(self) -> float:
        """As on the CPU; waits until the device has come past the last `wait`."""
        if self._waits:
            self._waits[-1][1].synchronize()
        self._measure_waits()
        return super().take_wait_s()

    def _measure_waits(self) -> None:
        while self._waits and self._waits[0][1].query():  # type: ignore[no-untyped-call] # torch
            before, after = self._waits.popleft()
            self._wait_s += before.elapsed_time(after) / 1000

    def _await_event(self, copy: BlockCopy) -> float:
        # In the thread, whose device is the first one until it is told.
        torch.cuda.set_device(self._device)
        event = self._events[copy.copy_id]
        event.synchronize()
        del self._events[copy.copy_id]
        taken_ms: float = self._begun.pop(copy.copy_id).elapsed_time(event)
        return taken_ms / 1000

    def _issue(self, copy: BlockCopy) -> None:
        if self._needs_staging:
            self._issue_staged(copy)
            return
        source, target = self._device_pool, self._host_pool
        if copy.direction is CopyDirection.SWAP_IN:
            source, target = target, source
        for first_source, first_target, count in _runs(copy):
            blocks = source[first_source : first_source + count]
            target[first_target : first_target + count].copy_(blocks, non_blocking=True)

    def _issue_staged(self, copy: BlockCopy) -> None:
        swap_out = copy.direction is CopyDirection.SWAP_OUT
        pairs = zip(copy.source_ids, copy.target_ids, strict=True)
        by_host = sorted((there, here) if swap_out else (here, there) for here, there in pairs)
        for first in range(0, len(by_host), self._staging_blocks):
            part = by_host[first : first + self._staging_blocks]
            host_ids, device_ids = zip(*part, strict=True)
            index = to_device(torch.tensor(device_ids), self._device)
            if swap_out:
                staging = self._device_pool.index_select(0, index)
            else:
                staging = torch.empty(
                    (len(part), *self._device_pool.shape[1:]),
                    dtype=self._device_pool.dtype,
                    device=self._device,
                )
            for offset, host, count in _neighbours(list(enumerate(host_ids))):
                in_staging = staging[offset : offset + count]
                in_host = self._host_pool[host : host + count]
                if swap_out:
                    in_host.copy_(in_staging, non_blocking=True)
                else:
                    in_staging.copy_(in_host, non_blocking=True)
            if not swap_out:
                self._device_pool.index_copy_(0, index, staging)


def _as_bytes(pool: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The memory of a pool, [blocks, bytes of a block]."""
    width = pool.shape[1:].numel()
    view: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
    view = pool.view(pool.shape[0], width).view(torch.uint8).numpy()
    return view


def _runs(copy: BlockCopy) -> Iterator[tuple[int, int, int]]:
    """(first source, first target, count): the copy in as few pieces as can be."""
    return _neighbours(sorted(zip(copy.source_ids, copy.target_ids, strict=True)))


def _neighbours(pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Sorted pairs, joined where both of a pair follow those of the one before."""
    first = 0
    for index in range(1, len(pairs) + 1):
        source, target = pairs[first]
        count = index - first
        if index == len(pairs) or pairs[index] != (source + count, target + count):
            yield source, target, count
            first = index
