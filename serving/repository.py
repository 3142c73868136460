"""What `serve` is pointed at: bundles, and repositories of them (`NAME/VERSION/<bundle>`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from serving.bundle import MANIFEST, POLICY_NAME
from serving.config import PolicySource
from serving.errors import BundleError, ServingConfigError


def find_policies(sources: Sequence[Path], *, name: str | None = None) -> list[PolicySource]:
    """The policies in bundles and repositories; a repository's newest version of each.

    Args:
        sources: Bundle directories, or repositories.
        name: The policy's name where there is exactly one, instead of its directory's.

    Raises:
        BundleError: A source is neither.
        ServingConfigError: A name that no URL can carry, two policies of one name, or `name`
            for several policies.
    """
    found = [policy for source in sources for policy in _policies_at(Path(source))]
    if name is not None:
        if len(found) != 1:
            raise ServingConfigError(
                f"--name {name!r} names one policy, and {len(found)} were found"
            )
        found = [_source(name, found[0].version, found[0].path)]
    names = [policy.name for policy in found]
    twice = sorted({entry for entry in names if names.count(entry) > 1})
    if twice:
        raise ServingConfigError(
            f"two policies are called {twice[0]!r}; rename a directory, or serve a single bundle "
            "with --name"
        )
    return found


def _policies_at(path: Path) -> list[PolicySource]:
    if not path.is_dir():
        raise BundleError(f"{path} is neither a bundle nor a policy repository: no such directory")
    if (path / MANIFEST).is_file():
        # A link `current -> cartpole-v7` is served as `current`; `.` and `x/` have their own names.
        return [_source(Path(os.path.abspath(path)).name, 1, path)]  # noqa: PTH100
    found = [
        _newest(entry) for entry in sorted(path.iterdir()) if entry.is_dir() and _versions(entry)
    ]
    if not found:
        raise BundleError(
            f"{path} is neither a bundle (no {MANIFEST}) nor a policy repository (no "
            f"NAME/VERSION/{MANIFEST} in it)"
        )
    return found


def _versions(directory: Path) -> dict[int, Path]:
    return {
        int(entry.name): entry
        for entry in directory.iterdir()
        if entry.name.isdecimal() and (entry / MANIFEST).is_file()
    }


def _newest(directory: Path) -> PolicySource:
    version, path = max(_versions(directory).items())
    return _source(directory.name, version, path)


def _source(name: str, version: int, path: Path) -> PolicySource:
    if not POLICY_NAME.fullmatch(name):
        raise ServingConfigError(
            f"{name!r} cannot be a policy's name: expected letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit; give another with --name"
        )
    return PolicySource(name=name, version=version, path=path.resolve())
