"""A configuration that is written out says the same as the one that was read."""

import pytest

from fastserve_mega.cli import main
from fastserve_mega.system.config_file import load_config
from fastserve_mega.system.settings import commented_yaml


@pytest.mark.parametrize(
    "path", [None, "configs/smollm2-135m-cpu.yaml", "configs/opt-13b-a100.yaml"]
)
def test_what_is_written_can_be_read(path, tmp_path):
    config = load_config(path, ['model.path="a: b #c"', "server.cors_origins=['*', x]"])
    written = tmp_path / "all.yaml"
    written.write_text(commented_yaml(config), encoding="utf-8")
    assert load_config(written) == config


def test_every_setting_has_its_meaning_above_it():
    lines = commented_yaml(load_config(None, ["model.path=x"])).splitlines()
    settings = [number for number, line in enumerate(lines) if line and "#" not in line[:8]]
    assert len(settings) > 60
    assert [
        lines[number] for number in settings if not lines[number - 1].strip().startswith("#")
    ] == []
    assert max(map(len, lines)) <= 100


def test_init_writes_a_file_once(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    words = ["init", "some/model", "--tensor", "2", "--output", str(path)]
    assert main(words) == 0
    assert load_config(path).parallel.tensor == 2
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
