"""The commands `export` and `evaluate`."""

from __future__ import annotations

import enum
import importlib
import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from export.rllib_process import prepare_rllib
from serving.cli import Protocol
from serving.errors import UsageError
from serving.interface import Policy
from serving.manifest import PolicyManifest
from serving.options import (
    ActionMaskOption,
    EnvConfigOption,
    EnvOption,
    SeedOption,
    StochasticOption,
    WrapperOption,
)
from serving.spaces import space_from_gymnasium
from training.import_paths import let_modules_of_this_directory_be_imported
from training.progress import return_text
from training.remote_files import is_uri
from training.storage import fetch_run

_console = Console(highlight=False, soft_wrap=True)
_FORMATS = ("onnx", "torchscript", "pt2")


class DeterministicActionChoice(str, enum.Enum):
    """What a squashed Gaussian's (SAC's) greedy action is."""

    rllib = "rllib"
    tanh = "tanh"


class PrecisionChoice(str, enum.Enum):
    """The number type of the ONNX file's weights."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"


def export(
    source: Annotated[
        str,
        typer.Argument(
            help="A run directory of `train` (its best checkpoint), or a checkpoint; a path or a "
            "URI such as s3://bucket/run.",
            metavar="CHECKPOINT_OR_RUN_DIR",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The bundle to write; for a multi-agent checkpoint a directory for NAME/VERSION "
            "bundles.",
            metavar="BUNDLE",
        ),
    ],
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            help="Of onnx, torchscript and pt2 (torch.export). ONNX is always written.",
            metavar="LIST",
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
    safe: Annotated[
        bool,
        typer.Option(
            "--safe",
            help="Unpickle nothing: build module and connectors from --config, read weights and "
            "filters as data.",
        ),
    ] = False,
    config: Annotated[
        str | None,
        typer.Option(
            help="For --safe: a YAML of `train`, or module:attribute: an AlgorithmConfig or a "
            "function that returns one [the run directory's own].",
            metavar="SOURCE",
        ),
    ] = None,
    module_id: Annotated[
        str | None,
        typer.Option(help="Which RLModule of the checkpoint [all of a multi-agent checkpoint]."),
    ] = None,
    agent: Annotated[
        list[str] | None,
        typer.Option(
            help="In a multi-agent checkpoint, which module an agent acts by; repeatable [its "
            "policy_mapping_fn].",
            metavar="AGENT=MODULE",
        ),
    ] = None,
    twins: Annotated[
        list[str] | None,
        typer.Option(
            help="A Python module that registers tensor twins of your own connectors; repeatable.",
            metavar="MODULE",
        ),
    ] = None,
    deterministic_action: Annotated[
        DeterministicActionChoice,
        typer.Option(
            help="SAC and its kin: RLlib's greedy action (the mean), or tanh of it as in the paper."
        ),
    ] = DeterministicActionChoice.rllib,
    precision: Annotated[
        PrecisionChoice,
        typer.Option(
            help="Of the ONNX file's weights. float16 and int8, for large networks, are proved "
            "within a wider tolerance and played against float32."
        ),
    ] = PrecisionChoice.float32,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="How far float16 or int8 may lie from RLlib, relative to 1 + |RLlib's value| "
            "[0.01 and 0.1].",
            metavar="X",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Convert a checkpoint's policy to a bundle, if it is shown to act exactly as RLlib does."""
    chosen = _parse_formats(formats)
    _check_reading(is_safe=safe, config=config, trust=trust_checkpoint)
    reading = (trust_checkpoint, safe, config, module_id, _parse_agents(agent or []))
    writing = (chosen, deterministic_action.value, precision.value, tolerance)
    started = time.perf_counter()
    with fetch_run(source) if is_uri(source) else nullcontext(Path(source)) as path:
        written = _export(path, output, twins or [], reading, writing)
    _print_written(written, as_json=as_json)
    if not as_json:
        duration_s = time.perf_counter() - started
        _console.print(f"done in {duration_s:.1f} s; next: policyserve serve {output}")


def _check_reading(*, is_safe: bool, config: str | None, trust: bool) -> None:
    if config is not None and not is_safe:
        raise UsageError("--config is what --safe builds the policy from; add --safe")
    if is_safe and trust:
        raise UsageError("--safe unpickles nothing, so there is nothing to trust; choose one")


def _export(
    source: Path, output: Path, twins: list[str], reading: tuple[Any, ...], writing: tuple[Any, ...]
) -> dict[Path, PolicyManifest]:
    """Write bundles; `reading` is of `SourceOptions`, `writing` of `ExportOptions`."""
    prepare_rllib()
    for name in twins:
        _import_twins(name)
    from export.convert import ExportOptions, SourceOptions, export_policies

    return export_policies(source, output, SourceOptions(*reading), ExportOptions(*writing))


def _print_written(written: Mapping[Path, PolicyManifest], *, as_json: bool) -> None:
    if as_json:
        manifests = [dict(manifest.raw) for manifest in written.values()]
        print(json.dumps(manifests[0] if len(manifests) == 1 else manifests))
        return
    for path, manifest in written.items():
        _print_bundle(path, manifest)


def _print_bundle(path: Path, manifest: PolicyManifest) -> None:
    for name, report in manifest.raw["parity"].items():
        steps = f", episodes of {report['n_steps']} steps," if report["n_steps"] > 1 else ""
        _console.print(
            f"parity ({name}): acts as RLlib on {report['n_observations']} observations{steps} at "
            f"B = {', '.join(map(str, report['batch_sizes']))}; largest error "
            f"{report['max_error']:.1g}"
        )
    if "return" in manifest.raw:
        _console.print(_describe_return(manifest.raw["precision"], manifest.raw["return"]))
    for warning in manifest.raw["warnings"]:
        _console.print(f"warning: {warning}")
    size = sum(entry.size_bytes for entry in manifest.files.values())
    agents = manifest.raw["acts_for"]
    whose = f", for {', '.join(agents)}" if agents else ""
    _console.print(f"wrote {path} ({manifest.policy_id}, {size / 1000:,.0f} kB{whose})")


