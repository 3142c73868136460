"""What `serve` may be pointed at."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from serving.errors import BundleError, ServingConfigError
from serving.repository import find_policies


@pytest.fixture
def add(bundles: dict[str, Path], tmp_path: Path):
    def copy(place: str) -> Path:
        return Path(shutil.copytree(bundles["discrete"], tmp_path / place))

    return copy


def found(*sources: Path, name: str | None = None) -> list[tuple[str, int, Path]]:
    return [
        (policy.name, policy.version, policy.path) for policy in find_policies(sources, name=name)
    ]


def test_a_bundle_is_called_as_its_directory(add):
    path = add("cartpole")
    assert found(path) == [("cartpole", 1, path)]
    assert found(path, name="other") == [("other", 1, path)]


def test_a_bundle_s_name_does_not_depend_on_how_its_path_is_written(add, monkeypatch):
    path = add("cartpole")
    monkeypatch.chdir(path)
    assert found(Path()) == found(Path("../cartpole/")) == [("cartpole", 1, path)]


def test_a_repository_serves_the_newest_version_of_each_policy(add, tmp_path: Path):
    for version in (1, 2, 9, 10):
        add(f"repository/walker/{version}")
    add("repository/cartpole/3")
    repository = tmp_path / "repository"
    assert found(repository) == [
        ("cartpole", 3, repository / "cartpole" / "3"),
        ("walker", 10, repository / "walker" / "10"),
    ]


def test_what_is_no_version_is_passed_over(add, tmp_path: Path):
    add("repository/cartpole/2")
    for extra in ("repository/cartpole/11", "repository/cartpole/draft", "repository/empty"):
        (tmp_path / extra).mkdir()
    add("repository/cartpole/v12")
    (tmp_path / "repository" / "README").write_text("text")
    assert [entry[:2] for entry in found(tmp_path / "repository")] == [("cartpole", 2)]


def test_a_repository_of_one_policy_may_be_renamed(add, tmp_path: Path):
    add("repository/cartpole/4")
    assert [entry[:2] for entry in found(tmp_path / "repository", name="pole")] == [("pole", 4)]


def test_several_sources_are_served_together(add, tmp_path: Path):
    add("repository/cartpole/1")
    single = add("walker")
    names = [entry[0] for entry in found(single, tmp_path / "repository")]
    assert names == ["walker", "cartpole"]


def test_a_name_for_several_policies_is_refused(add):
    sources = add("a"), add("b")
    with pytest.raises(ServingConfigError, match="2 were found"):
        found(*sources, name="one")


def test_two_policies_of_one_name_are_refused(add):
    with pytest.raises(ServingConfigError, match="two policies are called 'same'"):
        found(add("here/same"), add("there/same"))


@pytest.mark.parametrize("name", ["with space", "a:b", "-dash", ".hidden", "ü", "a" * 129, "a%20b"])
def test_a_name_that_no_url_carries_is_refused(add, name: str):
    with pytest.raises(ServingConfigError, match="cannot be a policy's name"):
        found(add("bundle"), name=name)


def test_what_is_neither_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    for source in ("nowhere", "empty", "file"):
        with pytest.raises(BundleError, match="neither a bundle"):
            find_policies([tmp_path / source])


def test_a_link_to_a_bundle_is_served_under_the_links_name(bundles, tmp_path, monkeypatch):
    (tmp_path / "current").symlink_to(bundles["discrete"])
    (policy,) = find_policies([tmp_path / "current"])
    assert policy.name == "current"
    monkeypatch.chdir(tmp_path / "current")
    assert find_policies([Path()])[0].path == bundles["discrete"].resolve()
