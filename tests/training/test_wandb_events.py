"""--logger wandb: what goes there beside the run's folder; by a stand-in for the library, and by itself, offline."""

import csv
import json
import sys
import types
from pathlib import Path

import pytest
from PIL import Image
from run_files import stopped, weights


class Wandb(types.ModuleType):
    """What is asked of the library, written down."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict] = []
        self.logged: list[dict] = []
        self.metrics: list[tuple[str, str]] = []
        self.finished = 0
        self.id = "abc123"
        self.Image = lambda image: ("picture", image.size, image.mode)
        self.Settings = lambda **words: words

    def init(self, **words) -> "Wandb":
        self.begun.append(words)
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, what: dict) -> None:
        self.logged.append(what)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> Wandb:
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def test_figures_and_pictures_go_there_too(run, options, tmp_path, wandb):
    run(*options, "--logger", "wandb")
    folder = tmp_path / "run"
    (begun,) = wandb.begun
    assert (begun["name"], begun["dir"], begun["id"]) == ("run", str(folder), None)
    assert begun["config"]["codebook_fit"]["num_steps"] == 8
    assert begun["settings"] == {"console": "off"}
    assert wandb.metrics == [("codebook/*", "codebook/step"), ("prior/*", "prior/step")]
    assert wandb.finished == 1
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    expected = [(stage, int(step), f"{stage}/{split}/{name}") for stage, step, split, name, _ in rows]
    found, pictures = [], []
    for each in wandb.logged:
        ((stage, step),) = ((name.partition("/")[0], value) for name, value in each.items() if name.endswith("/step"))
        for name, value in each.items():
            if isinstance(value, tuple):
                pictures.append((name, step))
                with Image.open(folder / name.partition("/")[2] / f"{step:06}.png") as opened:
                    assert value == ("picture", opened.size, "RGB")
            elif not name.endswith("/step"):
                found.append((stage, step, name))
    assert found == expected
    kept = {"codebook/reconstructions": (4, 8), "prior/samples": (3, 6)}
    assert pictures == [(name, step) for name, steps in kept.items() for step in steps]
    assert list((folder / "tensorboard" / "codebook").glob("events*"))


def test_a_resumed_run_goes_on_with_the_same_one_there(run, options, tmp_path, monkeypatch, wandb):
    run(*options)
    whole = (tmp_path / "run").rename(tmp_path / "whole")
    assert not wandb.begun
    assert not (whole / "state" / "wandb.json").exists()
    stopped(run, monkeypatch, tmp_path / "run", [*options, "--logger", "wandb"], codebook=(3,))
    run("--resume", "--run", tmp_path / "run")
    assert [(each["id"], each["resume"]) for each in wandb.begun] == [(None, None), ("abc123", "allow")]
    assert wandb.finished == 2
    assert weights(tmp_path / "run") == weights(whole)


def test_what_cannot_be_had_is_one_line(fails, options, tmp_path, monkeypatch, wandb):
    def refused(**words):
        raise RuntimeError("no api key\nconfigured")

    monkeypatch.setattr(wandb, "init", refused)
    line = fails(*options, "--logger", "wandb")
    assert "wandb cannot be written to: no api key configured; log in by `wandb login`" in line
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    line = fails(*options, "--logger", "wandb", "--run", tmp_path / "other")
    assert "pip install 'vqvae-priors[wandb]'" in line
    assert not (tmp_path / "other").exists()
    assert "--logger" in fails(*options, "--logger", "paper", "--run", tmp_path / "other")


def test_the_library_itself_keeps_all_of_it_offline(run, options, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(*options, "--logger", "wandb")
    folder = tmp_path / "run"
    (kept,) = (folder / "wandb").glob("offline-run-*")
    assert list(kept.glob("*.wandb"))
    known = json.loads((folder / "state" / "wandb.json").read_text())["id"]
    assert kept.name.endswith(known)
    pictures = [path for path in (kept / "files" / "media").rglob("*.png") if Path(path).is_file()]
    assert len(pictures) == 4
    sizes = set()
    for path in pictures:
        with Image.open(path) as opened:
            sizes.add(opened.size)
    with Image.open(folder / "samples" / "000003.png") as opened:
        assert opened.size in sizes
