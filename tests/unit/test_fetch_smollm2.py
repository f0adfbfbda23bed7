"""The parts of the model tool that can be checked without its download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

TOOL = Path(__file__).parents[2] / "tools" / "fetch_smollm2.py"


@pytest.fixture(scope="module")
def tool():
    import sys

    spec = importlib.util.spec_from_file_location("fetch_smollm2", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fetch_smollm2"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fetch_smollm2"]


def test_bfloat16_is_rounded_as_torch_rounds_and_read_back_whole(tool, tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    values[0, :3] = [1.00390625, 1.01171875, -0.0]  # two ties, one to each side
    path = tmp_path / "model.safetensors"
    vector = np.arange(7, dtype=np.float32)
    tool.write_safetensors(
        path,
        [tool.Tensor("a", (3, 5), tool.to_bfloat16(values)),
         tool.Tensor("b", (7,), tool.to_bfloat16(vector))],
    )  # fmt: skip
    loaded = load_file(path)
    assert torch.equal(loaded["a"], torch.from_numpy(values).to(torch.bfloat16))
    assert torch.equal(loaded["b"], torch.from_numpy(vector).to(torch.bfloat16))


def test_rope_permutation_is_undone(tool):
    heads, head_dim, columns = 3, 8, 5
    weight = np.arange(heads * head_dim * columns, dtype=np.float32).reshape(-1, columns)
    # What the conversion to GGUF does to the rows of each head.
    halves = weight.reshape(heads, 2, head_dim // 2, columns)
    permuted = halves.swapaxes(1, 2).reshape(-1, columns)
    assert not np.array_equal(permuted, weight)
    assert np.array_equal(tool.undo_rope_permutation(permuted, heads), weight)


def test_a_complete_directory_is_left_alone(tool, tmp_path, monkeypatch, capsys):
    for name in tool.FILES:
        (tmp_path / name).touch()
    monkeypatch.setattr("sys.argv", ["fetch_smollm2.py", "--directory", str(tmp_path)])
    monkeypatch.setattr(tool, "fetch", lambda directory: pytest.fail(f"fetched into {directory}"))
    tool.main()
    assert capsys.readouterr().out.strip() == str(tmp_path)


def test_a_failed_conversion_leaves_no_trace(tool, tmp_path, monkeypatch):
    def fail(gguf_path, directory):
        (directory / "config.json").touch()
        raise OSError("disk full")

    monkeypatch.setattr(tool, "find_gguf", lambda scratch: scratch / "none.gguf")
    monkeypatch.setattr(tool, "write_model", fail)
    with pytest.raises(OSError, match="disk full"):
        tool.fetch(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
