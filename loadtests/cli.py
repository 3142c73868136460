"""The command `loadtest`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from loadtests.errors import LoadTestError, LoadTestUsageError
from loadtests.plan import (
    DEFAULT_DURATION_S,
    DEFAULT_SOAK_S,
    DEFAULT_USERS,
    Arrivals,
    Kind,
    LoadPlan,
    Protocol,
)
from loadtests.session import run_loadtest
from loadtests.verdicts import Limits, broken_limits, limit_note, load_of, remarks

_console = Console(highlight=False, soft_wrap=True)
_Number = TypeVar("_Number", int, float)


def loadtest(
    url: Annotated[str, typer.Argument(help="http://HOST:PORT/v1/policies/NAME", metavar="URL")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the report goes.", metavar="DIR")
    ],
    users: Annotated[
        int, typer.Option(help="Users at the same time, in a closed loop.", min=1)
    ] = DEFAULT_USERS,
    duration_s: Annotated[
        float | None,
        typer.Option(
            help=f"Seconds of load [{DEFAULT_DURATION_S:g}; {DEFAULT_SOAK_S:g} for --soak].",
            min=0.1,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests/s of an open loop: due whatever the server does.", min=0.001),
    ] = None,
    arrivals: Annotated[
        Arrivals, typer.Option(help="When requests of an open loop are due.")
    ] = Arrivals.poisson,
    kind: Annotated[
        Kind | None,
        typer.Option(help="Who asks [both; queries with --rate, --sweep and --sweep-rates]."),
    ] = None,
    protocol: Annotated[Protocol, typer.Option(help="How to speak to the server.")] = Protocol.http,
    batch_size: Annotated[int, typer.Option(help="Observations in each query.", min=1)] = 1,
    num_envs: Annotated[
        int, typer.Option(help="Environments in each of --kind vector-env-loops.", min=1)
    ] = 8,
    env: Annotated[
        str | None, typer.Option(help="Environment of the loops [the policy's own].", metavar="ID")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="Users of one step after the other.", metavar="1,2,4,...")
    ] = None,
    sweep_rates: Annotated[
        str | None, typer.Option(help="The same of an open loop's rates.", metavar="100,200,...")
    ] = None,
    soak: Annotated[
        bool, typer.Option("--soak", help="A long run: does the server's memory grow?")
    ] = False,
    seed: Annotated[
        int, typer.Option(help="Of observations, arrivals and environments.", min=0)
    ] = 0,
    max_connections: Annotated[
        int, typer.Option(help="Most connections of an open loop.", min=1)
    ] = 1000,
    timeout_s: Annotated[
        float, typer.Option(help="What is not answered in this time has failed.", min=0.1)
    ] = 10.0,
    max_p99_ms: Annotated[
        float | None, typer.Option(help="Exit 1 when the 99th percentile is above this.")
    ] = None,
    max_error_rate: Annotated[
        float, typer.Option(help="Exit 1 when more than this share of requests failed.")
    ] = 0.0,
    allow_rejected: Annotated[
        bool, typer.Option("--allow-rejected", help="Answers of 503 are no errors.")
    ] = False,
    max_memory_growth_mb_per_h: Annotated[
        float | None, typer.Option(help="Exit 1 when the server's memory grows faster.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Load test a served policy; leaves report.html, windows.csv and summary.json.

    With --rate the load is an open loop: requests are due at times of their own, and each latency
    counts from then. Otherwise it is a closed loop: a user asks again when it has its answer.
    Every answer's content is checked, not only its status.
    """
    is_queries = rate is not None or sweep is not None or sweep_rates is not None
    plan = LoadPlan(
        url=url,
        users=users,
        duration_s=duration_s or (DEFAULT_SOAK_S if soak else DEFAULT_DURATION_S),
        rate=rate,
        arrivals=arrivals,
        kind=kind or (Kind.queries if is_queries else Kind.both),
        protocol=protocol,
        batch_size=batch_size,
        num_envs=num_envs,
        env=env,
        seed=seed,
        max_connections=max_connections,
        timeout_s=timeout_s,
    )
    limits = Limits(max_p99_ms, max_error_rate, allow_rejected, max_memory_growth_mb_per_h)
    _run(_steps(plan, sweep, sweep_rates), output, limits, as_json=as_json)


