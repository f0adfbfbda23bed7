"""--slo: what a good answer is, for the commands that measure."""

from __future__ import annotations

import argparse

from fastserve_mega.slo import Slo, parse_slo


def add_slo(parser: argparse.ArgumentParser) -> None:
    """Let a command be told what is promised to users."""
    default = Slo()
    parser.add_argument(
        "--slo",
        type=_slo,
        default=default,
        metavar="TTFT,TPOT",
        help="longest time to first token and mean time per output token of a good answer, in "
        f"seconds; default: {default.ttft_s:g},{default.tpot_s:g}",
    )


def _slo(text: str) -> Slo:
    try:
        return parse_slo(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
