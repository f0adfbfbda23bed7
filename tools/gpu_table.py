"""The figures of tools/gpu_check.sh, each beside what is asked of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

OUT = Path(os.environ.get("OUT", "gpu-check")).resolve()
_ROWS = OUT / "table.jsonl"
_LEAST = {
    "decode, graphs, batch 16": 0.85,
    "decode, graphs, batch 64": 0.85,
    "decode, graphs, batch 256": 0.85,
    "decode, graphs, batch 1": 0.80,
    "prefill": 0.6,
    "swap_out": 45.0,
    "swap_in": 45.0,
    "blocks are equal after the journey": 1.0,
    "tokens of all engines are equal": 1.0,
    "users over HTTP": 0.9,
}
_MOST = {
    "step beside a copy": 1.05,
    "attention, 1 after 4000": 0.02,
    "attention, 300 after 500": 0.02,
    "start with weights in files": 8.0,
}


def add(what: str, told: str, got: float | None = None) -> None:
    """Add a row.

    Args:
        what: is measured; it may be asked for.
        told: in words; with `got` its unit, and whatever else is worth knowing.
        got: the figure.
    """
    row = (what, told, got)
    print(_line(*row), flush=True)
    with _ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def table(card: str) -> None:
    """What is asked for comes first, and the card last."""
    lines = _ROWS.read_text().splitlines() if _ROWS.exists() else []
    rows = {what: (told, got) for what, told, got in map(json.loads, lines)}
    for what in (*_LEAST, *_MOST):
        print(_line(what, *rows.pop(what, ("not measured", None))))
    for what, (told, got) in rows.items():
        print(_line(what, told, got))
    print(_line("card", card, None))


def _line(what: str, told: str, got: float | None) -> str:
    asked = ""
    if what in _LEAST:
        met = "" if got is None else " " if got >= _LEAST[what] else " MISSED"
        asked = f"asked >= {_LEAST[what]:g}{met}"
    elif what in _MOST:
        met = "" if got is None else " " if got <= _MOST[what] else " MISSED"
        asked = f"asked <= {_MOST[what]:g}{met}"
    number = "" if got is None else f"{got:.3g}"
    return f"{what:36} {number:>8}  {asked:22} {told}".rstrip()


if __name__ == "__main__":
    if sys.argv[1] == "add":
        add(*sys.argv[2:4])
    else:
        table(sys.argv[2])
