"""What is sent at random harms nobody: `tests/system/fuzz.py`, in small."""

from __future__ import annotations

import asyncio
import sys

import pytest
from system.fuzz import fuzz

from fastserve_mega.drill.drill import serving
from fastserve_mega.system.config_file import load_config

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc and prctl are Linux's"),
]


@pytest.mark.parametrize("count", [100, pytest.param(20_000, marks=pytest.mark.slow)])
def test_nonsense_harms_no_other_stream(count, model_directory, tmp_path, capfd):
    path = tmp_path / "config.yaml"
    path.write_text(f"model: {{path: {model_directory}}}\nkv_cache: {{device_blocks: 2000}}\n")
    with serving(load_config(str(path)), ["--config", str(path)], "fake") as served:
        assert asyncio.run(fuzz(served.url, served.endpoint, count, count, seed=count))
    printed = capfd.readouterr().out
    assert "'400':" in printed
    assert "'Refused':" in printed
