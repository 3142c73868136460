"""The command `loadtest`: Locust, headless, against a served policy."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from loadtests.commands import installed, run
from loadtests.errors import LoadTestError, LoadTestUsageError

_console = Console(highlight=False, soft_wrap=True)
_LOCUSTFILE = Path(__file__).with_name("locustfile.py")


class Kind(str, enum.Enum):
    """Which users run."""

    queries = "queries"
    env_loops = "env-loops"
    both = "both"


_USER_CLASSES = {
    Kind.queries: ["ActionUser"],
    Kind.env_loops: ["EnvLoopUser"],
    Kind.both: ["ActionUser", "EnvLoopUser"],
}


class Protocol(str, enum.Enum):
    """How the users speak to the server."""

    http = "http"


def loadtest(
    url: Annotated[str, typer.Argument(help="http://HOST:PORT/v1/policies/NAME", metavar="URL")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where the report goes.", metavar="DIR")
    ],
    users: Annotated[int, typer.Option(help="Users at the same time.", min=1)] = 8,
    duration_s: Annotated[float, typer.Option(help="Seconds of load.", min=1)] = 10.0,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests/s of all users together [as fast as answers come].", min=0.001),
    ] = None,
    kind: Annotated[Kind, typer.Option(help="Action queries, environment loops, or both.")] = (
        Kind.both
    ),
    protocol: Annotated[Protocol, typer.Option(help="How to speak to the server.")] = Protocol.http,  # noqa: ARG001
    env: Annotated[
        str | None, typer.Option(help="Environment of the loops [the policy's own].", metavar="ID")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of observations and environments.", min=0)] = 0,
    max_p99_ms: Annotated[
        float | None, typer.Option(help="Exit 1 when the 99th percentile is above this.")
    ] = None,
    max_error_rate: Annotated[
        float, typer.Option(help="Exit 1 when more than this share of requests failed.")
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Load test a served policy; leaves report.html, stats.csv and summary.json.

    The load is a closed loop: a user asks again when it has its answer. Every answer's content
    is checked, not only its status.
    """
    summary = run_loadtest(
        url,
        output,
        users=users,
        duration_s=duration_s,
        rate=rate,
        kind=kind,
        env=env,
        seed=seed,
    )
    if as_json:
        print(json.dumps(summary))
    else:
        _console.print(summary_table(url, summary))
        _console.print(f"report: {output / 'report.html'}")
    check_limits(summary, max_p99_ms=max_p99_ms, max_error_rate=max_error_rate)


def run_loadtest(
    url: str,
    output: Path,
    *,
    users: int,
    duration_s: float,
    rate: float | None = None,
    kind: Kind = Kind.both,
    env: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run Locust in a process of its own and read what it left.

    Returns:
        The content of `summary.json`; docs/metrics.md explains each figure.

    Raises:
        LoadTestError: Locust failed, or no request was answered.
    """
    from serving.client import PolicyClient

    with PolicyClient(url) as client:
        described = client.describe()
        policy_url = client.policy_url
    if kind is not Kind.queries:
        _check_environment(env, described)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise LoadTestUsageError(f"cannot write to {output}: {exc.strerror or exc}") from exc
    summary_path = output / "summary.json"
    summary_path.unlink(missing_ok=True)
    command = [*installed("locust"), "-f", str(_LOCUSTFILE), "--headless"]
    command += ["--users", str(users), "--spawn-rate", str(users), "--duration-s", str(duration_s)]
    command += ["--csv", str(output / "locust"), "--html", str(output / "report.html")]
    command += ["--policy-url", policy_url, "--summary", str(summary_path), "--seed", str(seed)]
    command += ["--only-summary", "--loglevel", "WARNING", "--exit-code-on-error", "0"]
    command += ["--rate", str(rate)] if rate else []
    command += ["--env-id", env] if env else []
    done = run([*command, *_USER_CLASSES[kind]], capture=True)
    (output / "locust.log").write_text(done.stdout)
    if not summary_path.is_file():
        tail = done.stdout.strip().splitlines()[-1:] or ["no output"]
        raise LoadTestError(f"Locust left no summary (exit {done.returncode}): {tail[0]}")
    (output / "locust_stats.csv").replace(output / "stats.csv")
    for leftover in output.glob("locust_*.csv"):
        leftover.unlink()
    summary: dict[str, Any] = json.loads(summary_path.read_text())
    return summary


def _check_environment(env: str | None, described: dict[str, Any]) -> None:
    """Find out before the load, not in it, that there is nothing to step."""
    from serving.rollout import check_spaces, make_env, policy_environment

    env_id, kwargs = policy_environment(described, env)
    if env_id is None:
        raise LoadTestUsageError("the policy names no environment: give --env, or --kind queries")
    made = make_env(env_id, **kwargs)
    try:
        check_spaces(env_id, made, described)
    finally:
        made.close()


def check_limits(
    summary: dict[str, Any], *, max_p99_ms: float | None, max_error_rate: float
) -> None:
    """Raise if a run broke its limits.

    Raises:
        LoadTestError: Too many errors, no answer at all, or too slow.
    """
    n = summary["n_requests"]
    if n == summary["n_errors"]:
        raise LoadTestError(f"none of {n} requests was answered: {_first_error(summary)}")
    error_rate = summary["n_errors"] / n
    if error_rate > max_error_rate:
        raise LoadTestError(
            f"{summary['n_errors']} of {n} requests failed ({error_rate:.2%}, the limit is "
            f"{max_error_rate:.2%}): {_first_error(summary)}"
        )
    if max_p99_ms is not None and summary["p99_ms"] > max_p99_ms:
        raise LoadTestError(
            f"the 99th percentile was {summary['p99_ms']:.2f} ms, the limit is {max_p99_ms:g} ms"
        )


def _first_error(summary: dict[str, Any]) -> str:
    return next(iter(summary["errors"]), "no reason given")


def summary_table(url: str, summary: dict[str, Any]) -> Table:
    """The figures of a load test for people."""
    table = Table(title=f"load test of {url}", show_header=False, title_justify="left")
    table.add_row("load", f"{summary['users']} users, {summary['loop']} loop")
    table.add_row("requests/s", f"{summary['requests_per_s']:,.0f}{limit_note(summary)}")
    if summary["p50_ms"] is not None:
        table.add_row(
            "latency",
            f"p50 {summary['p50_ms']:.2f} ms, p95 {summary['p95_ms']:.2f} ms, p99 "
            f"{summary['p99_ms']:.2f} ms",
        )
    table.add_row("requests", f"{summary['n_requests']:,}, {summary['n_errors']} errors")
    if "mean_return" in summary:
        table.add_row(
            "episodes",
            f"{summary['n_episodes']}, mean return {summary['mean_return']:.1f} ± "
            f"{summary['std_return']:.1f}",
        )
    return table


def limit_note(summary: dict[str, Any]) -> str:
    """What kept the rate from being the server's own, or an empty string."""
    if summary["driver_was_limit"]:
        return " (the driver was the limit: the server can do more)"
    if summary["machine_was_limit"]:
        return " (driver and server filled the machine together: the server alone can do more)"
    return ""
