"""Writing bundles and repositories: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from serving.bundle import (
    GOLDEN,
    MANIFEST,
    ONNX,
    adding_versions,
    read_bundle,
    replacing_bundle,
    write_manifest,
)
from serving.errors import BundleError, ManifestError
from serving.manifest import NoiseSegment, NoiseSpec
from tests.bundles import discrete_policy


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
        spec = NoiseSpec((NoiseSegment(name, 2),))
        draws = spec.draw(np.random.default_rng(0), 20_000)
        assert draws.shape == (20_000, 2)
        assert draws.dtype == np.float32
        assert draws.mean() == pytest.approx(mean, abs=0.03)
        assert draws.var() == pytest.approx(variance, rel=0.03)
        np.testing.assert_array_equal(draws, spec.draw(np.random.default_rng(0), 20_000))


def test_segments_of_noise_stand_side_by_side():
    noise = NoiseSpec((NoiseSegment("gumbel", 2), NoiseSegment("normal", 1)))
    assert noise.size == 3
    draws = noise.draw(np.random.default_rng(0), 20_000)
    assert (draws.shape, draws.dtype) == ((20_000, 3), np.float32)
    np.testing.assert_allclose(draws.mean(axis=0), [np.euler_gamma, np.euler_gamma, 0.0], atol=0.03)
    assert np.abs(np.corrcoef(draws, rowvar=False) - np.eye(3)).max() < 0.03
    assert NoiseSpec(()).draw(np.random.default_rng(0), 5).shape == (5, 0)


def test_a_link_to_a_bundle_stays_one_and_what_it_leads_to_is_replaced(bundle: Path):
    link = bundle.parent / "link"
    link.symlink_to(bundle)
    with replacing_bundle(link) as scratch:
        (scratch / MANIFEST).write_text("new")
    assert link.is_symlink()
    assert (bundle / MANIFEST).read_text() == "new"
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["bundle", "link"]


def entries(directory: Path) -> list[str]:
    """Everything in it, empty directories too."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def add_versions(repository: Path, names: list[str], *, write: int | None = None) -> list[Path]:
    """Add versions, the first `write` of them (all by default) with a file."""
    with adding_versions(repository, names) as places:
        for scratch, _ in places[:write]:
            scratch.mkdir(parents=True)
            (scratch / MANIFEST).write_text("{}")
    return [final for _, final in places]


def test_versions_are_counted_per_policy_and_appear_together(tmp_path: Path):
    repository = tmp_path / "deep" / "repository"
    assert add_versions(repository, ["a"]) == [repository / "a" / "1"]
    assert add_versions(repository, ["a", "b"]) == [repository / "a" / "2", repository / "b" / "1"]
    assert entries(tmp_path / "deep") == [
        "repository",
        "repository/a",
        "repository/a/1",
        f"repository/a/1/{MANIFEST}",
        "repository/a/2",
        f"repository/a/2/{MANIFEST}",
        "repository/b",
        "repository/b/1",
        f"repository/b/1/{MANIFEST}",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "a"], "several policies would be called 'a'"),
        ([".hidden"], "cannot be a policy's name"),
        (["..", "a"], "cannot be a policy's name"),
        (["a/b"], "cannot be a policy's name"),
        ([""], "cannot be a policy's name"),
        (["_private"], "cannot be a policy's name"),
        (["x" * 129], "cannot be a policy's name"),
    ],
)
def test_a_name_that_could_not_be_served_is_refused_before_anything_is_written(
    tmp_path: Path, names: list[str], message: str
):
    with (
        pytest.raises(BundleError, match=message),
        adding_versions(tmp_path / "new" / "repository", names),
    ):
        pytest.fail("the block must not run")
    assert entries(tmp_path) == []


@pytest.mark.parametrize("is_written", [True, False], ids=["a file in the way", "not written"])
def test_if_one_version_cannot_be_added_none_is(tmp_path: Path, is_written: bool):
    repository = tmp_path / "repository"
    add_versions(repository, ["a", "z"])
    if is_written:
        (repository / "c").write_text("in the way")
    before = (entries(tmp_path), contents(tmp_path))
    with pytest.raises(BundleError, match="nothing was added"):
        add_versions(repository, ["a", "b", "c"], write=None if is_written else 2)
    assert (entries(tmp_path), contents(tmp_path)) == before


@pytest.mark.parametrize("n_moved", [0, 1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_versions_that_were_moved_before_an_error_are_moved_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_moved: int, error: type[BaseException]
):
    repository = tmp_path / "repository"
    add_versions(repository, ["a"])
    before = (entries(tmp_path), contents(tmp_path))
    rename = Path.rename
    calls = 0

    def failing(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == n_moved + 1:
            raise error("now")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BundleError if error is OSError else error):
        add_versions(repository, ["a", "b", "c"])
    assert (entries(tmp_path), contents(tmp_path)) == before


def test_a_block_that_raises_adds_no_version(tmp_path: Path):
    def fail_halfway() -> None:
        with adding_versions(tmp_path / "repository", ["a"]) as places:
            places[0][0].mkdir()
            raise KeyError("stop")

    with pytest.raises(KeyError):
        fail_halfway()
    assert entries(tmp_path) == []


def test_a_repository_that_was_made_for_nothing_goes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail_at_the_last(self: Path, target: Path) -> Path:
        if target.parent.name == "b":
            raise OSError("disk full")
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", fail_at_the_last)
    with pytest.raises(BundleError, match="disk full; nothing was added"):
        add_versions(tmp_path / "deep" / "repository", ["a", "b"])
    assert entries(tmp_path) == []
