"""A deployment's own configuration is what is simulated."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from fastserve_mega import cli
from fastserve_mega.coordinator.profile_file import save_profile
from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.scheduling.cost_model import DecodePoint, PrefillPoint, Profile
from fastserve_mega.simulator.config import load_simulation_config, split_overrides
from fastserve_mega.simulator.main import simulate
from fastserve_mega.simulator.workload import make_requests
from fastserve_mega.system.deployment import plan_deployment

CONFIGS = Path(__file__).parents[3] / "configs"
WORKLOAD = ["workload.rate=4", "workload.num_requests=20", "workload.max_total_tokens=2048"]
PROFILE = Profile(
    prefill=(PrefillPoint(1, 0.5), PrefillPoint(2048, 0.5)),
    decode=(DecodePoint(1, 1, 0.5), DecodePoint(16, 1, 0.5)),
)
"""Each step takes half a second."""


def test_the_pools_are_those_of_the_plan() -> None:
    config = load_simulation_config(CONFIGS / "opt-175b-16xa100.yaml")
    plan = plan_deployment(
        config.deployment, load_architecture(CONFIGS / "architectures" / "opt-175b")
    )
    assert config.architecture == plan.architecture
    assert (plan.device_blocks, plan.host_blocks) == (3221, 12743)


def test_replicas_serve_more_than_one() -> None:
    elapsed = []
    for replicas in (1, 2):
        overrides = [*WORKLOAD, f"parallel.data={replicas}", "workload.num_requests=100"]
        config = load_simulation_config(CONFIGS / "opt-13b-a100.yaml", overrides=overrides)
        result = simulate(config, make_requests(config.workload))
        assert result.finished == 100
        elapsed.append(result.elapsed_s)
    assert elapsed[1] < 0.8 * elapsed[0]


def test_a_profile_takes_the_place_of_the_data_sheet() -> None:
    overrides = [*WORKLOAD, "workload.num_requests=1", "hardware.device=null"]
    overrides.append("kv_cache.device_blocks=200")
    path = CONFIGS / "opt-13b-a100.yaml"
    config = load_simulation_config(path, overrides=overrides, profile=PROFILE)
    result = simulate(config, make_requests(config.workload))
    assert result.elapsed_s == pytest.approx(0.5 * result.steps)
    with pytest.raises(ValueError, match=r"hardware\.device is not given"):
        simulate(replace(config, profile=None), make_requests(config.workload))


@pytest.mark.parametrize("how", ["--profile", "scheduler.profile"])
def test_the_command_takes_a_profile(how: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "profile.json"
    save_profile(PROFILE, path)
    words = ["--profile", str(path)] if how == "--profile" else ["--set", f"{how}={path}"]
    json = tmp_path / "result.json"
    config = str(CONFIGS / "opt-13b-a100.yaml")
    command = ["simulate", "--config", config, "--rates", "0.001", "--json", str(json)]
    assert cli.main([*command, *words, "--set", "workload.num_requests=2"]) == 0
    # After the first token, one in each step of half a second.
    assert '"tpot_s": {\n   "mean": 0.5,' in json.read_text().replace("    ", " ")
    assert "synthetic-sharegpt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rates", "wrong"), [("2,0", "0"), ("-1", "-1"), ("nan", "nan"), ("two", "two")]
)
def test_rates_that_are_not_positive_are_refused(rates: str, wrong: str, capsys) -> None:
    config = str(CONFIGS / "opt-13b-a100.yaml")
    with pytest.raises(SystemExit):
        cli.main(["simulate", "--config", config, f"--rates={rates}"])
    assert f"must be a positive number, got '{wrong}'" in capsys.readouterr().err


def test_the_workload_s_overrides_are_told_from_the_deployment_s() -> None:
    assert split_overrides(["a.b=1", "workload.rate=2", "workload.x.y=3"]) == (
        ["a.b=1"],
        ["workload.rate=2", "workload.x.y=3"],
    )
