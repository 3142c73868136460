"""The command `record`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from serving.cli import Protocol
from serving.errors import UsageError
from serving.options import (
    ActionMaskOption,
    EnvConfigOption,
    EnvOption,
    SeedOption,
    StochasticOption,
    WrapperOption,
)

if TYPE_CHECKING:
    from export.recording.record import Player, Recording
    from serving.environments import NamedEnvironment

_console = Console(highlight=False, soft_wrap=True)


def record(
    policies: Annotated[
        list[str],
        typer.Argument(
            help="`random`, a run directory, a checkpoint, a bundle, or the URL of a served "
            "policy; several are shown side by side.",
            metavar="POLICY...",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The video: .mp4 or .gif.", metavar="FILE"),
    ],
    env: EnvOption = None,
    env_config: EnvConfigOption = None,
    wrapper: WrapperOption = None,
    title: Annotated[
        list[str] | None,
        typer.Option(help="A panel's title, one for each POLICY in their order.", metavar="TEXT"),
    ] = None,
    episodes: Annotated[int, typer.Option(help="Episodes to play.", min=1)] = 1,
    seed: SeedOption = 0,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Steps per second [what the environment's metadata says, else 30].",
            min=0.5,
            max=240,
        ),
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Cut an episode after so many steps.", min=1)
    ] = None,
    stochastic: StochasticOption = False,
    action_mask: ActionMaskOption = False,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Pixels of the video per pixel of a frame [small frames are made large enough "
            "to read the text].",
            min=0.05,
            max=64,
        ),
    ] = None,
    protocol: Annotated[
        Protocol, typer.Option(help="How to speak to a served policy; see `policyserve play`.")
    ] = Protocol.http,
    trust_checkpoint: Annotated[
        bool, typer.Option("--trust-checkpoint", help="See `policyserve export --help`.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object as the last line.")
    ] = False,
) -> None:
    """Record episodes to a video, with the step, the action and the return drawn in."""
    if title and len(title) != len(policies):
        raise UsageError(
            f"{len(title)} --title for {len(policies)} POLICY: give one for each, or none"
        )
    from export.recording.environment import frames_per_second, render_without_screen
    from export.recording.video_file import check_output

    check_output(output)
    render_without_screen()
    from export.policy_environments import environments_for
    from export.recording.record import RecordOptions
    from export.recording.record import record as record_video
    from serving.environments import parse_env_config, parse_wrappers

    reading: dict[str, Any] = {"trust": trust_checkpoint, "protocol": protocol.value}
    asked = (env, parse_env_config(env_config), parse_wrappers(wrapper or []))
    named = environments_for(policies, *asked, **reading)
    titles = title or list(map(title_of, policies))
    with contextlib.ExitStack() as stack:
        players = _players(policies, titles, named, stack, seed=seed, **reading)
        options = RecordOptions(
            n_episodes=episodes,
            seed=seed,
            deterministic=not stochastic,
            max_steps=max_steps,
            fps=fps or frames_per_second(players[0].env),
            scale=scale,
            use_action_mask=action_mask,
        )
        recording = record_video(players, output, options)
    _report(recording, titles, options.fps, as_json=as_json)


def title_of(policy: str) -> str:
    """What a panel is called if nobody says: the last parts of its name."""
    if policy.startswith(("http://", "https://")):
        return policy.rstrip("/").rsplit("/", 1)[-1]
    path = Path(policy)
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}/{path.name}".lstrip("/")
    return path.name or policy


def _players(
    policies: Sequence[str],
    titles: Sequence[str],
    named: Sequence[NamedEnvironment],
    stack: contextlib.ExitStack,
    **options: Any,
) -> list[Player]:
    """A player each, in an environment of its own; the stack closes what they hold."""
    from export.cli import resolve_policy
    from export.recording.environment import make_rendering_env
    from export.recording.record import Player

    players = []
    for policy, title, environment in zip(policies, titles, named, strict=True):
        env = make_rendering_env(environment)
        stack.callback(env.close)
        resolved = resolve_policy(policy, environment.id, env, **options)
        close = getattr(resolved, "close", None)
        if close is not None:
            stack.callback(close)
        players.append(Player(title, resolved, env))
    return players


def _report(recording: Recording, titles: Sequence[str], fps: float, *, as_json: bool) -> None:
    played = dict(enumerate(recording.episodes))
    if as_json:
        panels = [
            {
                "title": title,
                "episodes": [
                    {
                        "return": episode.episode_return,
                        "length": episode.episode_length,
                        "terminated": episode.terminated,
                        "truncated": episode.truncated,
                    }
                    for episode in played[index]
                ],
            }
            for index, title in enumerate(titles)
        ]
        facts = {
            "file": str(recording.path),
            "size_bytes": recording.size_bytes,
            "width": recording.size[0],
            "height": recording.size[1],
            "fps": fps,
            "n_frames": recording.n_frames,
            "duration_s": recording.duration_s,
            "panels": panels,
        }
        print(json.dumps(facts))
        return
    for index, title in enumerate(titles):
        parts = [
            f"return {episode.episode_return:.1f} in {episode.episode_length:,} steps "
            f"({_ending(episode)})"
            for episode in played[index]
        ]
        _console.print(f"{title}: {'; '.join(parts)}", markup=False)
    width, height = recording.size
    _console.print(
        f"wrote {recording.path}: {recording.duration_s:.1f} s at {fps:g} frames/s, "
        f"{width}x{height}, {recording.size_bytes / 1000:,.0f} kB",
        markup=False,
    )


def _ending(episode: Any) -> str:
    if episode.terminated:
        return "terminated"
    return "truncated" if episode.truncated else "cut by --max-steps"
