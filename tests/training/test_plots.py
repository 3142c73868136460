"""Figures of runs and searches: what they are drawn from, and what is said when they can't be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

import policyserve
from training.errors import ConfigError
from training.plotting.bands import BandKind, band_edges, common_band, smoothed
from training.plotting.csv_columns import read_progress
from training.plotting.errors import PlotError
from training.plotting.learning_figure import CurveOptions, learning_figure
from training.plotting.metrics import XAxis
from training.plotting.runs import group_runs, read_curve
from training.plotting.search import read_search
from training.plotting.style import ThemeName, count_text, theme_of

LIGHT = theme_of(ThemeName.light)
HEADER = "iteration,env_steps,time_s,episode_return_mean,entropy"
ROWS = ("1,1000,0.5,,0.69", "2,2000,1,20,0.6", "3,3000,1.5,40,0.5")


def a_run(
    path: Path,
    rows: Sequence[str] = ROWS,
    *,
    header: str = HEADER,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """A run directory as `train` leaves it, with these rows."""
    path.mkdir(parents=True)
    config: dict[str, Any] = {"env": "CartPole-v1", "algo": "PPO", "seed": seed}
    config["algo_config"] = {"lr": settings.pop("lr", 0.001), "gamma": 0.99}
    config["stop"] = {"return": 475.0, "window_episodes": 20}
    config |= settings
    facts = {"format": "policyserve-run", "format_version": 1, "created": "", "versions": {}}
    facts |= {"env": config["env"], "env_config": {}, "wrappers": [], "algo": config["algo"]}
    (path / "run.json").write_text(json.dumps({**facts, "seed": seed}))
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / "progress.csv").write_text("".join(f"{row}\n" for row in (header, *rows)))
    return path


def a_search(path: Path, rows: Sequence[str], mode: str = "min") -> Path:
    path.mkdir(parents=True)
    parameters = {
        "algo_config.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
        "model.fcnet_hiddens": {"kind": "grid", "values": [[32, 32], [64, 64]]},
    }
    document = {"format": "policyserve-search", "format_version": 1, "env": "CartPole-v1"}
    document |= {"algo": "PPO", "objective": "timesteps_to_stop_return", "mode": mode}
    (path / "search.json").write_text(json.dumps({**document, "parameters": parameters}))
    header = "trial,status,objective,reached,error,config/algo_config.lr,config/model.fcnet_hiddens"
    (path / "trials.csv").write_text("".join(f"{row}\n" for row in (header, *rows)))
    return path


TRIALS = (
    'trial_0000,done,30000,true,,0.001,"[32, 32]"',
    'trial_0001,done,20000,true,,0.003,"[64, 64]"',
    'trial_0002,done,,false,,0.0001,"[64, 64]"',
    'trial_0003,failed,,false,ValueError: boom,0.01,"[32, 32]"',
    'trial_0004,running,,,,0.005,"[32, 32]"',
)


def plot(*arguments: object) -> int:
    """The command, in this process; its exit status."""
    with pytest.raises(SystemExit) as ended:
        policyserve.main(["plot", *map(str, arguments)])
    return int(ended.value.code or 0)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, exit_code: int) -> str:
    assert plot(*arguments) == exit_code
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def options(**changes: Any) -> CurveOptions:
    chosen: dict[str, Any] = {"metrics": ["return"], "x": XAxis.steps, "band": BandKind.ci95}
    chosen |= {"smooth": 1, "title": None, "theme": LIGHT}
    return CurveOptions(**{**chosen, **changes})


def thick_lines(figure: Any) -> list[Any]:
    return [line for line in figure.axes[0].lines if line.get_linewidth() == 2.0]


def test_a_run_without_times_is_not_drawn_along_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header = "iteration,env_steps,episode_return_mean"
    run = a_run(tmp_path / "a", ("1,1000,20", "2,2000,30"), header=header)
    said = refusal(capsys, run, "--x", "time", "-o", tmp_path / "a.svg", exit_code=1)
    assert f"{run}: its progress.csv has no column 'time_s'" in said
    assert plot(run, "-o", tmp_path / "a.svg") == 0


def test_bands_are_what_their_names_say() -> None:
    values = np.array([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    low, high = band_edges(values, BandKind.ci95)
    expected = stats.t.interval(0.95, 2, loc=3.0, scale=stats.sem(values[:, 0]))
    assert (low[0], high[0]) == pytest.approx(expected)
    assert (low[1], high[1]) == (5.0, 5.0)
    low, high = band_edges(values, BandKind.std)
    assert (low[0], high[0]) == pytest.approx((3 - 7**0.5, 3 + 7**0.5))
    low, high = band_edges(values, BandKind.minmax)
    assert (low[0], high[0]) == (1.0, 6.0)


def test_seeds_are_averaged_only_where_all_have_data() -> None:
    one = (np.array([0.0, 10.0]), np.array([0.0, 10.0]))
    three = (np.array([5.0, 20.0]), np.array([15.0, 60.0]))
    band = common_band([one, three], BandKind.minmax)
    assert band is not None
    assert (band.x[0], band.x[-1]) == (5.0, 10.0)
    np.testing.assert_allclose(band.mean, 2 * band.x)
    np.testing.assert_allclose(band.high, 3 * band.x)
    later = (np.array([11.0, 12.0]), np.array([0.0, 0.0]))
    assert common_band([one, later], BandKind.minmax) is None


def test_smoothing_looks_back_and_never_ahead() -> None:
    found = smoothed(np.array([3.0, 5.0, 10.0, 0.0]), 2)
    np.testing.assert_allclose(found, [3.0, 4.0, 7.5, 5.0])


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (500, "500"), (10_000, "10k"), (2.5e6, "2.5M"), (-1500, "-1.5k")]
)
def test_counts_are_short(value: float, text: str) -> None:
    assert count_text(value) == text


def test_a_row_that_is_being_written_is_left_out_and_a_damaged_one_counted(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", (*ROWS, "4,four,2,50,0.4", "5,5000,2.5,60,0.3"))
    with (run / "progress.csv").open("a") as file:
        file.write("6,60")
    progress = read_progress(run / "progress.csv")
    assert progress.columns["env_steps"].tolist() == [1000, 2000, 3000, 5000]
    assert np.isnan(progress.columns["episode_return_mean"][0])
    assert progress.n_damaged == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (HEADER.encode() + b"\n", "has no row"),
        (b"a,b\n1,2\n", "no column 'iteration'"),
        (HEADER.encode() + b"\nx,y,z,a,b\n", "no row that can be read"),
        (b"\xff\xfe\x00", "can't be read"),
        (None, "there is no"),
    ],
)
def test_what_cannot_be_drawn_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "progress.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PlotError, match=said):
        read_progress(path)


def test_runs_that_differ_by_their_seed_are_one_group(tmp_path: Path) -> None:
    runs = [
        read_curve(a_run(tmp_path / f"{lr}-{seed}", seed=seed, lr=lr))
        for lr in (0.001, 0.003)
        for seed in (1, 2)
    ]
    groups = group_runs(runs)
    assert [(group.label, group.count) for group in groups] == [
        ("lr 0.001", "2 seeds"),
        ("lr 0.003", "2 seeds"),
    ]
    assert [group.label for group in group_runs(runs, "gamma")] == ["algo_config.gamma = 0.99"]
    assert len(group_runs(runs, "run")) == 4
    with pytest.raises(ConfigError, match=r"did you mean algo_config\.gamma"):
        group_runs(runs, "algo_config.gama")


def test_a_stop_that_came_later_does_not_set_a_run_apart(tmp_path: Path) -> None:
    runs = [
        read_curve(a_run(tmp_path / "one", seed=1, stop={"timesteps": 10})),
        read_curve(a_run(tmp_path / "two", seed=2, stop={"timesteps": 20})),
    ]
    assert len(group_runs(runs)) == 1


def test_a_figure_shows_the_mean_of_the_seeds_the_stop_and_what_its_band_is(tmp_path: Path) -> None:
    rows = ("1,1000,1,10,0", "2,2000,2,20,0"), ("1,1000,1,30,0", "2,2000,2,60,0")
    runs = [read_curve(a_run(tmp_path / str(n), rows[n], seed=n)) for n in range(2)]
    figure = learning_figure(group_runs(runs), options())
    (line,) = thick_lines(figure)
    np.testing.assert_allclose(np.interp([1000, 2000], *line.get_data()), [20, 40])
    for text in ("PPO on CartPole-v1", "environment steps", "(2 seeds)", "95 % CI", "stop at 475"):
        assert text in texts(figure)


def test_evaluations_are_points_apart_from_the_training_returns(tmp_path: Path) -> None:
    header = "iteration,env_steps,time_s,episode_return_mean,evaluation_return_mean"
    rows = ("1,1000,1,10,", "2,2000,2,20,100", "3,3000,3,30,9"), ("2,2010,2,20,300", "3,3000,3,30,")
    runs = [read_curve(a_run(tmp_path / str(n), rows[n], header=header, seed=n)) for n in range(2)]
    figure = learning_figure(group_runs(runs), options(smooth=3))
    marked = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    (points,) = (line.get_xydata().tolist() for line in marked)
    assert points == [[2005.0, 200.0]]
    assert "evaluation (greedy)" in texts(figure)


def test_time_is_in_units_that_people_read(tmp_path: Path) -> None:
    rows = ("1,1000,600,10,0", "2,2000,1200,20,0")
    run = read_curve(a_run(tmp_path / "run", rows))
    figure = learning_figure(group_runs([run]), options(x=XAxis.time))
    assert thick_lines(figure)[0].get_xdata().tolist() == [10.0, 20.0]
    assert "training time (minutes)" in texts(figure)


@pytest.mark.parametrize(
    ("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")]
)
def test_a_figure_is_of_the_kind_that_its_suffix_names(
    tmp_path: Path, suffix: str, magic: bytes
) -> None:
    run = a_run(tmp_path / "run")
    output = tmp_path / f"figure{suffix}"
    assert plot(run, "-o", output, "--metric", "return", "--metric", "entropy") == 0
    assert output.read_bytes().startswith(magic)
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.name, "run"]


def test_the_same_runs_give_the_same_file(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    for name in ("one.svg", "two.svg"):
        assert plot(run, "-o", tmp_path / name, "--theme", "dark") == 0
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_damaged_rows_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_run(tmp_path / "run", ("1,1000,1,10,0", "2,2000,2,", "3,3000,3,20,0"))
    assert plot(run, "-o", tmp_path / "x.png") == 0
    assert "1 damaged row" in capsys.readouterr().err


def test_wrong_usage_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, search = a_run(tmp_path / "run"), a_search(tmp_path / "search", TRIALS)
    output = tmp_path / "x.png"
    wrong: Mapping[str, tuple[object, ...]] = {
        "expected .png, .svg, .pdf": (run, "-o", tmp_path / "x.bmp"),
        "there is no directory": (run, "-o", tmp_path / "none" / "x.png"),
        "neither a run of `train`": (tmp_path, "-o", output),
        "there is no such directory": (tmp_path / "none", "-o", output),
        "did you mean entropy?": (run, "-o", output, "--metric", "entropi"),
        "plot it alone": (run, search, "-o", output),
    }
    for said, arguments in wrong.items():
        assert said in refusal(capsys, *arguments, exit_code=2)
    (run / "progress.csv").write_text("")
    assert "is empty" in refusal(capsys, run, "-o", output, exit_code=1)
    assert not output.exists()


def test_a_search_knows_its_best_and_who_never_got_there(tmp_path: Path) -> None:
    search = read_search(a_search(tmp_path / "search", TRIALS))
    assert search.best is not None
    assert search.best.name == "trial_0001"
    assert [trial.name for trial in search.unreached] == ["trial_0002"]
    assert [trial.name for trial in search.failed] == ["trial_0003"]
    assert search.summary == "5 trials, 1 never reached the stop return, 1 failed, 1 not over"
    assert search.trials[0].is_best is None  # a table that an older version wrote
    most = read_search(a_search(tmp_path / "most", TRIALS, mode="max"))
    assert most.best is not None
    assert most.best.name == "trial_0000"


def test_a_search_is_drawn_against_each_of_its_parameters(tmp_path: Path) -> None:
    output = tmp_path / "search.svg"
    assert plot(a_search(tmp_path / "search", TRIALS), "-o", output) == 0
    drawn = output.read_text()  # matplotlib writes each text as a comment beside its outlines
    for text in ("algo_config.lr", "64x64", "best trial", "stop return not reached", "failed"):
        assert text in drawn
    assert "best: trial_0001 with 20,000 (lr 0.003, fcnet_hiddens 64x64)" in drawn


def test_a_search_without_a_result_yet_is_drawn_too(tmp_path: Path) -> None:
    assert plot(a_search(tmp_path / "a", TRIALS[2:]), "-o", tmp_path / "a.png") == 0
    assert plot(a_search(tmp_path / "b", TRIALS[:1]), "-o", tmp_path / "b.png") == 0


def test_a_damaged_search_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search = a_search(tmp_path / "search", [])
    assert "no trial" in refusal(capsys, search, "-o", tmp_path / "x.png", exit_code=1)
    (search / "search.json").write_text("{}")
    assert "not a policyserve-search" in refusal(
        capsys, search, "-o", tmp_path / "x.png", exit_code=1
    )
