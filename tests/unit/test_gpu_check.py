import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/gpu_check.sh"
ROWS = ("tests-kernels", "tests-device", "start with", "graphs, batch 3", "8 blocks in", "card")


@pytest.mark.slow
def test_all_stages_run_on_a_machine_without_a_gpu(tmp_path):
    """With a tiny model: so that the minutes on a GPU are not spent on the script's mistakes."""
    pytest.importorskip("triton", reason="Triton is missing (pip install '.[test,kernels]')")
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(
        [SCRIPT, "--rehearse"], env=environment, capture_output=True, text=True, timeout=550,
        check=True,
    )  # fmt: skip
    assert "failed" not in done.stdout
    for row in ROWS:
        assert row in done.stdout
    assert done.stdout.splitlines()[-1].startswith("card")
