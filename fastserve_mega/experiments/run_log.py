"""The runs of a comparison on disk: what was interrupted goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class Run(NamedTuple):
    """What tells one run of a comparison from the others."""

    workload: str
    load: float
    """The rate over the rate at which fcfs is saturated."""
    policy: str
    seed: int


class RunLog:
    """The results of a comparison, kept in a file of JSON lines if there is one.

    The first line holds the settings, each other one a run or the saturation rate of a workload.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        """Read what there is.

        Args:
            path: of the file, made if it is missing; None keeps the results in memory only.
            settings: of which the results depend, as JSON has them.

        Raises:
            ValueError: the file is not one of these, or of other settings.
            OSError: it cannot be read or written.
        """
        self.saturation_rates: dict[str, float] = {}
        self.results: dict[Run, dict[str, Any]] = {}
        """A report as JSON has it, or `error`, by run."""
        self._path = path
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines:
            self._read(path, lines, settings)
        whole = [json.dumps({"settings": settings}), *map(json.dumps, self._entries())]
        path.write_text("\n".join(whole) + "\n", encoding="utf-8")

    def add_rate(self, workload: str, rate: float) -> None:
        """Keep the saturation rate of a workload."""
        self.saturation_rates[workload] = rate
        self._append({"workload": workload, "saturation_rate": rate})

    def add(self, run: Run, result: dict[str, Any]) -> None:
        """Keep the result of a run."""
        self.results[run] = result
        self._append({**run._asdict(), "result": result})

    def _read(self, path: Path, lines: list[str], settings: dict[str, Any]) -> None:
        try:
            entries = [json.loads(lines[0])["settings"]]
            for number, line in enumerate(lines[1:], start=2):
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    if number < len(lines):  # the last line may have been cut off
                        raise
            for entry in entries[1:]:
                self._take(entry)
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{path} holds no comparison of policies") from None
        for name, value in settings.items():
            if (found := entries[0].get(name)) != value:
                raise ValueError(
                    f"{path} holds a comparison with {name}={found}, this one has {value}: "
                    "give another file"
                )

    def _take(self, entry: dict[str, Any]) -> None:
        if "saturation_rate" in entry:
            self.saturation_rates[entry["workload"]] = float(entry["saturation_rate"])
        else:
            run = Run(*(entry[name] for name in Run._fields))
            self.results[run] = dict(entry["result"])

    def _entries(self) -> list[dict[str, Any]]:
        rates = self.saturation_rates.items()
        return [
            *({"workload": name, "saturation_rate": rate} for name, rate in rates),
            *({**run._asdict(), "result": result} for run, result in self.results.items()),
        ]

    def _append(self, entry: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
