"""Measure a running server."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastserve_mega.commands.command import FILE, Command, complete_with, fail, load
from fastserve_mega.commands.options import add_slo, positive, positive_list
from fastserve_mega.system.config import CoordinatorConfig
from fastserve_mega.system.config_file import load_config
from fastserve_mega.system.key_file import client_address


def _bench(options: argparse.Namespace) -> int:
    if options.url is not None and options.config is not None:
        return fail(options, "give --url for HTTP or --config for ZeroMQ, not both")
    if options.overrides and options.config is None:
        return fail(options, "--set overrides a configuration: give --config too")
    endpoint = CoordinatorConfig().client_endpoint
    if options.config is not None:
        endpoint = load(options, lambda *given: client_address(load_config(*given).coordinator))
    from fastserve_mega.bench.bench import BenchOptions, run_bench
    from fastserve_mega.bench.workload import Lengths, parse_mix, read_lengths

    try:
        lengths: tuple[Lengths, ...] = (Lengths(options.input_len, options.output_len),)
        if options.mix is not None:
            lengths = parse_mix(options.mix)
        elif options.lengths is not None:
            lengths = read_lengths(options.lengths)
    except (ValueError, OSError) as error:
        return fail(options, error)
    return run_bench(
        BenchOptions(
            url=options.url,
            endpoint=endpoint,
            model=options.model,
            requests=options.requests,
            rates=options.rate or (None,),
            concurrencies=options.concurrency or (None,),
            lengths=lengths,
            token_ids=options.token_ids,
            warmup=options.warmup,
            timeout_s=options.timeout,
            seed=options.seed,
            slo=options.slo,
            json_path=options.json,
        )
    )


def _range(text: str) -> range:
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit()) or int(low) >= int(high):
        raise argparse.ArgumentTypeError(f"not of the form LOW:HIGH: {text!r}")
    return range(int(low), int(high))


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        help="measure this OpenAI-compatible server, for example http://127.0.0.1:8000; without, "
        "the coordinator of --config over ZeroMQ",
    )
    parser.add_argument("--model", help="with --url; default: the first one the server lists")
    _add_load(parser)
    _add_lengths(parser)
    parser.add_argument(
        "--warmup",
        type=int,
        default=0,
        metavar="N",
        help="requests before the run, one after another, not counted",
    )
    parser.add_argument(
        "--timeout",
        type=positive(float),
        default=600.0,
        metavar="SECONDS",
        help="longest time without any data; default: 600",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the same one sends the same requests, which a prefix cache may know; default: 0",
    )
    add_slo(parser)
    json = parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    complete_with(json, FILE)


def _add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--requests", type=positive(int), default=100, metavar="N", help="of a run; default: 100"
    )
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument(
        "--rate",
        type=positive_list(float),
        metavar="X,Y,…",
        help="requests per second, Poisson arrivals; one run for each",
    )
    load.add_argument("--burst", action="store_true", help="all at once")
    parser.add_argument(
        "--concurrency",
        type=positive_list(int),
        metavar="N,M,…",
        help="most requests at the server at once; one run for each; default: no limit",
    )


def _add_lengths(parser: argparse.ArgumentParser) -> None:
    lengths = parser.add_mutually_exclusive_group()
    lengths.add_argument(
        "--mix", metavar="SHARE:PROMPT/OUTPUT,…", help="lengths in tokens, drawn by their shares"
    )
    file = lengths.add_argument(
        "--lengths", type=Path, metavar="CSV", help="drawn from columns prompt_tokens,output_tokens"
    )
    complete_with(file, FILE)
    for name, default in (("input", 128), ("output", 64)):
        parser.add_argument(
            f"--{name}-len",
            type=positive(int),
            default=default,
            metavar="TOKENS",
            help=f"without --mix and --lengths; default: {default}",
        )
    parser.add_argument(
        "--token-ids",
        type=_range,
        default=range(1000, 30000),
        metavar="LOW:HIGH",
        help="range the prompts are drawn from, HIGH excluded; default: 1000:30000",
    )


COMMAND = Command(
    name="bench",
    summary="measure a running server: latencies and throughput",
    description="Sends random prompts of given lengths to a running server, over HTTP (any "
    "OpenAI-compatible one) or ZeroMQ, and reports TTFT, TPOT, JCT and throughput. Several rates "
    "or concurrencies make several runs, compared at the end.",
    examples=(
        "--url http://127.0.0.1:8000 --rate 2",
        "--url http://127.0.0.1:8000 --burst --concurrency 1,4,16 --input-len 128 --output-len 64",
        "--config configs/smollm2-135m-cpu.yaml --rate 1,2,4 --mix 0.8:64/16,0.2:512/256 "
        "--json result.json",
    ),
    run=_bench,
    extra="terminal",
    add_arguments=_add_bench,
    config="optional",
)
