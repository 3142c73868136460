"""The driver of queries, in a process of its own: nothing but the load takes its time.

`python -m loadtests.driver PLAN OUTPUT`; one core sends some 30,000 requests per second.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
import time
from pathlib import Path
from time import perf_counter

import uvloop

from loadtests.closed_loop import ClosedLoop
from loadtests.connections import Dialler, dialler
from loadtests.open_loop import OpenLoop
from loadtests.plan import LoadPlan, Protocol, plan_from_json
from loadtests.questions import N_QUESTIONS, Questions, make_questions
from serving.client import PolicyClient
from serving.endpoint import Endpoint
from serving.errors import PolicyServingError


async def drive(plan: LoadPlan, questions: Questions, dial: Dialler, output: Path) -> None:
    """Run the load of a plan and write its recording."""
    load = OpenLoop(plan, questions, dial) if plan.is_open else ClosedLoop(plan, questions, dial)
    gc.freeze()  # what is there already is no work for the collector while the load runs
    wall, cpu = perf_counter(), time.process_time()
    await load.run()
    cpu_percent = 100.0 * (time.process_time() - cpu) / (perf_counter() - wall)
    load.recorder.save(
        output,
        started=load.started,
        ended=load.ended,
        cpu_percent=cpu_percent,
        n_connections=load.most_connections,
        n_retries=load.n_retries,
    )


def _allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_driver(plan: LoadPlan, output: Path, *, n_questions: int = N_QUESTIONS) -> None:
    """Ask each question once, then load.

    Raises:
        PolicyServingError: The server refuses the questions, or does not answer.
    """
    endpoint = Endpoint(plan.url, None, 0, 0.0)
    with PolicyClient(
        plan.url, encoding=plan.protocol.encoding, timeout_s=plan.timeout_s
    ) as client:
        questions = make_questions(
            client, seed=plan.seed, batch_size=plan.batch_size, n_questions=n_questions
        )
        content_type = client.dialect().content_type
    dial = dialler(
        endpoint,
        questions,
        content_type=content_type,
        is_stream=plan.protocol is Protocol.ws,
        timeout_s=plan.timeout_s,
    )
    _allow_many_files()
    uvloop.run(drive(plan, questions, dial, output))


def main() -> None:
    """A driver's process: PLAN OUTPUT."""
    plan, output = sys.argv[1:]
    try:
        run_driver(plan_from_json(plan), Path(output))
    except PolicyServingError as exc:
        sys.exit(exc.message)


if __name__ == "__main__":
    main()
