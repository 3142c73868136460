"""A virtual environment for each peer, made once and made again when its requirements change."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtests.errors import LoadTestError

REQUIREMENTS = Path(__file__).parents[1] / "peers" / "requirements"
# Peers that embed Python and so need one whose library is shared.
_NEEDS_SHARED_LIBRARY = frozenset({"triton"})
_STAMP = "installed"


def prepare_environment(name: str, directory: Path) -> Path:
    """Install a peer, if that is not done.

    Args:
        name: Of its requirements file.
        directory: Where the environments are.

    Returns:
        Its Python.

    Raises:
        LoadTestError: It cannot be installed here; the reason.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    base = _base_python(name)
    wanted = hashlib.sha256(requirements.read_bytes() + base.encode()).hexdigest()
    environment = directory / name
    python, stamp = environment / "bin" / "python", environment / _STAMP
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(environment, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    _run([base, "-m", "venv", str(environment)], f"no environment for {name}")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*install, "-r", str(requirements)], f"{name} could not be installed")
    stamp.write_text(wanted)
    return python


def pinned_version(environment: str, package: str) -> str:
    """The version of a distribution in a peer's requirements."""
    for line in (REQUIREMENTS / f"{environment}.txt").read_text().splitlines():
        name, _, version = line.partition(";")[0].strip().partition("==")
        if name == package:
            return version
    raise LoadTestError(f"{environment}.txt does not pin {package}")


def _base_python(name: str) -> str:
    if name not in _NEEDS_SHARED_LIBRARY:
        return sys.executable
    # The distribution's own first: the dynamic loader finds its library and no other's.
    system = [f"/usr/bin/python3.{minor}" for minor in range(sys.version_info.minor, 9, -1)]
    for candidate in (*system, sys.executable):
        if _has_shared_library(candidate):
            return candidate
    raise LoadTestError(
        f"{name} embeds Python and needs one with a shared library, as distributions' own have; "
        "neither /usr/bin nor this environment has one"
    )


def _has_shared_library(python: str) -> bool:
    question = "import sysconfig; print(sysconfig.get_config_var('Py_ENABLE_SHARED'))"
    try:
        done = subprocess.run([python, "-c", question], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.stdout.strip() == "1"


def _run(command: Sequence[str], problem: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise LoadTestError(f"{problem}: {errors[-1] if errors else 'no reason given'}")
