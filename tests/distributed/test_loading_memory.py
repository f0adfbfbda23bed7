"""Each of two ranks needs memory for its half of the weights and one tensor, and no more."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from measure_loading import convert_in_a_process, measure, write_random_llama

pytestmark = pytest.mark.distributed

MEGABYTE = 1e6
MARGIN = 30
"""Process groups, the layers' Python objects, buffers: a third of them without any weights."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("random-llama")
    write_random_llama(directory, 120_000_000, "bfloat16")
    return directory


@pytest.mark.parametrize("output_format", ["huggingface", "torch_dist"])
def test_a_rank_needs_memory_for_its_share_only(model, tmp_path, output_format):
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / MEGABYTE
    assert size > 80
    largest = 2 * 4096 * 1024 * 2 / MEGABYTE  # gate and up projection of a layer
    directory = model
    if output_format == "torch_dist":
        directory = convert_in_a_process(model, tmp_path / "megatron")
    for rank in measure(directory, "bfloat16", 2):
        assert rank["growth"] < size / 2 + largest + MARGIN
        assert rank["anonymous"] > size / 2  # else this measured nothing
