"""The format on disk: every kind of damage is found, and writing is all or nothing."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.bundle import (
    GOLDEN,
    MANIFEST,
    ONNX,
    NoiseSpec,
    read_bundle,
    replacing_bundle,
    sha256_of,
    write_manifest,
)
from serving.errors import BundleError, ChecksumError, ManifestError
from tests.bundles import LinearPolicy, discrete_policy


@pytest.fixture
def bundle(bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A bundle of the test's own."""
    return Path(shutil.copytree(bundles["discrete"], tmp_path / "bundle"))


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((bundle / MANIFEST).read_text())
    replaced = change(raw)
    (bundle / MANIFEST).write_text(json.dumps(signed(raw if replaced is None else replaced)))


def signed(raw: Any) -> Any:
    """The manifest with the digest of its new content, as somebody with bad intent would."""
    if not isinstance(raw, dict):
        return raw
    raw = {key: value for key, value in raw.items() if key != "manifest_sha256"}
    text = json.dumps(raw, sort_keys=True, separators=(",", ":"))
    return {**raw, "manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Replace a file and give the manifest its checksum, as somebody with bad intent would."""
    (bundle / name).write_bytes(content)
    entry = {"sha256": sha256_of(bundle / name), "size_bytes": len(content)}
    edit_manifest(bundle, lambda raw: raw["files"].update({name: entry}))
    if name == ONNX:
        edit_manifest(bundle, lambda raw: raw.update(policy_id=entry["sha256"][:12]))


def test_a_bundle_reads_back_as_written(bundle: Path, discrete: LinearPolicy):
    found = read_bundle(bundle)
    manifest = found.manifest
    assert manifest.policy_id == sha256_of(bundle / ONNX)[:12]
    assert manifest.algorithm == "PPO"
    assert manifest.observation_space.shape == (4,)
    assert manifest.action_space.shape == ()
    assert (manifest.noise.distribution, manifest.noise.size) == ("gumbel", 3)
    assert manifest.outputs == discrete.outputs
    assert manifest.has_value
    assert set(manifest.files) == {ONNX, GOLDEN}
    assert manifest.environment == {"id": "Tiny-v0", "kwargs": {}}
    golden = found.golden()
    for name, values in discrete.golden().items():
        np.testing.assert_array_equal(golden[name], values)


def test_a_file_that_the_bundle_lacks_is_named_with_those_it_has(bundle: Path):
    with pytest.raises(BundleError, match=r"policy\.torchscript\.pt.*golden\.npz, policy\.onnx"):
        read_bundle(bundle).file("policy.torchscript.pt")


@pytest.mark.parametrize("name", [ONNX, GOLDEN])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit_in_any_file_is_found(bundle: Path, name: str, where: str):
    content = bytearray((bundle / name).read_bytes())
    content[{"first": 0, "middle": len(content) // 2, "last": -1}[where]] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(ChecksumError, match="damaged") as caught:
        read_bundle(bundle)
    assert caught.value.details["file"] == name


@pytest.mark.parametrize("name", [ONNX, GOLDEN])
def test_a_file_cut_short_longer_or_missing_is_found(bundle: Path, name: str):
    content = (bundle / name).read_bytes()
    for damaged in (content[:-1], content + b"\0", b""):
        (bundle / name).write_bytes(damaged)
        with pytest.raises(ChecksumError, match=f"{len(damaged)} bytes"):
            read_bundle(bundle)
    (bundle / name).unlink()
    with pytest.raises(ChecksumError, match="missing"):
        read_bundle(bundle)


def test_a_directory_that_is_no_bundle_is_told_so(tmp_path: Path):
    with pytest.raises(ManifestError, match="no such directory"):
        read_bundle(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match=r"has no manifest\.json"):
        read_bundle(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut short"),
        pytest.param(b"\xff\xfe\x00", id="not UTF-8"),
        pytest.param(b"[]", id="an array"),
        pytest.param(b"null", id="null"),
        pytest.param(b"{}", id="no format"),
        pytest.param(b'{"format": "other"}', id="another format"),
        pytest.param(b"[" * 100_000, id="100,000 brackets"),
    ],
)
def test_a_garbled_manifest_is_refused(bundle: Path, content: bytes):
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(ManifestError):
        read_bundle(bundle)


def test_a_huge_manifest_is_not_even_read(bundle: Path):
    with (bundle / MANIFEST).open("r+b") as file:
        file.truncate(16 * 1024 * 1024 + 1)
    with pytest.raises(ManifestError, match="larger than"):
        read_bundle(bundle)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_says_to_export_again(bundle: Path, version: Any):
    edit_manifest(bundle, lambda raw: raw.update(format_version=version))
    with pytest.raises(ManifestError, match="export the policy again"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "key",
    [
        "policy_id",
        "algorithm",
        "observation_space",
        "action_space",
        "distribution",
        "noise",
        "outputs",
        "files",
    ],
)
@pytest.mark.parametrize("value", ["missing", None, 5])
def test_a_manifest_without_a_needed_fact_is_refused(bundle: Path, key: str, value: Any):
    def change(raw: dict[str, Any]) -> None:
        if value == "missing":
            del raw[key]
        else:
            raw[key] = value

    edit_manifest(bundle, change)
    if key == "algorithm" and value != "missing":
        read_bundle(bundle)  # any text is taken here
        return
    with pytest.raises(ManifestError):
        read_bundle(bundle)


def test_an_infinite_size_is_a_manifest_error(bundle: Path):
    edit_manifest(bundle, lambda raw: raw["noise"].update(size=math.inf))
    with pytest.raises(ManifestError):
        read_bundle(bundle)


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed(bundle: Path):
    path = bundle / MANIFEST
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        if whole[place : place + 1].isspace():
            continue
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(BundleError):
            read_bundle(bundle)


@pytest.mark.parametrize(
    ("key", "value"),
    [("distribution", "gulbel"), ("noise", {"distribution": "gulbel", "size": 3})],
)
def test_a_distribution_that_nobody_knows_is_refused(bundle: Path, key: str, value: Any):
    edit_manifest(bundle, lambda raw: raw.update({key: value}))
    with pytest.raises(ManifestError, match="gulbel"):
        read_bundle(bundle)


def test_a_discrete_observation_space_is_refused(bundle: Path):
    edit_manifest(
        bundle, lambda raw: raw.update(observation_space={"type": "Discrete", "n": 3, "start": 0})
    )
    with pytest.raises(ManifestError, match="not a Box"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "./policy.onnx", "..", ".", "", MANIFEST, "a\0b"]
)
def test_a_file_name_that_leaves_the_bundle_is_refused(bundle: Path, name: str):
    (bundle.parent / "secret").write_bytes(b"secret")
    entry = {"sha256": sha256_of(bundle.parent / "secret"), "size_bytes": 6}
    edit_manifest(bundle, lambda raw: raw["files"].update({name: entry}))
    with pytest.raises(BundleError):
        read_bundle(bundle)


@pytest.mark.parametrize("name", [ONNX, GOLDEN])
def test_a_manifest_has_to_list_the_graph_and_its_proof(bundle: Path, name: str):
    edit_manifest(bundle, lambda raw: raw["files"].__delitem__(name))
    with pytest.raises(ManifestError, match=f"lists no {name}"):
        read_bundle(bundle)


def test_a_policy_id_of_another_graph_is_refused(bundle: Path):
    edit_manifest(bundle, lambda raw: raw.update(policy_id="0" * 12))
    with pytest.raises(ManifestError, match="policy_id"):
        read_bundle(bundle)


class _Unpickled:
    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (setattr, (_Unpickled, "ran", True))


def test_golden_vectors_that_hold_a_pickle_are_refused_unopened(bundle: Path, tmp_path: Path):
    archive = tmp_path / "evil.npz"
    np.savez(archive, observation=np.array([_Unpickled()], dtype=object))
    replace_file(bundle, GOLDEN, archive.read_bytes())
    with pytest.raises(BundleError):
        read_bundle(bundle).golden()
    assert not _Unpickled.ran


def _npy(tmp_path: Path) -> bytes:
    np.save(tmp_path / "plain.npy", np.zeros(3))
    return (tmp_path / "plain.npy").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda _, __: b"", id="empty"),
        pytest.param(lambda _, __: b"garbage", id="garbage"),
        pytest.param(lambda _, __: b"PK\x03\x04garbage", id="the beginning of a zip"),
        pytest.param(lambda whole, _: whole[: len(whole) // 2], id="half"),
        pytest.param(
            lambda whole, _: whole[:80] + bytes(len(whole[80:200])) + whole[200:], id="holed"
        ),
        pytest.param(lambda _, tmp_path: _npy(tmp_path), id="one array"),
    ],
)
def test_unreadable_golden_vectors_are_a_bundle_error(
    bundle: Path, tmp_path: Path, content: Callable[[bytes, Path], bytes]
):
    whole = (bundle / GOLDEN).read_bytes()
    replace_file(bundle, GOLDEN, content(whole, tmp_path))
    with pytest.raises(BundleError):
        read_bundle(bundle).golden()


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_block_that_raises_keeps_the_old_bundle_and_leaves_nothing(bundle: Path, tmp_path: Path):
    before = contents(tmp_path)

    def fail_halfway() -> None:
        with replacing_bundle(bundle) as scratch:
            (scratch / ONNX).write_bytes(b"half done")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail_halfway()
    assert contents(tmp_path) == before


