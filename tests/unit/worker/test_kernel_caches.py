"""oneDNN keeps generated kernels by shape; a server sees new shapes for ever."""

import subprocess
import sys

import pytest

PRODUCTS = """
import fastserve_mega.worker.megatron
import torch
from pathlib import Path

def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

def multiply(rows):
    for n in rows:
        a = torch.ones(3, n, 64, dtype=torch.bfloat16)
        torch.bmm(a, a.transpose(1, 2))

multiply(range(1, 200))
before = resident_pages()
multiply(range(200, 600))
print((resident_pages() - before) * 4096 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_new_shapes_do_not_take_new_memory_for_ever():
    command = [sys.executable, "-W", "ignore", "-c", PRODUCTS]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
    # 31 MiB; with oneDNN's own limits 272 MiB, on a CPU that computes in bfloat16.
    assert float(result.stdout) < 100
