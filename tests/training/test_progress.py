"""What is said of how far a run has come: lines away from a terminal, a bar at one, a summary after every stage."""

import dataclasses
import io
import re
import sys

import pytest

from vqvae.training import progress
from vqvae.training.costs import Costs, Outlook
from vqvae.training.options import FitConfig
from vqvae.training.presets import PRESETS
from vqvae.training.progress import SECONDS, Progress, duration


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-1.0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (60.0, "1 min"),
        (320.0, "5 min 20 s"),
        (1234.0, "21 min"),
        (3600.0, "1 h"),
        (7500.0, "2 h 5 min"),
        (3599.9, "1 h"),
    ],
)
def test_durations_are_as_people_say_them(seconds, said):
    assert duration(seconds) == said


def test_steps_have_a_line_at_the_first_and_then_every_so_often(clock, capsys):
    with Progress("codebook", 1000, "img", each=10) as bar:
        for step in range(1, 101):
            clock[0] = float(step)
            bar.update(10, {"objective": 2.0, "usage/0": 1.0} if step % 20 == 1 else None)
    assert capsys.readouterr().err.splitlines() == [
        "codebook: step 1 of 100; objective 2",
        "codebook: step 31 of 100, 10 img/s, 1 min 9 s left; objective 2",
        "codebook: step 61 of 100, 10 img/s, 39 s left; objective 2",
        "codebook: step 91 of 100, 10 img/s, 9 s left; objective 2",
    ]


def test_what_is_no_step_is_told_only_where_it_takes_long(clock, capsys):
    with Progress("encode", 1000, "img") as bar:
        for _ in range(4):
            clock[0] += SECONDS / 2
            bar.update(100)
    assert capsys.readouterr().err.splitlines() == [
        "encode: 200 of 1,000 img, 6.7 img/s, 2 min left",
        "encode: 400 of 1,000 img, 6.7 img/s, 1 min 30 s left",
    ]
    with Progress("encode", 1000, "img", shown=False) as bar:
        for _ in range(4):
            clock[0] += SECONDS
            bar.update(100)
    assert capsys.readouterr().err == ""


def test_a_resumed_stage_has_the_rate_of_its_own_steps(clock, capsys):
    with Progress("prior", 1000, "grid", each=10, start=500) as bar:
        clock[0] = 1.0
        bar.update(10)
        clock[0] = 41.0
        bar.update(400)
    assert "step 91 of 100, 10 grid/s, 9 s left" in capsys.readouterr().err


def test_at_a_terminal_there_is_a_bar_and_no_line(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("codebook", 100, "img", each=10) as bar:
        for _ in range(10):
            clock[0] += SECONDS
            bar.update(10, {"objective": 2.0})
    assert "codebook: 100%" in terminal.getvalue()
    assert "objective 2" in terminal.getvalue()
    assert "step 1 of 10" not in terminal.getvalue()


@pytest.mark.parametrize("at_terminal", [False, True])
def test_after_the_first_steps_the_whole_is_told_once(clock, monkeypatch, at_terminal):
    stream = Terminal() if at_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    asked = []
    with Progress("codebook", 1000, "img", each=10, outlook=lambda rest: asked.append(rest) or "told") as bar:
        for _ in range(50):
            clock[0] += 2.0
            bar.update(10)
    assert asked == [pytest.approx(2.0 * (100 - 6))]
    assert stream.getvalue().count("told") == 1


def test_the_outlook_is_of_all_that_comes():
    run = dataclasses.replace(PRESETS["fashion-mini"], prior_fit=FitConfig(num_steps=1500))
    costs = Costs(codebook=9.0, prior=0.1, encoding=10.0, evaluation=20.0)
    everything = Outlook(run=run, wanted=("codebook", "prior", "evaluate"), costs=costs)
    assert everything.told("codebook", 240.0) == (
        "about 7 min to go: codebook 4 min, encoding 10 s, prior 2 min 30 s, evaluation 20 s"
    )
    assert everything.told("prior", 100.0) == "about 2 min to go: prior 1 min 40 s, evaluation 20 s"
    assert Outlook(run=run, wanted=("prior",)).told("prior", 9.0) == "about 9 s to go: prior 9 s"
    assert "and then what comes after" in Outlook(run=run, wanted=("codebook", "prior")).told("codebook", 9.0)


@pytest.mark.parametrize("stage", ["codebook", "prior"])
def test_every_stage_ends_with_its_folder(run, options, tmp_path, capsys, stage):
    if stage == "prior":
        run(*options, "--stage", "codebook")
    capsys.readouterr()
    run(*options, "--stage", stage, *(["--resume"] if stage == "prior" else []))
    *_, last = capsys.readouterr().err.splitlines()
    num, made = {"codebook": (8, "codebook/, reconstructions/"), "prior": (6, "prior/, samples/")}[stage]
    assert last.startswith(f"{stage}: {num} steps done, ")
    assert last.endswith(f"; {tmp_path / 'run'}/: {made}")
    figure = {"codebook": "distortion", "prior": "rate"}[stage]
    told = re.search(rf"test {figure} ([\d.]+)", last)
    written = [row.split(",") for row in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    values = [row[4] for row in written if row[:4] == [stage, str(num), "test", figure]]
    assert float(told[1]) == pytest.approx(float(values[-1]), rel=0.01)
