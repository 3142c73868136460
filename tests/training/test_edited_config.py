"""What a run directory's config names is followed only as far as the signed checkpoint agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.processes import refuse
from training.config_files import dump_config, load_config
from training.provenance import sign_checkpoint
from training.run_directory import RunDirectory
from training.run_facts import run_facts


def signed_run(path: Path) -> RunDirectory:
    """A run directory with a checkpoint that this user signed; nothing of it is unpickled here."""
    run = RunDirectory(path / "run")
    config = load_config(flags={"env": "CartPole-v1"}).complete()
    run.create(run_facts(config), dump_config(config))
    facts = {"env": "CartPole-v1", "env_config": {}, "wrappers": [], "module": None}

    def write(checkpoint: Path) -> None:
        (checkpoint / "rllib_checkpoint.json").write_text("{}")
        sign_checkpoint(checkpoint, facts)

    run.save_checkpoint(1, write)
    return run


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("env", "os:remove"),
        ("env_config", {"path": "x"}),
        ("wrappers", ["os:remove"]),
        ("model", {"module": "os:remove"}),
    ],
)
def test_what_an_edited_config_names_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, value: Any
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    run = signed_run(tmp_path)
    document = yaml.safe_load(run.config_file.read_text())
    document[section] = {**document[section], **value} if section == "model" else value
    run.config_file.write_text(yaml.safe_dump(document))
    said = refuse("train", "--resume", run.path, exit_code=1)
    assert "the file was edited since" in said
    assert f"`{section}" in said