def test_a_block_that_ends_well_replaces_the_old_bundle_whole(bundle: Path, tmp_path: Path):
    other = discrete_policy(seed=99)
    (bundle / "stale").write_bytes(b"stale")
    other.save(bundle)
    assert sorted(path.name for path in bundle.iterdir()) == [GOLDEN, MANIFEST, ONNX]
    np.testing.assert_array_equal(read_bundle(bundle).golden()["action"], other.golden()["action"])
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_bundle_s_directory_is_made_with_its_parents(tmp_path: Path):
    target = tmp_path / "a" / "b"
    assert read_bundle(discrete_policy().save(target)).path == target


def test_an_empty_directory_may_be_filled(tmp_path: Path):
    target = tmp_path / "empty"
    target.mkdir()
    discrete_policy().save(target)
    read_bundle(target)


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("also work")
    for target in (folder, file):
        with pytest.raises(BundleError, match="is no bundle"), replacing_bundle(target):
            pytest.fail("the block must not run")
    assert contents(tmp_path) == {"thesis/thesis.tex": b"years of work", "file": b"also work"}


def test_a_place_that_cannot_be_written_is_a_bundle_error(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(BundleError, match="cannot write"),
        replacing_bundle(tmp_path / "file" / "bundle"),
    ):
        pytest.fail("the block must not run")


