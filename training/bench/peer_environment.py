"""Stable-Baselines3 in a virtual environment of its own, made on first use."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from training.errors import TrainingError

REQUIREMENTS = Path(__file__).parent / "requirements" / "sb3.txt"
_STAMP = "installed"


def peer_python(directory: Path) -> Path:
    """Install the peer, if that is not done, and give its Python.

    Args:
        directory: Where the environment is, or is made.

    Raises:
        TrainingError: It can't be installed here; the reason.
    """
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.executable.encode()).hexdigest()
    python, stamp = directory / "bin" / "python", directory / _STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    _run(sys.executable, "-m", "venv", str(directory))
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    # torch first and for the CPU: the index's own build brings gigabytes for GPUs.
    torch = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("torch"))
    cpu_index = "https://download.pytorch.org/whl/cpu"
    try:
        _run(*pip, torch, "--index-url", cpu_index, "--retries", "1", "--timeout", "15")
    except TrainingError:  # a mirror that has the CPU's build alone, or no way to that index
        _run(*pip, torch)
    _run(*pip, "-r", str(REQUIREMENTS))
    stamp.write_text(wanted, encoding="utf-8")
    return python


def pinned(package: str) -> str:
    """The version of a distribution in the peer's requirements."""
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        name, _, version = line.partition("==")
        if name == package:
            return version
    raise TrainingError(f"{REQUIREMENTS.name} does not pin {package}")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise TrainingError(
            f"Stable-Baselines3 could not be installed: {errors[-1] if errors else 'no reason'}"
        )
