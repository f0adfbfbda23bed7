"""Where kernels run in tests: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from packaging.version import Version

from fastserve_mega.worker.float8 import quantize_rows

triton = pytest.importorskip("triton", reason="Triton is missing: pip install '.[test,kernels]'")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_IS_OLD = Version(triton.__version__) < Version("3.9")
if IS_INTERPRETED and _IS_OLD and Version(np.__version__) >= Version("2.4"):
    pytest.skip(
        f"the interpreter of Triton {triton.__version__} fails with NumPy {np.__version__}: "
        "pip install '.[test,kernels]'",
        allow_module_level=True,
    )

DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")


def assert_scaled(rows, expected):
    """As torch scales; a device divides with an error that may round to a neighbour."""
    scaled = quantize_rows(expected)
    assert (rows.values.dtype, rows.dtype) == (torch.float8_e4m3fn, expected.dtype)
    torch.testing.assert_close(rows.scales, scaled.scales)
    steps = (rows.values.view(torch.uint8).int() - scaled.values.view(torch.uint8).int()).abs()
    assert steps.max() <= 1
    assert (steps == 0).float().mean() > 0.98
