from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT
from training.private_directory import LOCK_FILE, PREFIX, delete_leftovers, private_directory

HOLDER = """
import sys, time
from pathlib import Path
from training.private_directory import private_directory
with private_directory(Path(sys.argv[1])) as directory:
    print(directory, flush=True)
    sys.stdin.read()
"""


def test_it_is_closed_to_other_users_and_gone_afterwards(tmp_path: Path) -> None:
    with private_directory(tmp_path) as directory:
        assert directory.parent == tmp_path
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        (directory / "r").mkdir()
        (directory / "r").chmod(0o777)  # as Ray does
    assert list(tmp_path.iterdir()) == []


def test_it_is_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), private_directory(tmp_path):
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


def test_rays_sockets_fit_below_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What Ray 2.60 puts below its directory, with the largest process id that Linux gives.
    longest = "session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store"
    for temporary in (Path("/tmp"), tmp_path):
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        with private_directory() as directory:
            # Linux's unix(7): sun_path has 108 bytes, the last of them 0.
            assert len(os.fsencode(directory / "r" / longest)) <= 107


def test_a_killed_runs_directory_is_deleted_and_a_living_ones_is_not(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        living = Path(holder.stdout.readline().strip())
        assert (living / LOCK_FILE).exists()
        delete_leftovers(tmp_path)
        assert living.exists()
    finally:
        holder.kill()
        holder.communicate(timeout=30)
    assert living.exists()
    with private_directory(tmp_path) as next_one:
        assert list(tmp_path.iterdir()) == [next_one]


def test_what_is_not_a_leftover_stays(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}starting").mkdir()  # another run has not locked it yet
    (tmp_path / f"{PREFIX}file").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / LOCK_FILE).touch()
    (tmp_path / f"{PREFIX}link").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    delete_leftovers(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
