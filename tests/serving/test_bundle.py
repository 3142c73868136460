"""The format on disk: every kind of damage is found, and writing is all or nothing."""

from __future__ import annotations

import hashlib
import json
import math
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.bundle import (
    GOLDEN,
    MANIFEST,
    ONNX,
    read_bundle,
    sha256_of,
)
from serving.errors import BundleError, ChecksumError, ManifestError
from serving.golden import write_golden
from serving.manifest import InputSpec, NoiseSegment, NoiseSpec, StateSpec
from tests.bundles import LinearPolicy, discrete_policy
from tests.tiny_policies import TINY_POLICIES, memory_policy, nested_policy, q_policy


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
    assert manifest.noise == NoiseSpec((NoiseSegment("gumbel", 3),))
    assert manifest.inputs == (
        InputSpec("observation", "observation", "float32", (4,)),
        InputSpec("action_mask", "action_mask", "bool", (3,)),
        InputSpec("noise", "noise", "float32", (3,)),
    )
    assert (manifest.mask_size, manifest.has_reward, manifest.state) == (3, False, {})
    assert (manifest.module_id, manifest.agents) == ("default_policy", {})
    assert (manifest.tolerance, manifest.n_golden_rows, manifest.n_golden_steps) == (1e-5, 70, 1)
    assert manifest.outputs == discrete.outputs
    assert manifest.has_value
    assert set(manifest.files) == {ONNX, GOLDEN}
    assert manifest.environment == {"id": "Tiny-v0", "kwargs": {}}
    golden = found.golden()
    for name, values in discrete.golden().items():
        np.testing.assert_array_equal(golden[name], values)


@pytest.mark.parametrize("name", TINY_POLICIES)
def test_every_kind_of_bundle_reads_back_as_written(tmp_path: Path, name: str):
    policy = TINY_POLICIES[name]()
    manifest = read_bundle(policy.save(tmp_path / name)).manifest
    facts = policy.facts()
    assert [spec.to_json() for spec in manifest.inputs] == facts["inputs"]
    assert [segment.to_json() for segment in manifest.noise.segments] == facts["noise"]
    assert {name: spec.to_json() for name, spec in manifest.state.items()} == facts["state"]
    assert manifest.observation_space.to_json() == facts["observation_space"]
    assert manifest.action_space.to_json() == facts["action_space"]
    assert manifest.distribution == facts["distribution"]
    assert manifest.noise.size == policy.noise_size
    assert manifest.has_reward == (name == "memory")
    assert manifest.mask_size == {"dict": 3, "image": 5, "memory": 2}.get(name, 0)


def test_an_initial_state_may_be_one_number_or_an_array(tmp_path: Path):
    state = memory_policy().facts()["state"]
    state = {**state, "h": {**state["h"], "initial": [0.25, -1.5]}}
    target = tmp_path / "bundle"
    found = read_bundle(memory_policy().save(target, facts={"state": state})).manifest.state
    assert (found["h"].initial.dtype, found["h"].initial.tolist()) == (np.float32, [0.25, -1.5])
    assert found["previous"].initial.tolist() == [0.0, 0.0]
    assert {name: spec.to_json() for name, spec in found.items()} == state


def test_an_empty_state_has_an_initial_value_too():
    spec = StateSpec("float32", (0, 2), np.zeros((0, 2), np.float32))
    assert spec.to_json()["initial"] == []


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


def test_a_file_over_the_limit_is_refused_before_it_is_read(bundle: Path):
    size = (bundle / ONNX).stat().st_size
    read_bundle(bundle, max_file_bytes=max(size, (bundle / GOLDEN).stat().st_size))
    (bundle / ONNX).write_bytes(bytes(size))  # whose checksum would be wrong
    with pytest.raises(BundleError, match=f"{size} bytes, at most {size - 1}") as caught:
        read_bundle(bundle, max_file_bytes=size - 1)
    assert not isinstance(caught.value, ChecksumError)


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
        "inputs",
        "outputs",
        "state",
        "tolerance",
        "golden",
        "agents",
        "module_id",
        "deterministic_action",
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
    if key in ("algorithm", "module_id") and value != "missing":
        read_bundle(bundle)  # any text is taken here
        return
    with pytest.raises(ManifestError):
        read_bundle(bundle)


