"""The one place that starts kernels, so that tests can count them, or run them elsewhere."""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start a kernel on the current device and stream.

    Args:
        kernel: made by triton.jit.
        grid: how many programs, in up to three dimensions.
        *arguments: tensors and numbers.
        **constants: what the kernel is compiled for, and Triton's options.
    """
    kernel[grid](*arguments, **constants)


def padded(size: int, least: int = 16) -> int:
    """The next power of 2, which the sizes of Triton's tiles have to be."""
    return max(1 << (size - 1).bit_length(), least)
