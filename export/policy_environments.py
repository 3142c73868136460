"""The environment that a policy names, whichever form the policy has."""

from __future__ import annotations

import atexit
import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from export.rllib_process import prepare_rllib
from serving.environments import (
    NamedEnvironment,
    Wrapper,
    arguments_of,
    described_environment,
    wrappers_of,
)
from serving.errors import UsageError
from training.remote_files import is_uri
from training.storage import fetch_run


def environments_for(
    policies: Sequence[str],
    env_id: str | None,
    env_config: Mapping[str, Any],
    wrappers: Sequence[Wrapper] = (),
    *,
    trust: bool = False,
    protocol: Literal["http", "ws"] = "http",
) -> list[NamedEnvironment]:
    """The environment to play each policy in: the one asked for, else the one that it names.

    Args:
        policies: Each `random`, a run directory, a checkpoint, a bundle, or a URL.
        env_id: What the user asked for.
        env_config: What the user asked for; with an environment that a policy names these come on
            top of the arguments that the policy names.
        wrappers: What the user asked for, around all others.
        trust: Read a checkpoint that this user's own `train` did not write.
        protocol: How to speak to a served policy.

    Returns:
        One for each policy. They have the same id, while arguments and wrappers are each policy's
        own; a policy that names none plays in that of the first that does.

    Raises:
        UsageError: Nobody names an environment, the policies name different ones, or a policy that
            is not this user's own names code to run.
    """
    if env_id is not None:
        return [NamedEnvironment(env_id, dict(env_config), tuple(wrappers)) for _ in policies]
    found = {policy: _named_by(policy, trust, protocol) for policy in policies}
    named = {policy: entry for policy, entry in found.items() if entry is not None}
    if not named:
        raise UsageError(f"{', '.join(policies)} names no environment; give one: --env ID")
    first, environment = next(iter(named.items()))
    for policy, other in named.items():
        if other.id != environment.id:
            raise UsageError(
                f"{first} is for {environment.id} and {policy} for {other.id}; say which to play: "
                "--env ID"
            )
    own = [named.get(policy, environment) for policy in policies]
    return [
        each._replace(kwargs={**each.kwargs, **env_config}, wrappers=(*each.wrappers, *wrappers))
        for each in own
    ]


def policy_directory(policy: str) -> Path:
    """The directory of a policy that is neither `random` nor a served one's URL.

    That of a run at a URI such as s3://bucket/run is a copy, there until this process ends.

    Raises:
        UsageError: There is none.
    """
    path = _fetched(policy) if is_uri(policy) else Path(policy)
    if not path.is_dir():
        raise UsageError(
            f"{policy!r} is no run directory, checkpoint or bundle (no such directory), no URL, "
            "and not `random`"
        )
    return path


@functools.cache  # asked for its environment first, and then for its policy
def _fetched(uri: str) -> Path:
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(fetch_run(uri))


def _named_by(policy: str, trust: bool, protocol: Literal["http", "ws"]) -> NamedEnvironment | None:
    if policy == "random":
        return None
    if policy.startswith(("http://", "https://")):
        from serving.remote import open_policy

        with open_policy(policy, protocol) as client:
            return described_environment(client.describe())
    path = policy_directory(policy)
    from serving.bundle import MANIFEST, read_bundle

    if (path / MANIFEST).is_file():
        return described_environment(read_bundle(path).manifest.raw)
    return _of_checkpoint(path, trust)


def _of_checkpoint(path: Path, trust: bool) -> NamedEnvironment | None:
    from training.provenance import SIGNATURE_FILE, verify_checkpoint
    from training.run_directory import find_checkpoint

    # What `train` wrote says it without being unpickled; whose it is says how far to follow it.
    provenance = verify_checkpoint(find_checkpoint(path))
    facts = provenance.facts
    if isinstance(facts.get("env"), str):
        source = f"{path} ({SIGNATURE_FILE})"
        kwargs = arguments_of(facts, "env_config", source=source)
        wrappers = wrappers_of(facts, source=source)
        if provenance.is_trusted or trust:
            return NamedEnvironment(facts["env"], kwargs, wrappers)
        named = {"id": facts["env"], "kwargs": kwargs, "wrappers": wrappers}
        return described_environment({"environment": named})
    prepare_rllib()
    from export.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path, trust=trust)
    if checkpoint.env_id is None:
        return None
    wrapped = tuple((path, dict(kwargs)) for path, kwargs in checkpoint.wrappers)
    return NamedEnvironment(checkpoint.env_id, dict(checkpoint.env_config), wrapped)
