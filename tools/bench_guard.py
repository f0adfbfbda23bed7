"""Times the native step beside that of an earlier commit, in turns; fails when it became slower.

    python tools/bench_guard.py --model DIRECTORY                 # beside the last tag
    python tools/bench_guard.py --model DIRECTORY --since HEAD~20

The earlier commit is checked out and built below build/. Each round runs `tools/bench_step.py` of
this checkout with the package of either; the best of all rounds counts, since other processes
only ever add time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_S = 900


def output_of(command: list[str], directory: Path = ROOT) -> str:
    """What a command prints."""
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    return subprocess.run(
        command,
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT_S,
        check=True,
    ).stdout.strip()


def check_out(commit: str) -> Path:
    """The files of a commit, with its library built."""
    directory = ROOT / "build" / f"guard-{commit[:12]}"
    if not directory.exists():
        directory.mkdir(parents=True)
        archive = directory / "files.tar"
        output_of(["git", "archive", "-o", str(archive), commit])
        output_of(["tar", "xf", archive.name], directory)
    output_of([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], directory)
    return directory


def measure(trees: dict[str, Path], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Case -> tree -> seconds of its best step."""
    best: dict[str, dict[str, float]] = {}
    command = [sys.executable, str(ROOT / "tools" / "bench_step.py"), "--engines", "native"]
    command += ["--json", "--rounds", "1", "--model", str(arguments.model)]
    for _ in range(arguments.rounds):
        for name, tree in trees.items():
            for case, took in json.loads(output_of(command, tree).splitlines()[-1]).items():
                of_case = best.setdefault(case, {})
                of_case[name] = min(took, of_case.get(name, took))
    return best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory")
    parser.add_argument("--since", help="a commit; default: the last tag")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=1.05, help="times as long; default: 1.05")
    arguments = parser.parse_args()
    since = arguments.since or output_of(["git", "describe", "--tags", "--abbrev=0"])
    commit = output_of(["git", "rev-parse", f"{since}^{{commit}}"])
    trees = {"before": check_out(commit), "now": ROOT}
    slower = False
    for case, took in measure(trees, arguments).items():
        ratio = took["now"] / took["before"]
        slower |= ratio > arguments.limit
        print(f"{case}: {took['before'] * 1e3:.1f} -> {took['now'] * 1e3:.1f} ms, {ratio:.3f}")
    return int(slower)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"bench_guard: {' '.join(error.cmd)} failed: without a tag, say --since COMMIT")
