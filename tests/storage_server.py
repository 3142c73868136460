"""A real S3 server in a process of its own, with one bucket."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.processes import wait_until

BUCKET = "runs"


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[dict[str, str]]:
    """Run one on a free port for the block.

    Yields:
        The environment variables with which any S3 client finds it; its bucket is `BUCKET`.
    """
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:

        def address() -> str | None:
            assert process.poll() is None, log.read_text()
            found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
            return found and found[0]

        wait_until(lambda: address() is not None, "the S3 server listens")
        environment = {
            "AWS_ENDPOINT_URL": address() or "",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        bucket = f"{environment['AWS_ENDPOINT_URL']}/{BUCKET}"
        with urllib.request.urlopen(urllib.request.Request(bucket, method="PUT")) as made:
            assert made.status == 200
        yield environment
    finally:
        process.terminate()
        process.wait(30.0)
