"""`fastserve-mega simulate`: policies side by side on one workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastserve_mega.printing import print_sentence
from fastserve_mega.simulator.config import SimulationConfig, make_replicas
from fastserve_mega.simulator.lengths import LengthTable
from fastserve_mega.simulator.records import SimulationResult
from fastserve_mega.simulator.report import Report, make_tables, summarize, to_json
from fastserve_mega.simulator.simulation import Simulation
from fastserve_mega.simulator.workload import RequestSpec, draw_requests, load_lengths
from fastserve_mega.slo import Slo
from fastserve_mega.system.deployment import plan_deployment

_TIMELINE_POINTS = 1000


def simulate(
    config: SimulationConfig,
    requests: Sequence[RequestSpec],
    *,
    timeline_interval_s: float | None = None,
    on_finished: Callable[[], None] | None = None,
    slo: Slo | None = None,
) -> SimulationResult:
    """Run one simulation; the same configuration and requests give the same result."""
    deployment = config.deployment
    simulation = Simulation(
        make_replicas(config),
        requests,
        max_queued_requests=deployment.scheduler.max_queued_requests,
        max_context=deployment.model.max_context or config.architecture.max_context,
        oracle=deployment.scheduler.policy == "srpt",
        warmup=config.workload.warmup_requests,
        cooldown=config.workload.cooldown_requests,
        timeline_interval_s=timeline_interval_s,
        on_finished=on_finished,
        slo=slo,
    )
    return simulation.run()


def with_policy(config: SimulationConfig, policy: str) -> SimulationConfig:
    """Return the same simulation under another policy."""
    deployment = config.deployment
    scheduler = replace(deployment.scheduler, policy=policy)
    return replace(config, deployment=replace(deployment, scheduler=scheduler))


def with_rate(config: SimulationConfig, rate: float | None) -> SimulationConfig:
    """Return the same simulation at another rate."""
    return replace(config, workload=replace(config.workload, rate=rate))


def run_simulate(
    config: SimulationConfig,
    *,
    data: Path | None = None,
    policies: Sequence[str] = (),
    rates: Sequence[float] = (),
    json_path: Path | None = None,
    plots: Path | None = None,
    slo: Slo | None = None,
) -> int:
    """Simulate each policy at each rate, print a table, write JSON and plots.

    Args:
        config: what to simulate.
        data: directory of workload files; see `read_source`.
        policies: to compare; none is the configured one.
        rates: requests per second; none is the configured one.
        json_path: file for all figures.
        plots: directory for plots.
        slo: what a good answer is; None takes the default.

    Returns:
        The exit status.

    Raises:
        ValueError: the workload's source is not valid.
        OSError: a file cannot be read or written.
    """
    for problem in plan_deployment(config.deployment, config.architecture).problems:
        print_sentence(Console(stderr=True), f"[yellow]note:[/yellow] {escape(problem)}")
    if rates:
        config = with_rate(config, rates[0])
    table = load_lengths(config.workload, data)
    chosen = [
        with_rate(with_policy(config, policy), rate)
        for policy in policies or (config.deployment.scheduler.policy,)
        for rate in rates or (config.workload.rate,)
    ]
    runs = _run_all(chosen, table, with_timeline=plots is not None, slo=slo)
    reports = [report for report, _ in runs]
    prompt, output = table.means
    title = f"{table.origin}: {prompt:.0f} prompt and {output:.0f} output tokens on average"
    for view in make_tables(reports, title):
        Console().print(view)
    if json_path is not None:
        json_path.write_text(to_json(reports), encoding="utf-8")
    if plots is not None:
        _plot_all(runs, plots)
    return 0


def _run_all(
    configs: Sequence[SimulationConfig],
    table: LengthTable,
    *,
    with_timeline: bool,
    slo: Slo | None,
) -> list[tuple[Report, SimulationResult]]:
    runs = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        for config in configs:
            policy, rate = config.deployment.scheduler.policy, config.workload.rate
            requests = draw_requests(config.workload, table)
            span_s = requests[-1].arrival_s - requests[0].arrival_s
            name = policy if rate is None else f"{policy} at {rate:g}/s"
            task = progress.add_task(name, total=len(requests))
            result = simulate(
                config,
                requests,
                timeline_interval_s=span_s / _TIMELINE_POINTS if with_timeline else None,
                on_finished=lambda task=task: progress.advance(task),  # type: ignore[misc] # bound now
                slo=slo,
            )
            runs.append((summarize(result, policy, rate), result))
    return runs


def _plot_all(runs: Sequence[tuple[Report, SimulationResult]], directory: Path) -> None:
    from fastserve_mega.simulator import plots

    reports = [report for report, _ in runs]
    rates = list(dict.fromkeys(report.rate for report in reports))
    if len(rates) > 1:
        plots.plot_latency_against_rate(reports, directory / "latency.png")
    for rate in rates:
        suffix = "" if rate is None else f"-{rate:g}"
        results = {report.policy: result for report, result in runs if report.rate == rate}
        plots.plot_cdfs(results, directory / f"cdf{suffix}.png")
        for policy, result in results.items():
            plots.plot_timeline(result, directory / f"timeline-{policy}{suffix}.png")
