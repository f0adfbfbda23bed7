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
    """The same into a tensor that is there already."""
    if target.device.type == "cuda":
        host = host.pin_memory()
    target.copy_(host, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given so far; a CPU has."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
