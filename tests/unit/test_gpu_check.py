import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools/gpu_check.sh"
ROWS = (
    "tests-kernels", "tests-device", "tokens of all engines are equal", "decode, graphs, batch 1 ",
    "decode, fp8, batch 3", "prefill", "swap_in", "step beside a copy", "users over HTTP",
    "start with weights in files",
)  # fmt: skip


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
    table = done.stdout.splitlines()[-40:]
    for row in ROWS:
        assert any(line.startswith(row) and "not measured" not in line for line in table), row
    assert any(line.startswith("decode, graphs, batch 256") for line in table)
    assert table[-1].startswith("card")
