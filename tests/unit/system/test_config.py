import re
import typing
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from fastserve_mega.system.config import Config, ModelConfig, SchedulerConfig
from fastserve_mega.system.config_file import load_config, load_yaml

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
            if msgspec.inspect.is_struct_type(kind):
                pending.append(kind)


def test_overrides_are_yaml_and_reach_any_depth(tmp_path):
    path = write(tmp_path, "model: {path: /m}")
    config = load_config(path, ["scheduler.mlfq.levels=3", "kv_cache.device_blocks=null"])
    assert config.scheduler.mlfq.levels == 3
    assert (
        load_config(path, ["coordinator.drain_timeout_s=1e-3"]).coordinator.drain_timeout_s == 1e-3
    )
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
        ("model: {path: /m}", "scheduler.policy=lifo", "srpt, or a class of your own as"),
        ("model: {path: /m}", "scheduler.max_batch_size=0", "must be at least 1, got 0"),
        ("model: {path: /m}", "scheduler.max_batch_size=1.5", "Expected `int`, got `float`"),
        ("model: {path: /m}", "kv_cache.device_blocks=1", "block 0 is the null block"),
        (
            "model: {path: /m}",
            "scheduler.mlfq.quantum_ratio=1.0",
            "quantum_ratio must be above 1, got 1.0",
        ),
        ("model: {path: /m}", "parallel.layers_per_stage=[1, 2]", "must name 1 stages"),
        ("model: {path: /m}", "parallel.expert=2", "must divide parallel.tensor=1, got 2"),
        ("model: {path: /m}", "parallel.expert=0", "parallel.expert must be at least 1, got 0"),
        ("model: {path: /m}", "parallel.layers_per_stage=[0]", "layers_per_stage[0] must be at"),
        ("model: {path: /m}", "server.port=65536", "must be at least 0 and at most 65535, got"),
        ("model: {path: ''}", None, "model.path must not be empty, got ''"),
        (
            "model: {path: /m, 3: 4}",
            None,
            "unknown field 'model.3'; known fields are path, served_name",
        ),
        ("model: {path: /m}", "scheduler=3", "Expected `object`, got `int` - at `scheduler`"),
        ("model: {path: /m}", "model.layer_spec=te", "local, transformer_engine, got 'te'"),
        ("model: {path: /m}", "model.dtype=null", "float16, got null"),
        ("model: {path: /m}", "model.dtype=16", "auto, float32, bfloat16, float16, got 16"),
        (
            "model: {path: /m}",
            "hardware.network={name: x, bandwidth: -1, latency_s: 0}",
            "hardware.network.bandwidth must be above 0, got -1",
        ),
        (
            "model: {path: /m}",
            "hardware.network={name: x, speed: 1}",
            "unknown field 'hardware.network.speed'; known fields are name, bandwidth, latency_s",
        ),
        ("model: {path: /m}", "nonsense", "nonsense: an override has the form section.field=value"),
        ("model: {path: /m}", "scheduler.policy=[", "not valid YAML"),
        ("model: {path: /m}", "model.path.x=1", "'path' is not a section"),
        (
            "model: {path: /m}\nserver: {}\nmodel: {path: /n}",
            None,
            "'model' is there a second time",
        ),
        ("model: {path: /m, path: /n}", None, "'path' is there a second time in line 1"),
        ("model: {path: /m}", "server={port: 1, port: 2}", "'port' is there a second time"),
        (
            "model: {path: /m}\nkv_cache: {host_memory_gb: .inf}",
            None,
            "kv_cache.host_memory_gb must be a finite number, got inf",
        ),
        (
            "model: {path: /m}",
            "supervisor.hang_limit_s=1e12",
            "supervisor.hang_limit_s must be above 0 and at most 1000000.0, got 1000000000000.0",
        ),
        ("model: {path: /m}", "supervisor.hang_limit_s=-.inf", "must be a finite number, got -inf"),
    ],
)
def test_mistakes_are_told_in_one_sentence(tmp_path, text, override, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_config(path, [override] if override else [])
    assert str(caught.value).startswith(f"--set {override}: " if override else f"{path}: ")
    assert "\n" not in str(caught.value)


def refusal(target, path, text, overrides=()):
    path.write_text(text)
    with pytest.raises(ValueError, match=":") as caught:
        load_yaml(path, target, overrides)
    return str(caught.value)


def fields_of(target, prefix=""):
    """Path and type of every field that holds a value, at any depth."""
    for name, kind in typing.get_type_hints(target).items():
        if msgspec.inspect.is_struct_type(kind):
            yield from fields_of(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def literals_of(kind):
    arms = [kind, *typing.get_args(kind)]
    return next((typing.get_args(each) for each in arms if typing.get_origin(each) is Literal), ())


FIELDS = [*fields_of(Config)]
CHOICES = [(name, literals_of(kind)) for name, kind in FIELDS if literals_of(kind)]
BOUNDED = [name for name, kind in FIELDS if {int, float} & {kind, *typing.get_args(kind)}]


@pytest.mark.parametrize(("name", "values"), CHOICES)
def test_a_value_that_is_none_of_them_is_answered_with_all_of_them(tmp_path, name, values):
    said = refusal(Config, tmp_path / "c.yaml", "model: {path: /m}", [f"{name}=sjf"])
    assert said == f"--set {name}=sjf: {name} must be one of {', '.join(values)}, got 'sjf'"


@pytest.mark.parametrize("name", BOUNDED)
def test_a_number_out_of_range_is_told_with_the_one_path_of_its_field(tmp_path, name):
    said = refusal(Config, tmp_path / "c.yaml", "model: {path: /m}", [f"{name}=-1"])
    reason = said.removeprefix(f"--set {name}=-1: ")
    assert reason.startswith(f"{name} must ")
    assert reason.endswith(("got -1", "got -1.0"))
    assert " - at " not in reason


def test_an_error_belongs_to_whatever_brought_it(tmp_path):
    path = tmp_path / "c.yaml"
    wrong = "model: {path: /m}\nscheduler: {max_batch_size: 0}"
    right = "model: {path: /m}\nparallel: {tensor: 4, expert: 4}"
    good, bad = "parallel.tensor=2", "scheduler.max_batch_size=0"
    assert refusal(Config, path, wrong, [good]).startswith(f"{path}: scheduler.max_batch_size ")
    assert refusal(Config, path, right, ["model.path=/n", good]).startswith(f"--set {good}: ")
    assert refusal(Config, path, right, [bad, "model.path=/n"]).startswith(f"--set {bad}: ")
    assert load_config(path, [bad, "scheduler.max_batch_size=1"]).scheduler.max_batch_size == 1


def test_what_only_the_whole_configuration_can_tell_has_an_origin_too(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: /m}")

    def check(config):
        if config.model.path == "/bad":
            raise ValueError("it is bad")

    assert load_yaml(path, Config, ["model.dtype=float32"], check).model.path == "/m"
    with pytest.raises(ValueError, match=r"^--set model\.path=/bad: it is bad$"):
        load_yaml(path, Config, ["model.path=/bad", "model.dtype=float32"], check)


def test_a_configuration_cannot_be_changed():
    config = SchedulerConfig()
    with pytest.raises(AttributeError):
        config.max_batch_size = 3


def test_all_deployment_configs_are_valid():
    for path in Path("configs").glob("*.yaml"):
        load_config(path)
