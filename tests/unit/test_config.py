import dataclasses
import re
import typing
from pathlib import Path

import pytest

from fastserve_mega.config import Config, ModelConfig, SchedulerConfig
from fastserve_mega.config_file import load_config

REFERENCE = "configs/smollm2-135m-cpu.yaml"


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_the_reference_names_every_setting():
    """It explains all of them, so none may be missing."""
    text = Path(REFERENCE).read_text()
    pending = [Config]
    while pending:
        for name, kind in typing.get_type_hints(pending.pop()).items():
            assert f"{name}:" in text, f"{name} is not explained in {REFERENCE}"
            if dataclasses.is_dataclass(kind):
                pending.append(kind)


def test_overrides_are_yaml_and_reach_any_depth(tmp_path):
    path = write(tmp_path, "model: {path: /m}")
    config = load_config(path, ["scheduler.mlfq.levels=3", "kv_cache.device_blocks=null"])
    assert config.scheduler.mlfq.levels == 3
    assert config.kv_cache.device_blocks is None
    assert config.model == ModelConfig(path="/m")


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("model: {path: /m, colour: red}", None, "unknown field 'model.colour'; known fields are"),
        ("model: {}", None, "missing required field `path` - at `model`"),
        ("{}", None, "missing required field `model`"),
        ("- 1", None, "top level must be a mapping"),
        ("a: [", None, "not valid YAML"),
        ("model: {path: 3}", None, "Expected `str`, got `int` - at `model.path`"),
        ("model: {path: /m}", "scheduler.policy=lifo", "Invalid enum value 'lifo'"),
        ("model: {path: /m}", "scheduler.max_batch_size=0", "must be at least 1, got 0"),
        ("model: {path: /m}", "scheduler.max_batch_size=1.5", "Expected `int`, got `float`"),
        ("model: {path: /m}", "kv_cache.device_blocks=1", "block 0 is the null block"),
        ("model: {path: /m}", "scheduler.mlfq.quantum_ratio=1.0", "must exceed 1, got 1.0"),
        ("model: {path: /m}", "parallel.layers_per_stage=[1, 2]", "must name 1 stages"),
        ("model: {path: /m}", "parallel.expert=2", "must divide parallel.tensor=1, got 2"),
        ("model: {path: /m}", "parallel.expert=0", "must divide parallel.tensor=1, got 0"),
        ("model: {path: /m}", "model.layer_spec=te", "Invalid enum value 'te'"),
        ("model: {path: /m}", "nonsense", "the form section.field=value, got 'nonsense'"),
        ("model: {path: /m}", "model.path.x=1", "'path' is not a section"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tmp_path, text, override, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_config(path, [override] if override else [])
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_configuration_cannot_be_changed():
    config = SchedulerConfig()
    with pytest.raises(AttributeError):
        config.max_batch_size = 3


def test_all_deployment_configs_are_valid():
    for path in Path("configs").glob("*.yaml"):
        load_config(path)
