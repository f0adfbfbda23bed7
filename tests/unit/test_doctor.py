"""What doctor says of machines with something wrong."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
from zero_weights import write_weights

from fastserve_mega import cli
from fastserve_mega.doctor import (
    deployment_checks,
    doctor,
    machine,
)
from fastserve_mega.doctor.finding import Check, ProbeError, ok, problem, python_probe
from fastserve_mega.system.config import (
    Config,
    CoordinatorConfig,
    KvCacheConfig,
    ModelConfig,
    ParallelConfig,
    ServerConfig,
)
from fastserve_mega.system.hardware import HardwareConfig
from fastserve_mega.system.host_memory import HostMemory

CONFIG = Config(model=ModelConfig(path="/nowhere/model"))


def statuses(findings):
    return [finding.status for finding in findings]


# --- isolation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import signal; signal.pause()", "no answer after 0.5 s"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("print('no json')", "said nothing of use"),
    ],
)
def test_a_probe_that_dies_is_an_error_here(code, message):
    limit_s = 0.5 if "pause" in code else 60
    with pytest.raises(ProbeError, match=message):
        python_probe(code, limit_s)


def test_a_check_that_fails_is_a_finding():
    def broken():
        yield ok("x", "fine so far")
        raise KeyError("oops")

    (finding,) = Check("x", broken).findings()
    assert finding.status == "problem"
    assert "KeyError: 'oops'" in finding.found


# --- the machine ---------------------------------------------------------------------------------


def test_a_host_name_that_others_cannot_use(monkeypatch):
    monkeypatch.setattr(machine, "python_probe", lambda *_: "127.0.1.1")
    config = Config(model=CONFIG.model, parallel=ParallelConfig(tensor=8, pipeline=2))
    (finding,) = machine.check_host_name(config)
    assert finding.status == "problem"
    assert "the other 1 hosts cannot reach" in finding.found
    assert statuses(machine.check_host_name(CONFIG)) == ["ok"]


def test_more_threads_than_cores():
    config = Config(model=CONFIG.model, parallel=ParallelConfig(threads_per_rank=10_000))
    (finding,) = machine.check_cores(config)
    assert finding.status == "warning"


def test_space_is_where_it_says():
    assert any("/dev/shm" in finding.found for finding in machine.check_space())


# --- the deployment ------------------------------------------------------------------------------


def test_ports_in_use_and_of_others():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = Config(
            model=CONFIG.model,
            coordinator=CoordinatorConfig(client_endpoint="tcp://203.0.113.7:5570"),
            server=ServerConfig(port=taken.getsockname()[1]),
        )
        client, worker, server = deployment_checks.check_ports(config)
    assert (client.status, worker.status, server.status) == ("warning", "ok", "problem")
    assert "in use" in server.found
    assert "--set server.port=" in server.remedy
    assert "203.0.113.7:5570 is not an address of this machine" in client.found


@pytest.fixture
def model(tmp_path, tiny_tokenizer_dir):
    """A small model's directory."""
    sizes = {
        "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100,
        "intermediate_size": 128, "max_position_embeddings": 64,
    }  # fmt: skip
    config = {"architectures": ["LlamaForCausalLM"], "eos_token_id": 0, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_weights(tmp_path)
    shutil.copy(tiny_tokenizer_dir / "tokenizer.json", tmp_path)
    return tmp_path


def test_the_memory_of_a_model_that_is_not_there_is_no_bug_of_ours(tmp_path):
    config = Config(model=ModelConfig(path=str(tmp_path / "nowhere")))
    (finding,) = deployment_checks.check_memory(config, tmp_path / "deployment.yaml")
    assert "nowhere is not a model directory" in finding.found
    assert finding.remedy == "see what is said of the model"


def check_model(directory):
    config = Config(model=ModelConfig(path=str(directory)))
    return list(deployment_checks.check_model(config, directory / "deployment.yaml"))


def test_a_model_that_is_there(model):
    assert statuses(check_model(model)) == ["ok"]


def test_weights_are_what_config_json_says(model):
    """Found out without torch, before any rank is started."""
    write_weights(model, **{"norm.weight": (63,)})
    (weights,) = check_model(model)
    assert weights.status == "problem"
    assert "model.norm.weight has shape (63,), config.json implies (64,)" in weights.found
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "is cut short: 100 of its" in check_model(model)[0].found
    path.unlink()
    path.symlink_to(model / "blobs" / "0123")
    assert "is a link to a file that is not there" in check_model(model)[0].found


def test_a_tokenizer_that_cannot_be_read(model):
    (model / "tokenizer.json").write_text("{}")
    weights, tokenizer = check_model(model)
    assert (weights.status, tokenizer.status) == ("ok", "problem")
    assert "no usable tokenizer in" in tokenizer.found


def test_a_model_that_is_not_there(model):
    (finding,) = check_model(model / "deeper")
    assert finding.status == "problem"
    assert "there is no directory" in finding.found
    assert "are free in" in finding.remedy


def test_a_name_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    config = Config(model=ModelConfig(path="some-body/some-model"))
    (finding,) = deployment_checks.check_model(config, tmp_path / "deployment.yaml")
    assert finding.status == "warning"
    assert "some-body/some-model is not on this machine" in finding.found


def test_a_model_without_all_its_files(model):
    (model / "tokenizer.json").unlink()
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    weights, tokenizer = check_model(model)
    assert "1 of the files named in" in weights.found
    assert weights.found.endswith("the first is model-2.safetensors")
    assert (weights.status, tokenizer.status) == ("problem", "warning")
    (model / "model.safetensors.index.json").unlink()
    assert "but model-1.safetensors: a part" in check_model(model)[0].found
    (model / "model-1.safetensors").unlink()
    assert "holds no weights" in check_model(model)[0].found


@pytest.mark.parametrize(
    ("host_gb", "available_gb", "status"), [(1, 50, "ok"), (30, 10, "warning"), (99, 50, "problem")]
)
def test_memory_against_the_plan(model, monkeypatch, host_gb, available_gb, status):
    memory = HostMemory(64 * machine.GIB, available_gb * machine.GIB)
    monkeypatch.setattr(deployment_checks, "host_memory", lambda: memory)
    config = Config(
        model=ModelConfig(path=str(model)),
        parallel=ParallelConfig(device="cpu"),
        kv_cache=KvCacheConfig(host_memory_gb=host_gb),
    )
    (finding,) = deployment_checks.check_memory(config, model / "deployment.yaml")
    assert finding.status == status
    assert f"take {host_gb + 1}.0 GiB" in finding.found  # and 1 GiB of KV, as on every CPU


def test_memory_of_devices_is_what_plan_says(model, monkeypatch):
    monkeypatch.setattr(deployment_checks, "_smallest_device", lambda: machine.GIB)
    config = Config(
        model=ModelConfig(path=str(model)),
        kv_cache=KvCacheConfig(device_memory_gb=4),
        hardware=HardwareConfig(devices_per_node=1),
    )
    finding, _ = deployment_checks.check_memory(config, model / "deployment.yaml")
    assert finding.status == "problem"
    assert "its device has 1 (hardware.device_memory_gb)" in finding.found


# --- the report ----------------------------------------------------------------------------------


def test_the_exit_status_and_the_table(monkeypatch, capsys):
    bad = [problem("the [thing]", "it is broken", "mend it")]
    checks = [Check("a", lambda: [ok("a", "fine")]), Check("b", lambda: bad)]
    monkeypatch.setattr(doctor, "_checks", lambda *_: checks[:1])
    assert cli.main(["doctor"]) == 0
    assert "all is well" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "_checks", lambda *_: checks)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "the [thing]" in said
    assert "mend it" in said
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [each["status"] for each in found] == ["ok", "problem"]


def test_a_broken_configuration_is_a_finding(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_checks", lambda *_: [])
    words = ["--config", "configs/smollm2-135m-cpu.yaml", "--set", "model.colour=red", "--json"]
    assert cli.main(["doctor", *words]) == 1
    assert "unknown field 'model.colour'" in json.loads(capsys.readouterr().out)[0]["found"]
    assert cli.main(["doctor", "/m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["found"] == 'model.path="/m"'
