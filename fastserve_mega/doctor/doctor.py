"""`fastserve-mega doctor`: run all checks, print what they found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from fastserve_mega.doctor import deployment_checks, installation, machine
from fastserve_mega.doctor.finding import Check, Finding, Status, ok, problem
from fastserve_mega.printing import wrap_words
from fastserve_mega.system.config import Config
from fastserve_mega.system.config_file import load_config

_COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "problem": "red"}

_INDENT = " " * len("problem  ")
_ARROW = "→"


def run_doctor(config_file: str | None, overrides: Sequence[str], *, as_json: bool) -> int:
    """Look at everything; returns the exit status, 1 when something is broken.

    Args:
        config_file: of the deployment; None, and no overrides, looks at the installation only.
        overrides: `section.field=value`.
        as_json: print a list of findings instead of a table.
    """
    findings = diagnose(config_file, overrides)
    if as_json:
        Console().print_json(json.dumps([asdict(finding) for finding in findings]))
    else:
        print_findings(findings, Console())
    return int(any(finding.status == "problem" for finding in findings))


def diagnose(config_file: str | None, overrides: Sequence[str]) -> list[Finding]:
    """All findings, in a fixed order."""
    config, findings = None, []
    if config_file is not None or overrides:
        try:
            config = load_config(config_file, overrides)
            findings = [ok("configuration", config_file or ", ".join(overrides))]
        except (ValueError, OSError) as error:
            findings = [problem("configuration", str(error), "docs/configuration.md")]
    checks = _checks(config, Path(config_file or ""))
    with (
        Console(stderr=True).status("looking around"),
        ThreadPoolExecutor(max_workers=4) as threads,
    ):
        for found in threads.map(Check.findings, checks):
            findings += found
    return findings


def _checks(config: Config | None, config_file: Path) -> list[Check]:
    checks = [
        Check("Python", installation.check_python),
        Check("libraries", installation.check_libraries),
        Check("torch", lambda: installation.check_torch(config)),
        Check("Megatron-Core", installation.check_megatron),
        Check("Apex", installation.check_apex),
        Check("Transformer Engine", installation.check_transformer_engine),
        Check("native step", installation.check_native_step),
        Check("MPI", lambda: installation.check_mpi(config)),
        Check("host name", lambda: machine.check_host_name(config)),
        Check("cores", lambda: machine.check_cores(config)),
        Check("space", machine.check_space),
    ]
    if config is not None:
        checks += [
            Check("ports", lambda: deployment_checks.check_ports(config)),
            Check("model", lambda: deployment_checks.check_model(config, config_file)),
            Check("memory", lambda: deployment_checks.check_memory(config, config_file)),
        ]
    return checks


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    """Each with what to do below it, and one line that says how it stands."""
    for each in findings:
        console.print(_entry(each, console.width), soft_wrap=True)
    console.print()
    counts = {name: sum(each.status == name for each in findings) for name in _COLOURS}
    if counts["problem"]:
        console.print(f"[red]{counts['problem']} to fix before it can run[/red]")
    elif counts["warning"]:
        console.print(f"it can run; {counts['warning']} to look at")
    else:
        console.print("all is well")


def _entry(finding: Finding, width: int) -> Text:
    """Lines within the width, broken between words only: a path can be copied from them."""
    said = f"{finding.subject}: {finding.found}"
    remedy = f"{_ARROW} {finding.remedy}" if finding.remedy else ""
    room = width - len(_INDENT)
    lines = [*wrap_words(said, room), *wrap_words(remedy, room)]
    status = Text(f"{finding.status:<{len(_INDENT)}}", style=_COLOURS[finding.status])
    entry = Text.assemble(status, f"\n{_INDENT}".join(lines))
    entry.highlight_regex(rf"(?m)^{_INDENT}{_ARROW}.*", "bold")
    return entry
