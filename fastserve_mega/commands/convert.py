"""Write a model in the other format."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastserve_mega.commands.command import DIRECTORY, Command, complete_with, fail


def _convert(options: argparse.Namespace) -> int:
    from fastserve_mega.worker.megatron.convert import convert

    try:
        convert(options.source, options.target, options.output_format)
    except (ValueError, OSError) as error:
        return fail(options, error)
    return 0


def _add_convert(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument(
        "--from", type=Path, required=True, dest="source", metavar="DIRECTORY",
        help="a model in the other format: config.json and weights",
    )  # fmt: skip
    target = parser.add_argument(
        "--to", type=Path, required=True, dest="target", metavar="DIRECTORY",
        help="where to write it; empty, or not there yet",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=("torch_dist", "huggingface"), required=True, dest="output_format",
        help="torch_dist: Megatron's distributed checkpoint; huggingface: safetensors",
    )  # fmt: skip
    complete_with(source, DIRECTORY)
    complete_with(target, DIRECTORY)


COMMAND = Command(
    name="convert",
    summary="write a model in the format of Megatron or of Hugging Face",
    description="Writes a model directory in the other format: config.json and tokenizer "
    "are copied, the weights are the same bit for bit. Runs on one CPU with a layer in "
    "memory at a time; either format can be served over any number of ranks.",
    examples=(
        "--from llama-3-8b --to llama-3-8b-megatron --format torch_dist",
        "--from llama-3-8b-megatron --to llama-3-8b-again --format huggingface",
    ),
    run=_convert,
    extra="worker",
    add_arguments=_add_convert,
    config="none",
)
