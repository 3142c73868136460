"""The commands `export` and `evaluate`."""

from __future__ import annotations

import json
import logging
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from serving.errors import UsageError
from serving.interface import Policy
from serving.spaces import space_from_gymnasium

_console = Console(highlight=False, soft_wrap=True)
_FORMATS = ("onnx", "torchscript")


def export(
    source: Annotated[
        Path,
        typer.Argument(
            help="A run directory of `train` (its best checkpoint), or a checkpoint.",
            metavar="CHECKPOINT_OR_RUN_DIR",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The bundle to write.", metavar="BUNDLE")
    ],
    formats: Annotated[
        str,
        typer.Option(
            "--format", help="onnx, or onnx,torchscript. ONNX is always written.", metavar="LIST"
        ),
    ] = "onnx",
    trust_checkpoint: Annotated[
        bool,
        typer.Option(
            "--trust-checkpoint",
            help="Read a checkpoint that this user's own `train` did not write. Checkpoints are "
            "pickled code: reading one runs it.",
        ),
    ] = False,
    module_id: Annotated[
        str, typer.Option(help="Which RLModule of the checkpoint.")
    ] = "default_policy",
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Convert a checkpoint's policy to a bundle, if it is shown to act exactly as RLlib does."""
    chosen = _parse_formats(formats)
    started = time.perf_counter()
    quiet_rllib()
    from export.convert import export_policy

    manifest = export_policy(
        source,
        output,
        formats=cast(Any, chosen),
        trust_checkpoint=trust_checkpoint,
        module_id=module_id,
    )
    if as_json:
        print(json.dumps(dict(manifest.raw)))
        return
    for name, report in manifest.raw["parity"].items():
        _console.print(
            f"parity ({name}): acts as RLlib on {report['n_observations']} observations at B = "
            f"{', '.join(map(str, report['batch_sizes']))}; largest error {report['max_error']:.1g}"
        )
    for warning in manifest.raw["warnings"]:
        _console.print(f"warning: {warning}")
    size = sum(entry.size_bytes for entry in manifest.files.values())
    _console.print(
        f"wrote {output} ({manifest.policy_id}, {size / 1000:,.0f} kB) in "
        f"{time.perf_counter() - started:.1f} s; next: policyserve serve {output}"
    )


def _parse_formats(text: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in chosen:
        if name not in _FORMATS:
            raise UsageError(f"--format {name!r}: expected {' or '.join(_FORMATS)}")
    if not chosen:
        raise UsageError("--format is empty; expected onnx, or onnx,torchscript")
    return chosen


def evaluate(
    policy: Annotated[
        str,
        typer.Argument(
            help="A run directory, a checkpoint, a bundle, the URL of a served policy, or "
            "`random`.",
            metavar="POLICY",
        ),
    ],
    env: Annotated[str, typer.Option(help="A Gymnasium environment id.", metavar="ID")],
    env_config: Annotated[
        str | None, typer.Option(help="The environment's keyword arguments.", metavar="JSON")
    ] = None,
    episodes: Annotated[int, typer.Option(help="Episodes to play.", min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Episode i is reset with seed + i.", min=0)] = 0,
    stochastic: Annotated[
        bool, typer.Option("--stochastic", help="Sample instead of the most likely action.")
    ] = False,
    trust_checkpoint: Annotated[
        bool,
        typer.Option("--trust-checkpoint", help="See `policyserve export --help`."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object as the last line.")
    ] = False,
) -> None:
    """Play whole episodes with a policy in any of its forms and report the returns."""
    from serving.client import PolicyClient
    from serving.rollout import evaluate_policy, make_env, parse_env_config

    environment = make_env(env, **parse_env_config(env_config))
    player: Policy | None = None
    try:
        player = resolve_policy(policy, env, environment, seed=seed, trust=trust_checkpoint)
        result = evaluate_policy(
            player,
            environment,
            n_episodes=episodes,
            seed=seed,
            deterministic=not stochastic,
        )
    finally:
        environment.close()
        if isinstance(player, PolicyClient):
            player.close()
    summary = result.summary()
    if as_json:
        print(json.dumps(summary))
        return
    interval = "" if summary["ci95_return"] is None else f", 95 % CI ± {summary['ci95_return']:.1f}"
    _console.print(
        f"{policy} on {env}: mean return {summary['mean_return']:.1f} ± "
        f"{summary['std_return']:.1f}{interval} over {summary['n_episodes']} episodes "
        f"({'sampled' if stochastic else 'greedy'}); mean length {summary['mean_length']:.0f}, "
        f"{summary['n_terminated']} terminated, {summary['n_truncated']} truncated"
    )


def resolve_policy(policy: str, env_id: str, env: Any, *, seed: int, trust: bool) -> Policy:
    """A policy from whatever the user named it by, made for the environment's spaces.

    Raises:
        UsageError: It is none of the forms, or for other spaces.
    """
    from serving.rollout import check_spaces

    if policy == "random":
        from serving.rollout import RandomPolicy

        return RandomPolicy(env.action_space, seed)
    if policy.startswith(("http://", "https://")):
        from serving.client import PolicyClient

        client = PolicyClient(policy)
        check_spaces(env_id, env, client.describe())
        return client
    path = Path(policy)
    if not path.is_dir():
        raise UsageError(
            f"{policy!r} is no run directory, checkpoint or bundle (no such directory), no URL, "
            "and not `random`"
        )
    from serving.bundle import MANIFEST

    if (path / MANIFEST).is_file():
        from serving.verification import load_verified_policy

        loaded = load_verified_policy(path)
        check_spaces(env_id, env, loaded.manifest.raw)
        return loaded
    quiet_rllib()
    from export.checkpoint import load_checkpoint
    from export.reference import RLModulePolicy

    checkpoint = load_checkpoint(path, trust=trust)
    spaces = {
        "observation_space": space_from_gymnasium(checkpoint.observation_space).to_json(),
        "action_space": space_from_gymnasium(checkpoint.action_space).to_json(),
    }
    check_spaces(env_id, env, spaces)
    return RLModulePolicy(checkpoint)


def quiet_rllib() -> None:
    """Keep Ray's and RLlib's deprecation notices off the user's terminal; errors are raised."""
    warnings.filterwarnings("ignore")
    import ray

    # Ray gives its loggers their level while it is imported, so this comes after.
    for name in ("ray", "ray.rllib", *logging.root.manager.loggerDict):
        if name.split(".")[0] == "ray":
            logging.getLogger(name).setLevel(logging.ERROR)
    assert ray.__version__