def _describe_return(precision: str, report: Mapping[str, Any]) -> str:
    if not report["is_measured"]:
        return f"return: not measured ({report['reason']})"
    means = {name: report[name]["mean_return"] for name in ("float32", "converted", "difference")}
    return (
        f"return over {report['n_episodes']} episodes: float32 {means['float32']:.1f}, {precision} "
        f"{means['converted']:.1f}, difference {means['difference']:.1f} ± "
        f"{report['difference']['ci95_return']:.1f}"
    )


def _parse_formats(text: str) -> tuple[str, ...]:
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in chosen:
        if name not in _FORMATS:
            raise UsageError(f"--format {name!r}: expected {', '.join(_FORMATS)}")
    if not chosen:
        raise UsageError("--format is empty; expected onnx, or onnx,torchscript")
    return chosen


def _parse_agents(entries: list[str]) -> dict[str, str] | None:
    found = {}
    for entry in entries:
        agent, equals, module = entry.partition("=")
        if not (agent and equals and module):
            raise UsageError(f"--agent {entry!r}: expected AGENT=MODULE")
        found[agent] = module
    return found or None


def _import_twins(name: str) -> None:
    let_modules_of_this_directory_be_imported()
    try:
        importlib.import_module(name)
    except ImportError as exc:
        raise UsageError(f"--twins {name}: cannot be imported: {exc}") from exc


def evaluate(
    policy: Annotated[
        str,
        typer.Argument(
            help="A run directory, a checkpoint, a bundle, the URL of a served policy, or "
            "`random`.",
            metavar="POLICY",
        ),
    ],
    env: EnvOption = None,
    env_config: EnvConfigOption = None,
    wrapper: WrapperOption = None,
    episodes: Annotated[int, typer.Option(help="Episodes to play.", min=1)] = 20,
    seed: SeedOption = 0,
    stochastic: StochasticOption = False,
    action_mask: ActionMaskOption = False,
    protocol: Annotated[
        Protocol, typer.Option(help="How to speak to a served policy; see `policyserve play`.")
    ] = Protocol.http,
    trust_checkpoint: Annotated[
        bool,
        typer.Option("--trust-checkpoint", help="See `policyserve export --help`."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object as the last line.")
    ] = False,
) -> None:
    """Play whole episodes with a policy in any of its forms and report the returns."""
    from export.policy_environments import environments_for
    from serving.client import PolicyClient
    from serving.environments import parse_env_config, parse_wrappers
    from serving.rollout import evaluate_policy
    from serving.stream_client import StreamClient

    reading: dict[str, Any] = {"trust": trust_checkpoint, "protocol": protocol.value}
    asked = (env, parse_env_config(env_config), parse_wrappers(wrapper or []))
    (named,) = environments_for([policy], *asked, **reading)
    environment = named.make()
    player: Policy | None = None
    try:
        player = resolve_policy(policy, named.id, environment, seed=seed, **reading)
        result = evaluate_policy(
            player,
            environment,
            n_episodes=episodes,
            seed=seed,
            deterministic=not stochastic,
            use_action_mask=action_mask,
        )
    finally:
        environment.close()
        if isinstance(player, PolicyClient | StreamClient):
            player.close()
    summary = result.summary()
    if as_json:
        print(json.dumps(summary))
        return
    mean, std = (return_text(float(summary[name] or 0.0)) for name in ("mean_return", "std_return"))
    interval = (
        ""
        if summary["ci95_return"] is None
        else f", 95 % CI ± {return_text(summary['ci95_return'])}"
    )
    _console.print(
        f"{policy} on {named.id}: mean return {mean} ± "
        f"{std}{interval} over {summary['n_episodes']} episodes "
        f"({'sampled' if stochastic else 'greedy'}); mean length {summary['mean_length']:.0f}, "
        f"{summary['n_terminated']} terminated, {summary['n_truncated']} truncated"
    )


def resolve_policy(
    policy: str,
    env_id: str,
    env: Any,
    *,
    seed: int,
    trust: bool,
    protocol: Literal["http", "ws"] = "http",
) -> Policy:
    """A policy from whatever the user named it by, made for the environment's spaces.

    Raises:
        UsageError: It is none of the forms, or for other spaces.
    """
    from serving.rollout import check_spaces

    if policy == "random":
        from serving.rollout import RandomPolicy

        return RandomPolicy(env.action_space, seed)
    if policy.startswith(("http://", "https://")):
        from serving.remote import open_policy

        client = open_policy(policy, protocol)
        try:
            check_spaces(env_id, env, client.describe())
        except BaseException:
            client.close()
            raise
        return client
    from export.policy_environments import policy_directory

    path = policy_directory(policy)
    from serving.bundle import MANIFEST

    if (path / MANIFEST).is_file():
        from serving.verification import load_verified_policy

        loaded = load_verified_policy(path)
        check_spaces(env_id, env, loaded.manifest.raw)
        return loaded
    prepare_rllib()
    from export.checkpoint import load_checkpoint
    from export.rl_module_policy import RLModulePolicy

    checkpoint = load_checkpoint(path, trust=trust)
    spaces = {
        "observation_space": space_from_gymnasium(checkpoint.observation_space).to_json(),
        "action_space": space_from_gymnasium(checkpoint.action_space).to_json(),
    }
    check_spaces(env_id, env, spaces)
    return RLModulePolicy(checkpoint)
