from __future__ import annotations

import hashlib
import hmac
import json
import stat

import pytest

from training.provenance import (
    SIGNATURE_FILE,
    describe_checkpoint,
    ensure_key,
    key_path,
    sign_checkpoint,
    verify_checkpoint,
)

FACTS = {"env": "CartPole-v1", "env_config": {}, "iteration": 7, "env_steps": 7168}


@pytest.fixture(autouse=True)
def user_home(tmp_path, monkeypatch):
    home = tmp_path / "share"
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    return home


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint"
    (path / "learner").mkdir(parents=True)
    (path / "rllib_checkpoint.json").write_text("{}")
    (path / "learner" / "state.pkl").write_bytes(b"weights")
    return path


@pytest.fixture
def signed(checkpoint):
    sign_checkpoint(checkpoint, FACTS)
    return checkpoint


def edit(checkpoint, **changes):
    file = checkpoint / SIGNATURE_FILE
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, **changes}))


def test_a_checkpoint_of_this_user_is_trusted_and_gives_its_facts(signed):
    provenance = verify_checkpoint(signed)
    assert provenance.is_trusted
    assert {name: provenance.facts[name] for name in FACTS} == FACTS


def test_the_signature_is_the_documented_one(signed):
    document = json.loads((signed / SIGNATURE_FILE).read_text())
    assert document["format"] == "policyserve-checkpoint"
    assert document["format_version"] == 1
    assert document["files"] == {
        "learner/state.pkl": hashlib.sha256(b"weights").hexdigest(),
        "rllib_checkpoint.json": hashlib.sha256(b"{}").hexdigest(),
    }
    claimed = document.pop("hmac")
    text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    key = key_path().read_bytes()
    assert claimed == hmac.new(key, text, hashlib.sha256).hexdigest()


def test_the_key_is_secret_made_once_and_kept(user_home):
    key = ensure_key()
    assert len(key) == 32
    assert ensure_key() == key
    path = user_home / "policyserve" / "run-key"
    assert path.read_bytes() == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["run-key"]


def test_without_a_data_home_the_key_is_under_local_share(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME")
    assert key_path() == tmp_path / ".local" / "share" / "policyserve" / "run-key"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert key_path() == tmp_path / ".local" / "share" / "policyserve" / "run-key"


def test_no_signature_is_not_trusted(checkpoint):
    provenance = verify_checkpoint(checkpoint)
    assert not provenance.is_trusted
    assert "no signature" in provenance.reason


def test_a_described_checkpoint_is_not_trusted_but_has_facts(checkpoint):
    describe_checkpoint(checkpoint, FACTS)
    provenance = verify_checkpoint(checkpoint)
    assert not provenance.is_trusted
    assert provenance.facts["iteration"] == 7


def test_another_users_checkpoint_is_not_trusted(signed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "other"))
    assert not verify_checkpoint(signed).is_trusted  # a user who never trained
    ensure_key()
    provenance = verify_checkpoint(signed)
    assert not provenance.is_trusted
    assert "not this user's" in provenance.reason


def test_a_changed_file_is_named(signed):
    (signed / "learner" / "state.pkl").write_bytes(b"WEIGHTS")
    provenance = verify_checkpoint(signed)
    assert not provenance.is_trusted
    assert "changed" in provenance.reason
    assert "learner/state.pkl" in provenance.reason


def test_a_missing_file_is_named(signed):
    (signed / "learner" / "state.pkl").unlink()
    provenance = verify_checkpoint(signed)
    assert not provenance.is_trusted
    assert "missing" in provenance.reason
    assert "learner/state.pkl" in provenance.reason


def test_an_extra_file_is_named(signed):
    (signed / "learner" / "evil.pkl").write_bytes(b"")
    provenance = verify_checkpoint(signed)
    assert not provenance.is_trusted
    assert "added" in provenance.reason
    assert "learner/evil.pkl" in provenance.reason


def test_a_link_in_place_of_a_file_is_noticed(signed, tmp_path):
    file = signed / "learner" / "state.pkl"
    (tmp_path / "same").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "same")
    assert not verify_checkpoint(signed).is_trusted


def test_a_linked_folder_is_noticed(signed, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (signed / "more").symlink_to(tmp_path / "elsewhere")
    assert "more" in verify_checkpoint(signed).reason


def test_edited_facts_and_file_lists_are_noticed(signed):
    edit(signed, env="Acrobot-v1")
    assert not verify_checkpoint(signed).is_trusted
    (signed / "learner" / "state.pkl").write_bytes(b"EVIL")
    digest = hashlib.sha256(b"EVIL").hexdigest()
    edit(signed, env="CartPole-v1", files={"learner/state.pkl": digest})
    assert "not this user's" in verify_checkpoint(signed).reason


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[" * 100_000, '{"format": "other"}', '{"format": "policyserve-checkpoint"}'],
)
def test_a_damaged_signature_is_an_answer_and_no_exception(signed, text):
    (signed / SIGNATURE_FILE).write_text(text)
    assert not verify_checkpoint(signed).is_trusted


@pytest.mark.parametrize("files", [None, [], {"rllib_checkpoint.json": 3}])
def test_a_malformed_file_list_is_an_answer_and_no_exception(signed, files):
    edit(signed, files=files)
    assert not verify_checkpoint(signed).is_trusted


def test_a_damaged_key_is_an_answer_and_no_exception(signed):
    key_path().write_bytes(b"short")
    provenance = verify_checkpoint(signed)
    assert not provenance.is_trusted
    assert "run-key" in provenance.reason


def test_a_user_without_a_home_gets_an_answer_and_no_exception(signed, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    found = verify_checkpoint(signed)
    assert not found.is_trusted
    assert "home directory" in found.reason


@pytest.mark.parametrize("changes", [{"env_steps": float("nan")}, {"hmac": "\ud800"}])
def test_values_that_train_never_writes_are_an_answer_and_no_exception(signed, changes):
    edit(signed, **changes)
    assert "not this user's" in verify_checkpoint(signed).reason
