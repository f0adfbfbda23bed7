"""`fastserve-mega plan`: the arithmetic, checked by hand and against real models."""

import json
import re
from pathlib import Path

import pytest
from msgspec.structs import replace
from tiny_models import MODELS, make_model

from fastserve_mega.cli import main
from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.system.config import Config, ModelConfig, ParallelConfig
from fastserve_mega.system.config_file import load_config
from fastserve_mega.system.deployment import plan_deployment
from fastserve_mega.system.hardware import GIB, HardwareConfig
from fastserve_mega.system.locate import find_architecture
from fastserve_mega.system.partition import partition_model
from fastserve_mega.system.sizes import parameter_count

CONFIGS = Path(__file__).parents[3] / "configs"


def plan_of(name, *overrides):
    path = CONFIGS / f"{name}.yaml"
    config = load_config(path, overrides)
    return plan_deployment(config, find_architecture(config, path)[0])


@pytest.mark.parametrize("family", MODELS)
def test_every_parameter_of_a_real_model_is_counted(family, tmp_path):
    model = make_model(family, tmp_path)
    architecture = load_architecture(tmp_path)
    missing = 0
    if family == "opt":  # two rows of its position table are never used
        missing = 2 * architecture.hidden_size
    real = sum(parameter.numel() for parameter in model.parameters())
    one = partition_model(architecture, ParallelConfig(), 0, 1)
    assert parameter_count(architecture, one) == real - missing


def test_8_bit_weights_take_half_of_16_bits_and_their_scales():
    plain = plan_of("opt-13b-a100")
    plan = plan_of("opt-13b-a100", "model.quantization=int8")
    assert plan.weight_bytes == pytest.approx(plain.weight_bytes * (1 + 4 / 64) / 2, rel=1e-6)
    assert plan.stages[0].weight_bytes == plan.weight_bytes


def test_opt_175b_is_the_system_of_the_paper():
    """Section 6.1 has sixteen A100-40G; 350 GB of weights, 4.72 MB of KV per token."""
    plan = plan_of("opt-175b-16xa100")
    assert plan.problems == ()
    assert plan.nodes == 2
    assert [list(stage.ranks[0]) for stage in plan.stages] == [[*range(8)], [*range(8, 16)]]
    assert plan.parameters == 96 * (12 * 12288**2 + 13 * 12288) + (50272 + 2048 + 2) * 12288
    assert plan.weight_bytes == pytest.approx(350e9, rel=0.01)
    assert plan.kv_bytes_per_token == 96 * 2 * 12288 * 2
    first, second = plan.stages
    assert first.kv_bytes_per_token == plan.kv_bytes_per_token // 16 == 288 * 1024
    assert first.parameters == pytest.approx(174.6e9 / 16, rel=0.01)
    assert second.weight_bytes < first.weight_bytes  # no position table
    # 36 of 40 GiB, less 20.4 of weights, 0.5 of context and 0.9 of activations.
    pool = 0.9 * 40 * GIB - first.weight_bytes - 0.5 * GIB - plan.activation_bytes
    assert plan.device_blocks == int(pool // (16 * 288 * 1024)) == 3221
    assert plan.host_blocks == 56 * GIB // (16 * 288 * 1024)
    assert plan.requests_of(2048, plan.device_blocks) == 3220 // 128


def test_opt_13b_has_the_pools_of_the_authors_prototype():
    """It was seen with 912 device blocks and 4587 host blocks."""
    plan = plan_of("opt-13b-a100")
    assert plan.device_blocks == pytest.approx(912, rel=0.05)
    assert plan.host_blocks == 4587
    assert plan.kv_bytes_per_token == 819_200


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "smollm2-135m-cpu")
)
def test_the_shipped_deployments_fit(name):
    plan = plan_of(name)
    assert plan.problems == ()
    assert plan.device_blocks
    assert plan.requests_of(plan.max_context, plan.device_blocks) >= 3


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("hardware.device_memory_gb=20", "no request can have the 2048"),
        ("kv_cache.device_blocks=9000", r"stage 0 needs 6\d\.\d GiB, its device has 40"),
        ("kv_cache.host_memory_gb=200", "host pools of a node take 1600 GiB, it has 1152"),
        ("hardware.devices_per_node=4", "parallel.tensor=8 ranks are on more than one node of 4"),
    ],
)
def test_what_does_not_fit_is_said(override, problem):
    problems = plan_of("opt-175b-16xa100", override).problems
    assert any(re.search(problem, each) for each in problems)


def test_replicas_are_numbered_one_after_another():
    plan = plan_of("llama-3-70b-4xh100", "parallel.data=2")
    assert [list(ranks) for ranks in plan.stages[0].ranks] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert plan.nodes == 1


def test_without_hardware_what_fits_is_left_open(tmp_path):
    make_model("llama", tmp_path)
    config = Config(model=ModelConfig(path=str(tmp_path)))
    plan = plan_deployment(config, load_architecture(tmp_path))
    assert plan.device_blocks is None
    known = replace(config, hardware=HardwareConfig(device_memory_gb=1.0))
    assert plan_deployment(known, load_architecture(tmp_path)).device_blocks


def test_the_command_prints_tables_and_json(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    path = str(CONFIGS / "opt-175b-16xa100.yaml")
    assert main(["plan", "--config", path]) == 0
    text = capsys.readouterr().out
    assert "174.60 billion parameters" in text
    assert "16 ranks on 2 nodes: 1 replica x 2 pipeline x 8 tensor" in text
    assert "3,221" in text
    assert main(["plan", "--config", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device_blocks"] == 3221
    assert main(["plan", "--config", path, "--set", "hardware.device_memory_gb=20"]) == 1
    assert "does not fit:" in capsys.readouterr().out


def test_a_model_that_is_nowhere_is_one_sentence(capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {path: /nowhere/model}\n")
    assert main(["plan", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "/nowhere/model" in error