def test_an_infinite_size_is_a_manifest_error(bundle: Path):
    edit_manifest(bundle, lambda raw: raw["noise"][0].update(size=math.inf))
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
    [
        ("distribution", "gulbel"),
        ("noise", [{"distribution": "gulbel", "size": 3}]),
        ("deterministic_action", "gulbel"),
    ],
)
def test_a_word_that_nobody_knows_is_refused(bundle: Path, key: str, value: Any):
    edit_manifest(bundle, lambda raw: raw.update({key: value}))
    with pytest.raises(ManifestError, match="gulbel"):
        read_bundle(bundle)


def input_named(raw: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in raw["inputs"] if entry["name"] == name)


def spec(name: str, role: str, *shape: int, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "role": role, "dtype": dtype, "shape": [-1, *shape]}


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "tolerance 0": (lambda raw: raw.update(tolerance=0), "tolerance is 0"),
    "tolerance 2": (lambda raw: raw.update(tolerance=2.0), "tolerance is 2"),
    "tolerance nan": (lambda raw: raw.update(tolerance=math.nan), "tolerance is nan"),
    "no golden rows": (lambda raw: raw["golden"].update(n_rows=0), "no rows"),
    "golden steps without memory": (lambda raw: raw["golden"].update(n_steps=2), "without memory"),
    "another width": (
        lambda raw: input_named(raw, "observation").update(shape=[-1, 5]),
        "does not follow from the spaces",
    ),
    "another dtype": (
        lambda raw: input_named(raw, "observation").update(dtype="float64"),
        "does not follow",
    ),
    "a dtype that is none": (
        lambda raw: input_named(raw, "observation").update(dtype="real"),
        "incomplete",
    ),
    "a fixed batch": (
        lambda raw: input_named(raw, "observation").update(shape=[1, 4]),
        "not \\[-1",
    ),
    "no shape": (lambda raw: input_named(raw, "observation").update(shape=[]), "incomplete"),
    "an unknown role": (
        lambda raw: raw["inputs"].append(spec("clock", "time")),
        "unknown role 'time'",
    ),
    "a second observation": (
        lambda raw: raw["inputs"].append(spec("observation/x", "observation", 1)),
        "does not follow",
    ),
    "the same input twice": (
        lambda raw: raw["inputs"].append(raw["inputs"][0]),
        "does not follow",
    ),
    "no observation": (lambda raw: raw["inputs"].pop(0), "there is no input .*'observation'"),
    "no noise input": (lambda raw: raw["inputs"].pop(), "there is no input .*'noise'"),
    "a state that is not remembered": (
        lambda raw: raw["inputs"].append(spec("state/h", "state", 2)),
        "does not follow",
    ),
    "a mask of another width": (
        lambda raw: input_named(raw, "action_mask").update(shape=[-1, 4]),
        "does not follow",
    ),
    "noise of another width": (
        lambda raw: raw["noise"][0].update(size=4),
        "the action space needs",
    ),
    "noise of another kind": (
        lambda raw: raw["noise"][0].update(distribution="normal"),
        "the action space needs",
    ),
    "noise of no width": (lambda raw: raw["noise"][0].update(size=0), "no columns"),
    "noise of negative width": (
        lambda raw: raw["noise"].extend(
            [
                {"distribution": "gumbel", "size": -1},
                {"distribution": "gumbel", "size": 1},
            ]
        ),
        "no columns",
    ),
    "no noise": (lambda raw: raw.update(noise=[]), "'categorical' and the noise"),
    "noise without a distribution": (
        lambda raw: raw.update(distribution="none"),
        "'none' and the noise",
    ),
    "an unknown output": (lambda raw: raw["outputs"].append("advice"), "advice"),
    "an output twice": (lambda raw: raw["outputs"].append("value"), "twice"),
    "no action": (lambda raw: raw["outputs"].remove("action"), "'action'.* missing"),
    "no sample": (
        lambda raw: raw["outputs"].remove("sampled_action"),
        "'sampled_action'.* missing",
    ),
    "a next state that is not remembered": (
        lambda raw: raw["outputs"].append("next_state/h"),
        "next_state/h",
    ),
    "an empty observation space": (
        lambda raw: raw.update(observation_space={"type": "Dict", "spaces": {}}),
        "observation space is empty",
    ),
    "an empty action space": (
        lambda raw: raw.update(
            action_space={"type": "Tuple", "spaces": []},
            noise=[],
            distribution="none",
            inputs=raw["inputs"][:1],
        ),
        "action space is empty",
    ),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused_with_the_reason(bundle: Path, what: str):
    change, reason = CONTRADICTIONS[what]
    edit_manifest(bundle, lambda raw: (change(raw), None)[1])
    with pytest.raises(ManifestError, match=reason):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("policy", "change", "reason"),
    [
        (memory_policy, lambda raw: raw["state"].pop("h"), "does not follow"),
        (
            memory_policy,
            lambda raw: raw["state"].update(c={"dtype": "float32", "shape": [], "initial": 0}),
            "there is no input .*state/c",
        ),
        (memory_policy, lambda raw: raw["state"]["h"].update(shape=[3]), "does not follow"),
        (memory_policy, lambda raw: raw["state"]["h"].update(initial=[1, 2, 3]), "incomplete"),
        (memory_policy, lambda raw: raw["state"]["h"].update(initial=math.nan), "incomplete"),
        (memory_policy, lambda raw: raw["state"]["h"].update(initial="zero"), "incomplete"),
        (memory_policy, lambda raw: raw["state"]["h"].update(dtype="str"), "incomplete"),
        (memory_policy, lambda raw: raw["outputs"].remove("next_state/h"), "next_state/h.*missing"),
        (
            nested_policy,
            lambda raw: raw["inputs"].append(spec("action_mask", "action_mask", 3, dtype="bool")),
            "not Discrete or MultiDiscrete",
        ),
        (nested_policy, lambda raw: raw["noise"].reverse(), "the action space needs"),
        (
            nested_policy,
            lambda raw: raw["outputs"].remove("sampled_action/steer"),
            "sampled_action/steer.*missing",
        ),
        (q_policy, lambda raw: raw["outputs"].append("sampled_action_logp"), "no noise"),
        (q_policy, lambda raw: raw["outputs"].append("sampled_action"), "not known"),
    ],
)
def test_other_kinds_of_policies_may_not_contradict_themselves_either(
    tmp_path: Path, policy: Any, change: Callable[[dict[str, Any]], Any], reason: str
):
    bundle = policy().save(tmp_path / "bundle")
    edit_manifest(bundle, lambda raw: (change(raw), None)[1])
    with pytest.raises(ManifestError, match=reason):
        read_bundle(bundle)