def _run(plans: list[LoadPlan], output: Path, limits: Limits, *, as_json: bool) -> None:
    """Run all steps and print what came out.

    Raises:
        LoadTestError: A limit is broken.
    """
    summary = run_loadtest(plans, output, limits=limits, on_step=_tell_of(plans, as_json))
    if as_json:
        print(json.dumps(summary))
    else:
        _console.print(summary_table(plans[0].url, summary))
        for line in remarks(summary):
            _console.print(line, markup=False)
        _console.print(f"report: {output / 'report.html'}", markup=False)
    for line in broken_limits(summary, limits):
        raise LoadTestError(line)


def _steps(plan: LoadPlan, sweep: str | None, sweep_rates: str | None) -> list[LoadPlan]:
    """The plans of a sweep; of no sweep the plan itself."""
    if sweep is not None and (sweep_rates is not None or plan.is_open):
        raise LoadTestUsageError(
            "found --sweep beside a rate, expected one of them: users are of a closed loop, rates "
            "of an open one"
        )
    if sweep_rates is not None and plan.is_open:
        raise LoadTestUsageError("found --rate and --sweep-rates, expected one of them")
    if sweep is not None:
        users = _numbers(sweep, int, "--sweep")
        return [dataclasses.replace(plan, users=each) for each in users]
    if sweep_rates is not None:
        rates = _numbers(sweep_rates, float, "--sweep-rates")
        return [dataclasses.replace(plan, rate=each) for each in rates]
    return [plan]


def _numbers(text: str, kind: Callable[[str], _Number], option: str) -> list[_Number]:
    try:
        found = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found or not all(0 < each < 1e7 for each in found):
        raise LoadTestUsageError(f"found {option} {text!r}, expected positive numbers like 1,2,4,8")
    return found


def _tell_of(plans: list[LoadPlan], as_json: bool) -> Callable[[LoadPlan], None]:
    def tell(plan: LoadPlan) -> None:
        if not as_json and len(plans) > 1:
            _console.print(f"{plan.load} for {plan.duration_s:g} s", markup=False)

    return tell


def summary_table(url: str, summary: Mapping[str, Any]) -> Table:
    """The figures of a load test for people."""
    steps = summary.get("steps")
    title = f"load test of {url}, {summary['loop']} loop"
    if steps:
        table = Table(title=title, title_justify="left")
        for column in ("load", "requests/s", "p50 ms", "p99 ms", "errors", "server CPU"):
            table.add_column(column, justify="left" if column == "load" else "right")
        for each in steps:
            cpu = each["server_cpu_percent"]
            table.add_row(
                load_of(each),
                f"{each['requests_per_s']:,.0f}{'*' if each['driver_was_limit'] else ''}",
                _ms(each["p50_ms"]),
                _ms(each["p99_ms"]),
                f"{each['n_errors']:,}",
                "unknown" if cpu is None else f"{cpu:.0f} %",
            )
        return table
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("load", load_of(summary))
    table.add_row("requests/s", f"{summary['requests_per_s']:,.0f}{limit_note(summary)}")
    if summary["p50_ms"] is not None:
        table.add_row(
            "latency",
            f"p50 {_ms(summary['p50_ms'])} ms, p95 {_ms(summary['p95_ms'])} ms, "
            f"p99 {_ms(summary['p99_ms'])} ms",
        )
    rejected = f", {summary['n_rejected']:,} of them 503" if summary["n_rejected"] else ""
    table.add_row(
        "requests", f"{summary['n_requests']:,}, {summary['n_errors']:,} errors{rejected}"
    )
    if "mean_return" in summary:
        table.add_row(
            "episodes",
            f"{summary['n_episodes']}, mean return {summary['mean_return']:.1f} ± "
            f"{summary['std_return']:.1f}",
        )
    return table


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
