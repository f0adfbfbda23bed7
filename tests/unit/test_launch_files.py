"""The files in launch/ say what the program knows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from fastserve_mega import cli
from fastserve_mega.system.config_file import load_config

LAUNCH = Path(__file__).parents[2] / "launch"
KNOWN = set(re.findall(r"`(fastserve_\w+)`", (LAUNCH.parent / "docs" / "metrics.md").read_text()))


@pytest.mark.parametrize("name", ["prometheus/alerts.yaml", "grafana/fastserve_mega.json"])
def test_alerts_and_dashboards_ask_for_metrics_that_exist(name):
    text = (LAUNCH / name).read_text(encoding="utf-8")
    asked = set(re.findall(r"\bfastserve_[a-z0-9_]+", text)) - {"fastserve_mega"}
    names = {re.sub(r"_(bucket|count|sum)$", "", each) for each in asked}
    assert len(names) > 5
    assert names <= KNOWN


def test_the_configuration_of_the_pod_is_one():
    assert load_config(LAUNCH / "kubernetes" / "config.yaml").server.host == "0.0.0.0"


def test_what_containers_and_services_start_is_a_command():
    [pod] = yaml.safe_load((LAUNCH / "kubernetes/deployment.yaml").read_text())["spec"]["template"][
        "spec"
    ]["containers"]
    compose = yaml.safe_load((LAUNCH / "docker/compose.yaml").read_text())
    unit = (LAUNCH / "systemd/fastserve-mega.service").read_text()
    [start] = re.findall(r"^ExecStart=\S+/fastserve-mega (.*)$", unit, re.MULTILINE)
    for words in (pod["args"], compose["services"]["fastserve-mega"]["command"], start.split()):
        assert cli.make_parser().parse_args(words).command == "serve"


def test_every_file_is_valid_yaml():
    files = [*LAUNCH.rglob("*.yaml")]
    assert len(files) >= 10
    for path in files:
        assert list(yaml.safe_load_all(path.read_text(encoding="utf-8"))), path
