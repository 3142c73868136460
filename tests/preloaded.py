"""A process that has imported RLlib and torch, and forks for every command that needs them.

Importing them takes five seconds of a core, which most tests would spend before anything that they
look at begins. A command still runs in a process of its own, from its first line to its exit
status. The process that forks has read no file of this project, started no thread of Python's, no
Ray and no runtime. What is read at an import (Ray's switches) is what `training` itself sets, so a
test that changes those, or looks at a start, starts a new interpreter instead.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

ROOT = Path(__file__).parent.parent
_MODULES = (
    "ray.rllib.algorithms.ppo",
    "torch._dynamo",
    "torch.onnx",
    "onnxscript",
    "gymnasium",
    "typer",
)
# Ray's and jemalloc's own thread, which takes care of forks itself; nobody else's.
_THREADS = {"python", "python3", "jemalloc_bg_thd"}
_MESSAGE_BYTES = 2**20


class Preloaded:
    """The forking process, as its owner sees it; started by the first command."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._channel: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENTS`, of the form `-m MODULE ...` or `-c CODE ...`, to its end.

        Raises:
            subprocess.TimeoutExpired: It took longer; it was killed.
        """
        with (
            self._lock,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as err,
        ):
            channel = self._started()
            request = {"arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}
            socket.send_fds(channel, [json.dumps(request).encode()], [out.fileno(), err.fileno()])
            pid = int(channel.recv(_MESSAGE_BYTES))
            channel.settimeout(timeout_s)
            try:
                returncode = int(channel.recv(_MESSAGE_BYTES))
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                channel.settimeout(None)
                channel.recv(_MESSAGE_BYTES)
                raise subprocess.TimeoutExpired(list(arguments), timeout_s) from None
            finally:
                channel.settimeout(None)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        return subprocess.CompletedProcess(list(arguments), returncode, *texts)

    def _started(self) -> socket.socket:
        if self._channel is None:
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, __file__, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    cwd=ROOT,
                )
        return self._channel

    def stop(self) -> None:
        """End the forking process."""
        if self._channel is not None and self._process is not None:
            self._channel.close()
            self._process.wait(60.0)
            self._channel = self._process = None


def _preload() -> dict[str, str]:
    """Import what takes long; the environment variables that this set."""
    before = dict(os.environ)
    # Ray reads its switches while it is imported.
    from training.ray_environment import set_ray_environment

    set_ray_environment()
    for name in _MODULES:
        importlib.import_module(name)
    assert threading.active_count() == 1, threading.enumerate()
    tasks = {path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
    assert tasks <= _THREADS, f"threads would be lost in a fork: {tasks}"
    # Whoever is forked neither walks nor copies what is here already.
    gc.collect()
    gc.freeze()
    return {name: value for name, value in os.environ.items() if before.get(name) != value}


def _become(request: Mapping[str, Any], files: Sequence[int], kept: Mapping[str, str]) -> None:
    """Run what was asked for in this process, as a new interpreter would."""
    for number, file in enumerate(files, start=1):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update({**request["env"], **kept})
    found = os.environ.get("PYTHONPATH", "")
    sys.path[:1] = [request["cwd"], *filter(None, found.split(os.pathsep))]
    numpy = importlib.import_module("numpy")
    numpy.random.seed()  # each fork has the same numbers before it; Python's own it draws anew
    option, what, *rest = request["arguments"]
    module = types.ModuleType("__main__")
    code: Any
    # Not by runpy: RLlib looks at its callers' files, and searches every module for each frame
    # that has none.
    if option == "-m":
        module.__spec__ = importlib.util.find_spec(what)
        assert module.__spec__ is not None
        module.__file__ = module.__spec__.origin
        code = cast(Any, module.__spec__.loader).get_code(what)
    else:
        code = compile(what, "<string>", "exec")
    sys.argv = [module.__file__ or "" if option == "-m" else option, *rest]
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


def main(channel_number: int) -> NoReturn:
    """Fork for each request until the channel closes."""
    kept = _preload()
    with socket.socket(fileno=channel_number) as channel:
        while True:
            message, files, *_ = socket.recv_fds(channel, _MESSAGE_BYTES, 2)
            if not message:
                sys.exit(0)
            pid = os.fork()
            if pid == 0:
                channel.close()
                _become(json.loads(message), files, kept)
                sys.exit(0)
            for file in files:
                os.close(file)
            channel.send(str(pid).encode())
            _, status = os.waitpid(pid, 0)
            channel.send(str(os.waitstatus_to_exitcode(status)).encode())


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    main(int(sys.argv[1]))
