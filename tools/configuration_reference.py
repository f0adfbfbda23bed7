#!/usr/bin/env python3
"""Write docs/configuration.md from the records of configurations and workloads.

configuration_reference.py            # write it
configuration_reference.py --check    # exit status 1 when it is not current
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fastserve_mega.system.settings import Section, read_sections

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "fastserve_mega" / "system" / "config.py"
RECORDS = ROOT / "fastserve_mega" / "records.py"
HARDWARE = ROOT / "fastserve_mega" / "system" / "hardware.py"
WORKLOADS = (
    ROOT / "fastserve_mega" / "simulator" / "workload.py",
    ROOT / "fastserve_mega" / "simulator" / "lengths.py",
)
TARGET = ROOT / "docs" / "configuration.md"
HEAD = """\
<!-- tools/configuration_reference.py writes this from fastserve_mega/system/config.py. -->
# Configuration

A deployment is one YAML file of the sections below, given with `--config`. Only `model.path` must
be there. `--set section.field=value` overrides one value and may be given several times; the value
is YAML. A name or a value that is not allowed ends the program with one sentence.
[`configs/smollm2-135m-cpu.yaml`](../configs/smollm2-135m-cpu.yaml) has all of them as an example.
`fastserve-mega doctor --config YAML` checks a machine against the file, `fastserve-mega plan` says
what it means in memory.
"""
WORKLOAD_HEAD = """\
# Workloads

`fastserve-mega simulate` takes a second file, with `--workload`: which requests arrive, and when;
examples are in [`configs/workloads`](../configs/workloads/synthetic.yaml).
`--set workload.NAME=value` overrides one value.
"""


def reference(sections: dict[str, Section]) -> str:
    """The whole page."""
    parts = [HEAD]

    def add(name: str, section: Section) -> None:
        own = [each for each in section.settings if each.section is None]
        if own:
            parts.append(f"## {name}\n\n{section.meaning}\n")
            parts.append("| name | type | default | meaning |\n|---|---|---|---|")
            parts.extend(
                f"| `{name}.{each.name}` | {each.type} | `{each.default}` | {each.meaning} |"
                for each in own
            )
            parts.append("")
        for each in section.settings:
            if each.section is not None:
                add(f"{name}.{each.name}".lstrip("."), sections[each.section])

    add("", sections["Config"])
    return "\n".join(parts)


def figures(title: str, section: Section) -> str:
    """A mapping that is not a section: its fields without a section's name."""
    rows = [
        f"| `{each.name}` | {each.type} | `{each.default}` | {each.meaning} |"
        for each in section.settings
    ]
    table = "\n".join(("| name | type | default | meaning |", "|---|---|---|---|", *rows))
    return f"{title}\n\n{section.meaning}\n\n{table}\n"


def texts(*paths: Path) -> list[str]:
    """What is in files."""
    return [path.read_text(encoding="utf-8") for path in paths]


def whole_page() -> str:
    """Deployments, the figures of hardware, and workloads."""
    deployment = read_sections(*texts(RECORDS, SOURCE, HARDWARE))
    workload = read_sections(*texts(RECORDS, *WORKLOADS))
    return "\n".join(
        (
            reference(deployment),
            figures("### A device of one's own", deployment["Device"]),
            figures("### A link of one's own", deployment["Link"]),
            WORKLOAD_HEAD,
            figures("## Settings of a workload", workload["WorkloadConfig"]),
            figures("## Distributions as a source", workload["SyntheticLengths"]),
            figures("### Prompt and output lengths", workload["Lognormal"]),
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(argv)
    page = whole_page()
    if not options.check:
        TARGET.write_text(page, encoding="utf-8")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != page:
        print(f"{TARGET.name} is not current: run tools/configuration_reference.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
