"""What the compiler makes of the kernels for an H100, without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_device  # noqa: F401  (skips where Triton is missing)
import pytest

MOST_REGISTERS = 255
"""Of a thread; what needs more goes through memory."""
MOST_STACK = 32
"""Bytes that are no loss: sine and cosine reduce large angles there."""


MOST_SHARED = 99 * 1024
"""Bytes that the smallest devices with compute capability 8 have for one program."""


def compiled(capability):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    made = subprocess.run(
        [sys.executable, "-W", "ignore", script, str(capability)],
        env=environment, capture_output=True, text=True, timeout=500, check=True,
    )  # fmt: skip
    return json.loads(made.stdout)


@pytest.fixture(scope="module")
def kernels():
    return compiled(90)


def assert_they_fit(kernels):
    for title, told in kernels.items():
        assert told["registers"] < MOST_REGISTERS, title
        assert told["stack"] <= MOST_STACK, title
        assert told["shared"] <= MOST_SHARED, title


def test_no_kernel_runs_out_of_registers(kernels):
    assert len(kernels) >= 25
    assert_they_fit(kernels)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_nor_on_other_devices(capability):
    """A100, L40S, B200, and what is sold for desks."""
    assert_they_fit(compiled(capability))


def test_kernels_load_sixteen_bytes_at_a_time(kernels):
    """Where they read much. Block ids, scales and norms of a head are few."""
    for title, share in (
        ("decode_attend", 0.5), ("prefill_attend", 0.5), ("8 bits_attend", 0.15), ("_norm", 0.9),
        ("_activate", 0.9), ("_draw", 0.8), ("scaled_norm", 0.9), ("scaled_activate", 0.9),
        ("scaled_scale", 0.9), ("scaled_merge", 0.3), ("scaled_multiply_groups", 0.3),
    ):  # fmt: skip
        assert kernels[title]["wide_loads"] >= share * kernels[title]["loads"], title