def test_a_manifest_that_could_not_be_read_back_is_not_written(tmp_path: Path):
    policy = discrete_policy()
    with pytest.raises(ManifestError):
        policy.save(tmp_path / "bundle", facts={"noise": {}})
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_is_written_over_files_that_exist(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        write_manifest(tmp_path, discrete_policy().facts(), [ONNX, GOLDEN])
    assert not (tmp_path / MANIFEST).exists()


def test_noise_is_float32_of_its_distribution_and_repeats_with_its_seed():
    for name, mean, variance in (("gumbel", np.euler_gamma, np.pi**2 / 6), ("normal", 0.0, 1.0)):
        spec = NoiseSpec(name, 2)
        draws = spec.draw(np.random.default_rng(0), 20_000)
        assert draws.shape == (20_000, 2)
        assert draws.dtype == np.float32
        assert draws.mean() == pytest.approx(mean, abs=0.03)
        assert draws.var() == pytest.approx(variance, rel=0.03)
        np.testing.assert_array_equal(draws, spec.draw(np.random.default_rng(0), 20_000))


def test_a_link_to_a_bundle_stays_one_and_what_it_leads_to_is_replaced(bundle: Path):
    link = bundle.parent / "link"
    link.symlink_to(bundle)
    with replacing_bundle(link) as scratch:
        (scratch / MANIFEST).write_text("new")
    assert link.is_symlink()
    assert (bundle / MANIFEST).read_text() == "new"
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "link"]
