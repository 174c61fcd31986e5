"""Runs on photographs: varied images that resuming repeats, a cache that changes nothing, and what the start says."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_files import ROOT, SECONDS, SMALL, finish, start, stopped, weights

from vqvae import load_images
from vqvae.data import cache as caches
from vqvae.data.augmentation import Augment
from vqvae.training.options import DataConfig, load_run
from vqvae.training.parsing import parse

AUGMENT = ["--data.augment.crop", "0.5", "--data.augment.flip", "--data.augment.rotate", "5"]


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """However full the disk of a test's machine is."""
    monkeypatch.setattr(caches, "RESERVE", 0)


def make_pictures(folder: Path, num: int = 24) -> Path:
    """Pictures of blotches of 60 x 48 and 90 x 60 pixels, in two classes."""
    generator = np.random.default_rng(0)
    for number in range(num):
        blotches = Image.fromarray(generator.integers(0, 256, (4, 6, 3), np.uint8))
        path = folder / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blotches.resize([(60, 48), (90, 60)][number % 2], Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def options(pictures: Path, tmp_path: Path) -> list[str]:
    return [*SMALL, "--data.source", str(pictures), "--run", str(tmp_path / "run"), *AUGMENT]


def cached(run: Path) -> set[str]:
    return {path.relative_to(run / "cache").parts[0] for path in (run / "cache").glob("*/*/*") if path.is_file()}


def test_a_stopped_run_shows_the_same_images_when_it_goes_on(run, options, tmp_path, monkeypatch):
    run(*options)
    whole, cut = tmp_path / "whole", tmp_path / "run"
    cut.rename(whole)
    assert cached(whole) == {"fitted", "pictures"}
    stopped(run, monkeypatch, cut, options, codebook=(3, 5), prior=(2,))
    shutil.rmtree(cut / "cache")
    run("--resume", "--run", cut)
    assert weights(cut) == weights(whole)
    run(*options, "--run", tmp_path / "without", "--data.cache", "0")
    assert weights(tmp_path / "without") == weights(whole)
    assert not (tmp_path / "without" / "cache").exists()
    known = load_run(whole).data
    assert known.augment == Augment(crop=0.5, flip=True, rotate=5.0)
    plain = tmp_path / "plain"
    run(*options, "--run", plain, "--data.augment.crop", "1", "--data.augment.no-flip", "--data.augment.rotate", "0")
    assert weights(plain) != weights(whole), "the options do nothing"


@pytest.mark.slow
def test_a_run_killed_at_any_step_with_two_workers_ends_with_the_same_bits(options, tmp_path):
    options = [*options, "--stage", "codebook", "--data.num-workers", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "run"
    finish(start(*options, "--run", whole))
    program = Path(__file__).with_name("killed_at_step.py")
    # Steps of each process: before there is a checkpoint, right after one, and between two.
    for number in (1, 3, 2, 4, 1):
        resume = ["--resume"] if (cut / "state" / "run.json").exists() else []
        words = [sys.executable, program, number, *options, *resume]
        done = subprocess.run(
            [*map(str, words)], cwd=ROOT, timeout=SECONDS, capture_output=True, text=True, check=False
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    finish(start("--resume", "--run", cut))
    assert weights(cut)["codebook"] == weights(whole)["codebook"]


def test_a_run_of_before_goes_on_as_it_was(run, pictures, tmp_path, monkeypatch):
    """Its run.json knows nothing of augmentation or of a cache."""
    options = [*SMALL, "--data.source", str(pictures), "--run", str(tmp_path / "run"), "--stage", "codebook"]
    run(*options)
    (tmp_path / "run").rename(tmp_path / "whole")
    stopped(run, monkeypatch, tmp_path / "run", options, codebook=(5,))
    path = tmp_path / "run" / "state" / "run.json"
    plain = json.loads(path.read_text())
    for name in ("augment", "cache"):
        del plain["data"][name]
    path.write_text(json.dumps(plain))
    shutil.rmtree(tmp_path / "run" / "cache")
    assert load_run(tmp_path / "run").data.augment == Augment()
    run("--resume", "--run", tmp_path / "run", "--stage", "codebook")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_the_disk_of_the_cache_is_full(run, options, tmp_path, monkeypatch, capsys):
    run(*options, "--run", tmp_path / "whole", "--stage", "codebook")
    assert "is not filled further" not in capsys.readouterr().err
    monkeypatch.setattr(caches, "RESERVE", shutil.disk_usage(tmp_path).total)
    run(*options, "--stage", "codebook")
    told = [line for line in capsys.readouterr().err.splitlines() if "the cache" in line]
    assert len(told) == 1
    assert told[0].startswith(f"note: the cache {tmp_path / 'run' / 'cache'} is not filled further, and images are ")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_what_is_refused_after_images_were_read_leaves_no_cache(run, fails, options, tmp_path):
    assert "too short" in fails(*options, "--time-budget", "0.001s")
    assert not (tmp_path / "run").exists()
    run(*options, "--stage", "codebook")
    assert cached(tmp_path / "run"), "one that was there stays"
    assert "too short" in fails("--stage", "prior", "--run", tmp_path / "run", "--time-budget", "0.001s")
    assert cached(tmp_path / "run")


def lines(run, capsys, options: list[str], **data: object) -> list[str]:
    """What a run says before it trains: all of one that is stopped then."""
    run(*options, "--stage", "codebook", "--codebook-fit.num-steps", "1")
    said = capsys.readouterr().err.splitlines()
    return [line for line in said if line.startswith(("note: ", str(options[options.index("--run") + 1])))]


def test_the_start_says_what_the_images_are(run, options, pictures, tmp_path, capsys):
    train, test = (len(load_images(pictures, split)) for split in ("train", "test"))
    first, *notes = lines(run, capsys, options)
    assert first.startswith(f"{tmp_path / 'run'}: {train} training and {test} test images from {pictures}, ")
    assert ", 60x48 to 90x60, 2 classes; 1 x " in first
    assert notes == [
        f"note: {train} training images are very few, and a model learns them by heart",
        f"note: {test} test images are very few: figures of them tell little",
    ]


def test_the_start_says_what_is_wrong_with_them(run, tmp_path, capsys):
    folder = make_pictures(tmp_path / "photos" / "train")
    shutil.copytree(folder, tmp_path / "photos" / "test")
    for number in range(6):  # others than those to train on
        path = tmp_path / "photos" / "test" / "ab"[number % 2] / f"{number:02}.png"
        with Image.open(path) as image:
            image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(path)
    for name in ("a/00", "a/02"):
        (folder / f"{name}.png").write_bytes(b"broken")
    options = [*SMALL, "--data.source", str(tmp_path / "photos"), "--run", str(tmp_path / "run")]
    first, *notes = lines(run, capsys, options)
    assert "24 training and 24 test images" in first
    unusable, few, both = notes
    assert unusable == (
        "note: 2 of 24 train images looked at can't be read and will be left out, as "
        f"{unusable.split(', as ')[1].split(':')[0]}: not an image in a known format"
    )
    assert few.endswith("--data.augment.crop 0.5 --data.augment.flip makes more of them")
    assert both.startswith("note: 18 test images are among the training images too (")
    assert both.endswith(", ...): figures of them are too good, remove one of each")
    _, *again = lines(run, capsys, [*options, "--resume"])
    assert len(again) == 2, "where it goes on pictures are not held against each other once more"


def test_images_of_large_sets_are_looked_at_in_part(run, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vqvae.training.images.survey", lambda images: looked(images, 3))
    options = [*SMALL, "--data.source", str(pictures), "--run", str(tmp_path / "run")]
    first, *_ = lines(run, capsys, options)
    assert " (3 looked at), 2 classes" in first


def looked(images, most: int):
    from vqvae.data.survey import survey

    return survey(images, most=most)


def test_without_the_package_it_says_what_to_install(run, options, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    _, *notes = lines(run, capsys, options)
    assert notes[-1] == "note: pip install 'vqvae-priors[photos]' to be told of pictures that are in both splits"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.augment.crop", "1.2"], "got crop=1.2; expected more than 0 and at most 1"),
        (["--data.augment.ratio", "2", "3"], "got ratio=2 3; expected two numbers"),
        (["--data.augment.rotate", "60"], "got rotate=60; expected 0 to 45 degrees"),
        (["--data.cache", "-1"], "got cache=-1; expected gigabytes, 0 for none"),
    ],
)
def test_what_cannot_be_is_one_line(fails, options, words, message):
    assert message in fails(*options, *words)


def test_options_are_in_the_file_of_the_run_and_read_again():
    data = DataConfig(augment=Augment(crop=0.3, ratio=(0.5, 2.0)), cache=0.5)
    assert DataConfig.from_plain(json.loads(json.dumps(data.to_plain()))) == data
    found = parse(["--data.augment.ratio", "1", "1", "--data.augment.flip"]).data
    assert found == dataclasses.replace(found, augment=Augment(ratio=(1.0, 1.0), flip=True), cache=2.0)


def test_a_picture_of_one_row_is_trained_on(run, tmp_path):
    folder = make_pictures(tmp_path / "photos", 12)
    Image.fromarray(np.arange(30_000, dtype=np.uint32).astype(np.uint8).reshape(1, 10_000, 3)).save(
        folder / "a" / "row.png"
    )
    options = [*SMALL, "--data.source", str(folder), "--run", str(tmp_path / "run"), *AUGMENT]
    run(*options, "--stage", "codebook")
    assert (tmp_path / "run" / "codebook").is_dir()
