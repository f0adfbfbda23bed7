"""What host and device have to do with each other's pace."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host, in the order of the device's work.

    From page-locked memory: a copy from pageable memory waits until the device has come to it.
    torch's allocator gives page-locked memory to others only when the copy is done.
    """
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def copy_to_device(host: Tensor, target: Tensor) -> None:
    """Copy into a tensor of the device that is there already."""
    if target.device.type == "cuda":
        host = host.pin_memory()
    target.copy_(host, non_blocking=True)


class Returning:
    """A tensor of the device on its way to the host, which goes on meanwhile.

    Args:
        tensor: may be overwritten by what the device is given later.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type != "cuda":
            self._host = tensor.clone()
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch
        self._event.record()

    def wait(self) -> Tensor:
        """Wait until it is here, but not for what the device was given later."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class Stopwatch:
    """How long a CUDA device takes for what it is given from now on until `stop`.

    By its own clock, and without what it was given before or after. Other devices have none: 0.

    Args:
        device: whose current stream it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._ended = self._mark()

    def stop(self) -> None:
        self._ended = self._mark()

    def seconds(self) -> float:
        """Wait until the device has come to where the watch was stopped, and tell."""
        if self._began is None or self._ended is None:
            return 0.0
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended)) / 1000

    def _mark(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call] # torch
        event.record()
        return event


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given so far; a CPU has."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
