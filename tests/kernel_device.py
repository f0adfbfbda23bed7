"""Where kernels run in tests: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from packaging.version import Version

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
