"""Write a configuration."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastserve_mega.commands.command import Command, fail, load
from fastserve_mega.system.config_file import load_config


def _init(options: argparse.Namespace) -> int:
    config = load(options, load_config)
    from fastserve_mega.system.settings import commented_yaml

    path = Path(options.output)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(commented_yaml(config))
    except FileExistsError:
        return fail(options, f"{path} exists already; --output names another file")
    except OSError as error:
        return fail(options, error)
    print(f"{path} is written; next: fastserve-mega plan --config {path}")
    return 0


def _add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        default="deployment.yaml",
        metavar="FILE",
        help="to write, which must not exist; default: deployment.yaml",
    )


COMMAND = Command(
    name="init",
    summary="write a configuration with all settings and what they mean",
    description="Writes a YAML file for a model with every setting, its default and its "
    "meaning, to be changed and given to the other commands with --config. With --config it "
    "writes that configuration out in full.",
    examples=("~/models/qwen3-8b", "Qwen/Qwen3-8B --tensor 2 --output qwen3.yaml"),
    run=_init,
    add_arguments=_add_init,
    config="model",
)
