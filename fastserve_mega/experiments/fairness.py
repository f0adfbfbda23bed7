"""What one client's flood costs another: `python -m fastserve_mega.experiments.fairness`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from fastserve_mega.experiments.standing_set import at_rate, find_workload
from fastserve_mega.simulator.main import simulate
from fastserve_mega.simulator.report import Distribution, distribution

STEADY = "steady"


@dataclass(frozen=True, slots=True)
class FloodCost:
    """Seconds to the first token of the steady client of the workload `burst-flood`."""

    alone: Distribution
    """On a machine of its own."""
    unknown: Distribution
    """Beside the flood, by a scheduler that does not know whose a request is."""
    shared: Distribution
    """Beside the flood, with fair shares."""


def flood_cost(policy: str, system: str, load: float, count: int, rate: float) -> FloodCost:
    """Simulate the three runs.

    Args:
        policy: of the scheduler.
        system: a shipped deployment.
        load: requests of both clients together, over those that the system can do.
        count: requests of both clients together.
        rate: requests per second that the system can do.
    """
    workload = replace(find_workload("burst-flood"), system=system)
    requests = at_rate(workload.draw(1, count), rate * load)
    config = workload.under(policy)

    def ttft(clients: Sequence[str], *, named: bool = True) -> Distribution:
        sent = [each for each in requests if each.client in clients]
        nameless = [each._replace(client="") for each in sent]
        records = simulate(config, sent if named else nameless).records
        pairs = zip(sent, records, strict=True)
        return distribution(record.ttft_s for spec, record in pairs if spec.client == STEADY)

    both = tuple({each.client for each in requests})
    return FloodCost(ttft((STEADY,)), ttft(both, named=False), ttft(both))


def main() -> None:
    """Print a table of policies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", default="opt-13b-a100")
    parser.add_argument("--load", type=float, default=1.5)
    parser.add_argument("--requests", type=int, default=800)
    parser.add_argument("--policies", default="skip_join_mlfq,fcfs,srpt")
    options = parser.parse_args()
    workload = replace(find_workload("burst-flood"), system=options.system)
    rate = workload.saturation_rate(options.requests)
    table = Table(title=f"TTFT mean / P95 of the steady client, s ({options.system})")
    for name in ("policy", "alone", "flood, clients unknown", "flood, fair shares"):
        table.add_column(name)
    for policy in options.policies.split(","):
        cost = flood_cost(policy, options.system, options.load, options.requests, rate)
        runs = (cost.alone, cost.unknown, cost.shared)
        table.add_row(policy, *(f"{run.mean:.3f} / {run.p95:.3f}" for run in runs))
    Console().print(table)


if __name__ == "__main__":
    main()
