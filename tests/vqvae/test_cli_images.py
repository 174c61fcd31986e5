"""`--data` and `--split`: which images `reconstruct` and `evaluate` look at, and what they say of it."""

import json

import numpy as np
import pytest
import torch
from cli_worlds import CODES, SIZE, in_empty_folder, save_run
from PIL import Image

from vqvae import VQVAE, load_images
from vqvae.cli.image_choice import ImageChoice, Joined, choose

call = pytest.fixture(in_empty_folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Thirty colour images, two classes; a tenth is held out."""
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for index in range(30):
        pixels = torch.randint(0, 256, (SIZE, SIZE + 4, 3), dtype=torch.uint8, generator=generator)
        (folder / str(index % 2)).mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / str(index % 2) / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    folder = save_run(tmp_path_factory.mktemp("runs") / "grey", num_classes=2)
    (folder / "state").mkdir()
    (folder / "state" / "run.json").write_text(json.dumps({"data": {"source": str(photos), "root": None}}))
    return folder


def counts(photos):
    return [len(load_images(photos, split, size=SIZE)) for split in ("train", "test")]


def test_the_split_is_said_and_taken(call, run, photos):
    train, test = counts(photos)
    for words, num, name in (
        ((), test, "test images"),
        (("--split", "test"), test, "test images"),
        (("--split", "train"), train, "training images"),
        (("--split", "all"), 30, "images"),
    ):
        said = call("evaluate", run, *words, "--output", "figures.json")
        with open("figures.json") as file:
            figures = json.load(file)
        assert (figures["images"], figures["split"]) == (num, words[1] if words else "test")
        assert f"{num} {name} of 256 dimensions" in said.out
        (line,) = said.err.splitlines()
        assert line.startswith(f"images: all {num} {name} of {photos}; ")
        assert "colour is turned to grey" in line
        assert ("--split all" in line) == (not words)
        assert (f"{train} train and {test} test" in line) == (num == 30)
    assert f"images: 3 of {test} test images of" in call("reconstruct", run, "--num", "3").err or test <= 3
    assert "images: 5 of 30 images of" in call("reconstruct", run, "--num", "5", "--split", "all").err


def test_single_files_are_images_too(call, run, photos, tmp_path):
    Image.fromarray(np.full((40, 50), 200, np.uint8)).save("grey.png")
    Image.fromarray(np.full((40, 50, 3), (255, 0, 0), np.uint8)).save("red.jpg")
    said = call("reconstruct", run, "--data", "grey.png", "-o", "one.png")
    assert said.err.splitlines() == [f"images: grey.png; scaled and cropped to {SIZE}x{SIZE}"]
    with Image.open("one.png") as picture:
        # One above the other, enlarged by 32, with the levels of the file.
        assert picture.size == (512 + 4, 2 * (512 + 2) + 2)
        assert picture.getpixel((100, 100)) == (200, 200, 200)
    said = call("reconstruct", run, "--data", "grey.png", "red.jpg")
    assert "all 2 images of 2 files" in said.err
    assert "colour is turned to grey" in said.err
    assert "2 images of 256 dimensions" in call("evaluate", run, "--data", "grey.png", "red.jpg", "-o", "x.json").out
    assert json.loads((tmp_path / "x.json").read_text())["split"] == "all"


def test_what_is_no_choice_is_one_line(call, run, photos, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no image")
    (tmp_path / "set.parquet").write_bytes(b"")
    Image.new("L", (9, 9)).save("y.png")
    for words, message in (
        (("--data", "x.png"), "x.png: not an image in a known format"),
        (("--data", "y.png", "nowhere.png"), "no file at nowhere.png"),
        (("--data", "y.png", photos), "among several --data, expected image files"),
        (("--data", "y.png", "set.parquet"), "among several --data, expected image files"),
        (("--data", "y.png", "--split", "train"), "image files are none: leave it out"),
        (("--data",), "got --data without a name"),
        (("--split", "valid"), "--split"),
    ):
        for command in ("reconstruct", "evaluate"):
            assert message in call.refused(command, run, *words)


def test_parts_that_are_joined_are_both_in_any_order(photos):
    parts = [load_images(photos, split, size=SIZE, channels=3) for split in ("train", "test")]
    joined = Joined(parts)
    assert len(joined) == 30
    assert sorted(joined.key(i) for i in range(30)) == sorted(f"{i % 2}/{i}.png" for i in range(30))
    order = [29, 0, 28, 1, 2, -1]
    batch = joined[order]
    for image, label, index in zip(batch.images, batch.labels, order, strict=True):
        path = photos / joined.key(index % 30)
        assert torch.equal(image, load_like(path))
        assert path.parent.name == joined.class_names[label]
    assert len(joined[[]].images) == 0
    assert torch.equal(joined.labels, torch.cat([part.labels for part in parts]))


def load_like(path):
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels[:, :, 2:-2]


def test_a_model_of_colour_turns_nothing_to_grey(photos):
    model = VQVAE(image_size=SIZE, num_channels=3, width=8, num_blocks=1, quantizer=CODES)
    chosen = choose("nowhere", ImageChoice(data=(str(photos),), split="all"), model)
    assert "grey" not in chosen.told()
    assert chosen.images.shape == (3, SIZE, SIZE)
    assert chosen.public_name == photos.name


def test_a_grid_of_samples_names_its_classes(call, run, monkeypatch):
    from priors import TransformerPrior
    from vqvae import pictures

    prior = TransformerPrior.from_pretrained(run / "prior")
    prior.class_names = ("cat", "dog")
    prior.save_pretrained("named")
    seen = []
    monkeypatch.setattr(pictures, "save_grid", lambda *args, heads=(), **_: seen.append((args[2], list(heads))))
    for words in ((), ("--label", "1"), ("--columns", "3"), ("--label", "1", "0", "--num", "4"), ("--seeds", "3")):
        call("sample", run, "--prior", "named", *words)
    pairs = ["cat", "dog"] * 5
    assert seen == [(10, pairs), (8, ["dog"] * 8), (3, []), (4, ["dog", "cat"] * 2), (1, [])]
    call("sample", run)
    assert seen[-1] == (10, [])