def test_segments_of_one_kind_may_be_written_as_one(tmp_path: Path):
    space = {"type": "Tuple", "spaces": [{"type": "Discrete", "n": 2, "start": 0}] * 2}
    names = ["action/0", "action/1", "sampled_action/0", "sampled_action/1"]
    for sizes in ([4], [2, 2], [1, 3]):
        facts = {
            "action_space": space,
            "distribution": "multi",
            "noise": [{"distribution": "gumbel", "size": size} for size in sizes],
            "inputs": [
                spec("observation", "observation", 4),
                spec("noise", "noise", 4),
            ],
            "outputs": names,
        }
        found = read_bundle(discrete_policy().save(tmp_path / "bundle", facts=facts))
        assert found.manifest.noise.size == 4


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


def test_golden_vectors_that_unpack_to_too_much_are_refused_unopened(bundle: Path, tmp_path: Path):
    archive = tmp_path / "bomb.npz"
    zeros = np.broadcast_to(np.zeros(1), (1 << 22,))  # 32 MiB each, next to nothing packed
    np.savez_compressed(archive, **{f"array_{index}": zeros for index in range(9)})
    assert archive.stat().st_size < 1 << 20
    replace_file(bundle, GOLDEN, archive.read_bytes())
    with pytest.raises(BundleError, match="unpacked"):
        read_bundle(bundle).golden()


