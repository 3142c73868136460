"""Videos: every step is a frame, panels keep step, and files play where they should."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import policyserve
from export.recording.action_text import action_text
from export.recording.environment import frames_per_second
from export.recording.errors import RecordingError
from export.recording.panel import Moment, Panel
from export.recording.record import Player, Recording, RecordOptions, record
from serving.play_loop import EnvironmentFailedError
from serving.rollout import RandomPolicy
from tests.bundles import discrete_policy
from tests.processes import ROOT
from tests.serving.conftest import serving

TERMINATED, TRUNCATED = (213, 94, 0), (0, 114, 178)


class Shades(gym.Env[Any, Any]):
    """Lasts `length` steps, each rewarded 2; its picture is grey, 20 times the step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 - Gymnasium's
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(
        self,
        length: int = 4,
        size: tuple[int, int] = (60, 80),
        fails_at: int | None = None,
        render_mode: str | None = "rgb_array",
    ) -> None:
        self.length, self.size, self.fails_at = length, size, fails_at
        self.render_mode = render_mode
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, Any]:
        super().reset(seed=seed, options=options)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, Any]:
        assert self.action_space.contains(action)
        self.steps += 1
        if self.steps == self.fails_at:
            raise ZeroDivisionError("broken")
        is_over = self.steps == self.length
        is_even = self.length % 2 == 0
        return np.zeros(1, np.float32), 2.0, is_over and is_even, is_over and not is_even, {}

    def render(self) -> NDArray[np.uint8]:
        return np.full((*self.size, 3), 20 * self.steps % 256, np.uint8)


class TextOnly(Shades):
    metadata = {"render_modes": ["ansi", "human"]}  # noqa: RUF012 - Gymnasium's


gym.register("RecordedShades-v0", Shades)
gym.register("RecordedText-v0", TextOnly)


def player(title: str = "policy", **options: Any) -> Player:
    env = Shades(**options)
    return Player(title, RandomPolicy(env.action_space), env)


def frames_of(path: Path) -> list[NDArray[np.uint8]]:
    if path.suffix == ".gif":
        with Image.open(path) as image:
            found = []
            for index in range(getattr(image, "n_frames", 1)):
                image.seek(index)
                found.append(np.asarray(image.convert("RGB")))
            return found
    width, height = map(int, re.findall(r" ([1-9]\d*)x(\d+)", facts_of(path))[0])
    raw = ffmpeg("-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-").stdout
    return list(np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3))


