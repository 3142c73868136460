"""Settings: defaults, then YAML, then flags."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from serving.config import PolicySource, ServingConfig, build_config
from serving.errors import ServingConfigError


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "serve.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_flags_beat_yaml_and_yaml_beats_defaults(yaml_file):
    path = yaml_file("port: 9000\nreplicas: 4\n")
    config = build_config(path, {"port": 9100, "replicas": None, "host": None})
    assert (config.port, config.replicas, config.host) == (9100, 4, "127.0.0.1")


def test_without_a_word_a_server_listens_on_this_machine_alone():
    assert build_config(None, {}).host == "127.0.0.1"
    assert build_config(None, {}) == ServingConfig()


def test_an_empty_file_changes_nothing(yaml_file):
    assert build_config(yaml_file("# nothing\n"), {}) == ServingConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 9000", "unknown setting 'prot'; did you mean 'port'?"),
        ("max_batchsize: 1", "did you mean 'max_batch_size'?"),
        ("colour: red", "unknown setting 'colour'"),
        ("1: 2", "unknown setting '1'"),
        ("port: 70000", "port = 70000: input should be less than or equal to 65535"),
        ("port: many", "port = 'many'"),
        ("replicas: 0", "replicas = 0"),
        ("device: tpu", "device = 'tpu'"),
        ("engine: jax", "'onnx', 'torchscript', 'pt2' or 'auto'"),
        ("- port", "holds list, expected settings"),
        ("port", "holds str, expected settings"),
        ("port: [", "not readable as YAML"),
        ("port: !!python/object/apply:os.getcwd []", "not readable as YAML"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(yaml_file, text: str, message: str):
    path = yaml_file(text)
    with pytest.raises(ServingConfigError) as caught:
        build_config(path, {})
    assert message in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.exit_code == 2


def test_a_file_that_is_not_there_or_not_text_is_told_so(tmp_path: Path):
    with pytest.raises(ServingConfigError, match="not readable as YAML"):
        build_config(tmp_path / "nowhere.yaml", {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ServingConfigError, match="not readable as YAML"):
        build_config(tmp_path / "binary", {})


def test_a_wrong_flag_names_the_command_line():
    with pytest.raises(ServingConfigError, match="the command line: port = -1"):
        build_config(None, {"port": -1})


def test_settings_cannot_be_changed_or_misspelt():
    config = ServingConfig()
    with pytest.raises(ValidationError):
        config.port = 1
    with pytest.raises(ValidationError):
        ServingConfig(prot=1)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "a\n"])
def test_a_policy_s_name_fits_into_a_url(name: str):
    with pytest.raises(ValidationError):
        PolicySource(name=name, path=Path("bundle"))
