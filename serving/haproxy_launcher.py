"""Started by Ray in HAProxy's place: mend five habits of the pair, then become HAProxy.

1. HAProxy outlives a driver or actor that is killed, keeps the public port, and answers the next
   server's callers with errors. Here the kernel ends it with its parent.
2. Its metrics and statistics listeners bind every interface of the machine. Here they bind the
   loopback one.
3. Ray turns its 502, 503 and 504 into a bare 500, and its own 400 and 408 are HTML. Here they are
   problem+json; the first three a 503, which tells a client to try again.
4. Ray points HAProxy at 127.0.0.1 for replicas of its own node, also where they listen on
   another address.
5. Ray has HAProxy write a line for every request and send it to a log server at 127.0.0.1:514,
   which hardly anybody has: a fifth of its time. Here it logs only where a server was named.

Runs under `python -IS`: standard library only, and fast.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from pathlib import Path

BINARY_VARIABLE = "POLICYSERVE_HAPROXY_BINARY"
REPLICA_HOST_VARIABLE = "POLICYSERVE_REPLICA_HOST"
LOG_TARGET_VARIABLE = "RAY_SERVE_HAPROXY_LOG_TARGET"  # Ray's own
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# status: (code, title, detail, further headers); what HAProxy says without asking a replica.
_ANSWERS = {
    400: ("malformed_request", "Malformed request", "this is not an HTTP request", ""),
    408: ("malformed_request", "Malformed request", "the request did not arrive in time", ""),
    503: (
        "policy_not_ready",
        "Policy not ready",
        "no replica can answer now; try again",
        "retry-after: 1\r\n",
    ),
}


def _answer(status: int) -> str:
    code, title, detail, headers = _ANSWERS[status]
    body = (
        f'{{"type":"about:blank","title":"{title}","status":{status},"code":"{code}",'
        f'"detail":"{detail}"}}'
    )
    return (
        f"HTTP/1.1 {status} {title}\r\ncontent-type: application/problem+json\r\n"
        f"content-length: {len(body)}\r\n{headers}connection: close\r\n\r\n{body}"
    )


def error_file(directory: Path, status: int) -> Path:
    """Where HAProxy finds its own answer of a status."""
    return directory / f"policyserve-{status}.http"


def rewritten(config: str, directory: Path, replica_host: str, *, logs: bool = False) -> str:
    """Ray's HAProxy configuration with the changes that this module's docstring lists.

    Args:
        config: The configuration as Ray wrote it, or as this function did.
        directory: Where the error answers lie.
        replica_host: Where replicas of this node listen.
        logs: Keep the log of requests.
    """

    def replace(pattern: str, replacement: str, text: str) -> str:
        return re.sub(pattern, replacement, text, flags=re.MULTILINE)

    config = replace(
        r"^((?:frontend prometheus|listen stats)\n\s*bind )\*?(?=:\d+$)", r"\g<1>127.0.0.1", config
    )
    config = replace(r"^(\s*server \S+ )127\.0\.0\.1(?=:\d+ )", rf"\g<1>{replica_host}", config)
    if not logs:
        config = replace(r"^\s*(?:log \S+ local0 info|log global|option httplog)\n", "", config)
    config = replace(r"^\s*errorfile \d+ .*\n", "", config)
    pages = {400: 400, 408: 408, 502: 503, 503: 503, 504: 503}
    lines = [
        f"    errorfile {found} {error_file(directory, ours)}" for found, ours in pages.items()
    ]
    return replace(r"^(defaults\n)", "\\1" + "\n".join(lines) + "\n", config)


def main() -> None:
    """Rewrite the file given with `-f`, tie this process to its parent, become HAProxy."""
    arguments = sys.argv[1:]
    if "-f" in arguments:
        path = Path(arguments[arguments.index("-f") + 1])
        for status in _ANSWERS:
            error_file(path.parent, status).write_bytes(_answer(status).encode())
        config = rewritten(
            path.read_text(),
            path.parent,
            os.environ[REPLICA_HOST_VARIABLE],
            logs=LOG_TARGET_VARIABLE in os.environ,
        )
        path.write_text(config)
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the kernel was told
        sys.exit(1)
    binary = os.environ[BINARY_VARIABLE]
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main()