def test_golden_vectors_that_claim_a_shape_they_do_not_hold_are_refused(
    bundle: Path, tmp_path: Path
):
    header = "{'descr': '<f8', 'fortran_order': False, 'shape': (100000000000000,), }"
    raw = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + header.ljust(117).encode() + b"\n"
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("observation.npy", raw)
    replace_file(bundle, GOLDEN, (tmp_path / "lie.npz").read_bytes())
    with pytest.raises(BundleError):
        read_bundle(bundle).golden()


AWKWARD = ["x", "x.npy", "x.npy.npy", ".npy", "", "file", "a/b", "../up", "/abs", "ü~1✓", "a\\b"]


def test_golden_vectors_keep_their_exact_names(bundle: Path, tmp_path: Path):
    arrays = {name: np.full((2, 3), index, np.int16) for index, name in enumerate(AWKWARD)}
    arrays["scalar"] = np.float64(np.pi) * np.ones(())
    arrays["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    write_golden(tmp_path / "exact.npz", arrays)
    replace_file(bundle, GOLDEN, (tmp_path / "exact.npz").read_bytes())
    found = read_bundle(bundle).golden()
    assert list(found) == list(arrays)
    for name, values in arrays.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


def test_golden_vectors_are_those_of_numpy_s_archive_too(bundle: Path, tmp_path: Path):
    arrays = {"observation": np.arange(3.0), "action": np.ones((3, 2), np.int64)}
    write_golden(tmp_path / "ours.npz", arrays)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as archive:
        for name, values in arrays.items():
            np.testing.assert_array_equal(archive[name], values)
    np.savez(tmp_path / "theirs.npz", **arrays)
    replace_file(bundle, GOLDEN, (tmp_path / "theirs.npz").read_bytes())
    for name, values in read_bundle(bundle).golden().items():
        np.testing.assert_array_equal(values, arrays[name])


def test_the_same_golden_vectors_are_the_same_bytes_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arrays = {"observation": np.zeros((50, 40)), "action": np.arange(50)}
    write_golden(tmp_path / "now", arrays)
    later = time.time() + 86_400
    monkeypatch.setattr(time, "time", lambda: later)
    write_golden(tmp_path / "later", arrays)
    assert (tmp_path / "now").read_bytes() == (tmp_path / "later").read_bytes()
    assert (tmp_path / "now").stat().st_size < 50 * 40 * 8 / 10  # compressed


@pytest.mark.parametrize("name", ["a\0b", "\0", "half \ud800", "x" * 65_533])
def test_a_name_that_no_zip_carries_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
):
    with pytest.raises(BundleError, match="rename that key"):
        write_golden(tmp_path / GOLDEN, {"observation": np.zeros(1), name: np.zeros(1)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["a.npy", "a.npy"], ["a.npy", "b"]], ids=["twice", "no .npy"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_that_cannot_be_told_apart_are_refused(
    bundle: Path, tmp_path: Path, names: list[str]
):
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        for name in names:
            archive.writestr(name, _npy(tmp_path))
    replace_file(bundle, GOLDEN, (tmp_path / "odd.npz").read_bytes())
    with pytest.raises(BundleError, match="different names"):
        read_bundle(bundle).golden()