def ffmpeg(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    words = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", *arguments]
    return subprocess.run(words, capture_output=True, timeout=60, check=False)


def facts_of(path: Path) -> str:
    """What ffmpeg says about the pictures of a file."""
    said = ffmpeg("-i", str(path)).stderr.decode()
    return next(line for line in said.splitlines() if "Video:" in line)


def shade(frame: NDArray[np.uint8], panel: int = 0, n_panels: int = 1) -> int:
    """The step whose picture a panel shows, looked at above its middle."""
    x = int((panel + 0.5) / n_panels * frame.shape[1])
    return round(float(frame[frame.shape[0] // 3, x].mean()) / 20)


def shows(frame: NDArray[np.uint8], color: tuple[int, int, int]) -> bool:
    return bool((np.abs(frame.astype(int) - color).max(axis=2) < 30).sum() > 100)


def an_mp4(path: Path, *players: Player, **options: Any) -> Recording:
    return record(players, path, RecordOptions(**{"fps": 5.0, **options}))


def test_every_step_is_a_frame_and_the_last_one_stands_for_a_second(tmp_path: Path) -> None:
    recording = an_mp4(tmp_path / "a.mp4", player(length=4))
    frames = frames_of(recording.path)
    assert [shade(frame) for frame in frames] == [0, 1, 2, 3, 4] + [4] * 5
    assert recording.n_frames == len(frames)
    assert recording.duration_s == pytest.approx(2.0)
    (episode,) = recording.episodes[0]
    assert (episode.episode_return, episode.episode_length) == (8.0, 4)
    assert recording.size_bytes == recording.path.stat().st_size


def test_panels_keep_step_and_the_shorter_one_shows_its_last_frame(tmp_path: Path) -> None:
    recording = an_mp4(tmp_path / "a.mp4", player(length=2), player(length=5))
    frames = frames_of(recording.path)[:6]
    assert [shade(frame, 0, 2) for frame in frames] == [0, 1, 2, 2, 2, 2]
    assert [shade(frame, 1, 2) for frame in frames] == [0, 1, 2, 3, 4, 5]
    assert [len(episodes) for episodes in recording.episodes] == [1, 1]


def test_the_ending_is_drawn_and_termination_is_not_truncation(tmp_path: Path) -> None:
    for length, color, other in ((2, TERMINATED, TRUNCATED), (3, TRUNCATED, TERMINATED)):
        frames = frames_of(an_mp4(tmp_path / f"{length}.mp4", player(length=length)).path)
        assert not shows(frames[0], color)
        assert shows(frames[-1], color)
        assert not shows(frames[-1], other)


def test_an_episode_can_be_cut_and_is_neither_terminated_nor_truncated(tmp_path: Path) -> None:
    recording = an_mp4(tmp_path / "a.mp4", player(length=9), max_steps=3, n_episodes=2)
    assert [(e.index, e.episode_length) for e in recording.episodes[0]] == [(0, 3), (1, 3)]
    assert not any(e.terminated or e.truncated for e in recording.episodes[0])
    frames = frames_of(recording.path)
    assert [shade(frame) for frame in frames][:4] == [0, 1, 2, 3]
    assert len(frames) == 2 * (4 + 5)


def test_an_mp4_plays_in_browsers_and_quicktime(tmp_path: Path) -> None:
    recording = an_mp4(tmp_path / "a.mp4", player(size=(61, 83)))
    facts = facts_of(recording.path)
    for said in ("h264", "yuv420p(tv, bt709", "5 fps", "{}x{}".format(*recording.size)):
        assert said in facts
    assert all(side % 2 == 0 for side in recording.size)
    content = recording.path.read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")  # it plays while it loads


def test_a_gif_loops_at_the_right_speed_in_its_own_colours(tmp_path: Path) -> None:
    recording = an_mp4(tmp_path / "a.gif", player(length=4), fps=10.0)
    with Image.open(recording.path) as image:
        assert image.info["loop"] == 0
        total_ms = 0
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            total_ms += image.info["duration"]
    assert total_ms == pytest.approx(1000 * recording.duration_s, abs=20)
    frames = frames_of(recording.path)
    assert [shade(frame) for frame in frames[:5]] == [0, 1, 2, 3, 4]
    assert shows(frames[-1], TERMINATED)


def test_a_gif_faster_than_browsers_show_keeps_its_speed(tmp_path: Path) -> None:
    recording = an_mp4(tmp_path / "a.gif", player(length=40), fps=100.0)
    with Image.open(recording.path) as image:
        durations = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            durations.append(image.info["duration"])
    assert min(durations) >= 20
    assert sum(durations) == pytest.approx(1000 * recording.duration_s, abs=60)


@pytest.mark.parametrize("size", [(8, 8), (84, 84), (400, 600), (900, 2500)])
def test_frames_of_any_size_become_readable(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = an_mp4(tmp_path / "a.mp4", player(length=2, size=size)).size
    assert 320 <= width <= 1920
    assert height >= 320


def test_a_panel_says_step_return_and_action_in_place() -> None:
    panel = Panel("title", (320, 240), gym.spaces.Discrete(2))
    frame = np.zeros((240, 320, 3), np.uint8)
    before = np.asarray(panel.picture(frame, Moment(1, 0, 1.0)))
    after = np.asarray(panel.picture(frame, Moment(2, 1, 1.5)))
    rows = np.flatnonzero((before != after).any(axis=(1, 2)))
    # Below the frame alone, in both lines of it.
    header = (panel.size[1] - 240) - (panel.size[1] - rows.max())
    assert rows.min() >= 240 + 20
    assert rows.max() - rows.min() > 20
    assert header > 0


@pytest.mark.parametrize(
    ("action", "meanings", "text"),
    [
        (None, (), "-"),
        (np.int64(1), (), "1"),
        (np.int64(1), ("NOOP", "FIRE"), "1 fire"),
        (np.array([0.5, -1.25]), (), "+0.50 -1.25"),
        (np.array([2, 0]), (), "2 0"),
        ({"gear": np.int64(3), "gas": np.array([0.1])}, (), "gear 3  gas +0.10"),
        ((np.int64(1), np.int64(0)), (), "1  0"),
    ],
)
def test_actions_of_any_space_are_words(action: Any, meanings: Any, text: str) -> None:
    assert action_text(action, meanings) == text


def test_an_environment_that_fails_leaves_no_file(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.gif"):
        with pytest.raises(EnvironmentFailedError, match="ZeroDivisionError: broken"):
            an_mp4(tmp_path / name, player(fails_at=3))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_no_file(tmp_path: Path) -> None:
    # A limit on a file's size stands for it; it ends ffmpeg as a full disk does, in the middle.
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); import policyserve\n"
        "policyserve.main(['record', 'random', '--env', 'CartPole-v1', '-o', 'a.mp4'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout
    assert "a.mp4 could not be written: ffmpeg" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_is_none_is_refused(tmp_path: Path) -> None:
    broken = player()
    broken.env.render = lambda: None  # type: ignore[method-assign]
    with pytest.raises(RecordingError, match=r"render\(\) gave None"):
        an_mp4(tmp_path / "a.mp4", broken)
    assert list(tmp_path.iterdir()) == []


def test_the_metadata_says_how_fast() -> None:
    env = Shades()
    assert frames_per_second(env) == 10.0
    for unusable in (None, 0, -3, "fast", 1e9):
        env.metadata = {"render_fps": unusable}
        assert frames_per_second(env) == 30.0


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Any:
    """The command in this process, in an empty directory: (exit status, stdout, stderr)."""
    for name in ("SDL_VIDEODRIVER", "SDL_AUDIODRIVER", "PYGAME_HIDE_SUPPORT_PROMPT", "MUJOCO_GL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # whatever it sets is put back
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            policyserve.main(["record", *arguments])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_the_command_says_what_it_wrote(command: Any, tmp_path: Path) -> None:
    arguments = ("random", "random", "--env", "RecordedShades-v0", "-o", "a.mp4", "--json")
    status, out, err = command(*arguments, "--title", "one", "--title", "two", "--episodes", "2")
    assert (status, err) == (0, "")
    said = json.loads(out)
    assert said["file"] == "a.mp4"
    assert said["fps"] == 10.0
    assert said["size_bytes"] == (tmp_path / "a.mp4").stat().st_size
    assert [panel["title"] for panel in said["panels"]] == ["one", "two"]
    episode = {"return": 8.0, "length": 4, "terminated": True, "truncated": False}
    assert said["panels"][0]["episodes"] == [episode, episode]


def test_cartpole_is_recorded_without_a_screen(command: Any, tmp_path: Path) -> None:
    status, out, err = command("random", "--env", "CartPole-v1", "-o", "a.gif", "--max-steps", "5")
    assert (status, err) == (0, "")
    assert "random: return 5.0 in 5 steps (cut by --max-steps)" in out
    assert "wrote a.gif: 1.1 s at 50 frames/s, 600x" in out
    assert (tmp_path / "a.gif").read_bytes().startswith(b"GIF89a")


def test_a_bundle_and_its_served_url_name_their_environment(command: Any, tmp_path: Path) -> None:
    environment = {"id": "RecordedShades-v0", "kwargs": {"length": 3}}
    policy = discrete_policy(observation_shape=(1,), n_actions=2)
    bundle = policy.save(tmp_path / "bundle", facts={"environment": environment})
    with serving({"policy": bundle}) as server:
        policies = (str(bundle), server.policy_url("policy"), "random")
        status, out, err = command(*policies, "-o", "a.mp4", "--json")
        assert (status, err) == (0, "")
        panels = json.loads(out)["panels"]
        assert [panel["title"] for panel in panels] == ["bundle", "policy", "random"]
        assert [panel["episodes"][0]["length"] for panel in panels] == [3, 3, 3]
        changed = ("--env-config", '{"length": 2}', "--protocol", "ws")
        status, out, err = command(policies[1], "-o", "b.mp4", "--json", *changed)
        assert (status, err) == (0, "")
        assert json.loads(out)["panels"][0]["episodes"][0]["length"] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("random", "--env", "CartPole-v1", "-o", "a.avi"), "expected .mp4 or .gif"),
        (("random", "--env", "CartPole-v1", "-o", "none/a.mp4"), "there is no directory none"),
        (("random", "--env", "RecordedText-v0", "-o", "a.mp4"), "names only ansi, human"),
        (("random", "--env", "CartPole-v9", "-o", "a.mp4"), "CartPole"),
        (("random", "-o", "a.mp4"), "give one: --env ID"),
        (("nowhere", "-o", "a.mp4"), "no run directory, checkpoint or bundle"),
        (
            ("random", "--env", "CartPole-v1", "-o", "a.mp4", "--title", "a", "--title", "b"),
            "give one for each",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_leaves_nothing(
    command: Any, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("policyserve: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
