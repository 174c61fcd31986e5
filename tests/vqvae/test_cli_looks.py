"""`vqvae evaluate --looks` and `vqvae compare`, on small models and few images."""

import json
import sys

import pytest
import torch
from PIL import Image

from priors import TransformerPrior
from vqvae import VQVAE, GaussianVAE, cli
from vqvae.cli.evaluating import _sampled
from vqvae.pictures import TILE
from vqvae.quantizers import FSQ, EMAVectorQuantizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two runs' folders, a model of vectors and one of other images, and six photographs."""
    folder = tmp_path_factory.mktemp("looks")
    for part in ("train", "test"):
        (folder / "photos" / part).mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for index in range(7):
        pixels = torch.randint(0, 256, (16, 16), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / "photos" / ("test" if index else "train") / f"{index}.png")
    torch.manual_seed(0)
    networks = {"image_size": 16, "width": 8, "num_blocks": 1}
    for name, quantizer in (("ema", EMAVectorQuantizer.Config(num_codes=8, dim=4)), ("fsq", FSQ.Config(levels=(3, 3)))):
        model = VQVAE(**networks, quantizer=quantizer)
        model.save_pretrained(folder / name / "codebook")
        prior = TransformerPrior(num_codes=model.num_codes, grid=model.grid, width=16, depth=1, num_heads=2)
        prior.save_pretrained(folder / name / "prior")
    GaussianVAE(**networks, dim=2).save_pretrained(folder / "gaussian")
    VQVAE(**{**networks, "image_size": 8}).save_pretrained(folder / "smaller")
    return folder


@pytest.fixture
def call(monkeypatch, capsys, world, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run_command(*args, code=0):
        words = [str(world / each) if (world / str(each)).exists() else str(each) for each in args]
        monkeypatch.setattr(sys, "argv", ["vqvae", *words])
        if not code:
            cli.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == code
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    return run_command


def test_evaluate_sets_looks_beside_bits(call, tmp_path):
    said = call("evaluate", "ema", "--data", "photos", "--looks", "lite0", "--output", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    looks = figures["looks"]
    assert looks["protocol"]["images"] == figures["images"] == looks["num_samples"] == 6
    assert looks["reconstructions"]["PSNR"]["value"] == pytest.approx(figures["psnr"], rel=1e-4)
    for kind in ("reconstructions", "samples"):
        estimate = looks[kind]["EfficientNet-Lite0 kernel"]
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert "bits/dim" in said
    assert looks["protocol"]["SHA-256 of the images"] in said
    assert "bicubic" in looks["protocol"]["crop and filter"]


def test_evaluate_without_looks_is_bits_alone(call, tmp_path):
    call("evaluate", "ema", "--data", "photos", "--output", tmp_path / "figures.json")
    assert "looks" not in json.loads((tmp_path / "figures.json").read_text())


def test_no_sample_is_measured_where_there_is_no_prior_or_none_is_wanted(call):
    for words in (["gaussian"], ["ema", "--num-samples", "0"]):
        said = call("evaluate", *words, "--data", "photos", "--looks", "lite0")
        assert "kernel" in said
        assert "precision" not in said


def test_compare_makes_a_table_and_a_picture(call, tmp_path):
    said = call(
        "compare", "ema", "fsq", "gaussian", "--data", "photos", "--looks", "lite0", "--num", 4, "-o", "side.png"
    )
    heads, *rows = (line.split() for line in said.splitlines()[:4])
    assert [row[0].rpartition("/")[2] for row in rows] == ["ema", "fsq", "gaussian"]
    assert [row[1] for row in rows] == ["transformer", "transformer", "normal"]
    at = heads.index("bits/dim")
    for row in rows:
        assert float(row[at]) == pytest.approx(float(row[at - 2]) + float(row[at - 1]), abs=2e-4)
    # Four columns; the images and three rows below them.
    with Image.open(tmp_path / "side.png") as picture:
        assert picture.width == picture.height > 4 * TILE


def test_compare_without_looks(call):
    said = call("compare", "ema", "fsq", "--data", "photos")
    assert "PSNR" in said
    assert "kernel" not in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["compare", "ema", "--data", "photos"], "two or more"),
        (["compare", "ema", "smaller", "--data", "photos"], "image_size 8"),
        (["compare", "ema", "fsq", "--data", "photos", "--num", "0"], "--num"),
        (["compare", "ema", "fsq"], "--data"),
        (["compare", "ema", "nowhere", "--data", "photos"], "nowhere"),
        (["evaluate", "ema", "--data", "photos", "--num-samples", "9"], "--looks"),
        (["evaluate", "ema", "--data", "photos", "--looks", "lite0", "--num-samples", "3"], "at least 5"),
        (["evaluate", "ema", "--data", "photos", "--looks", "lite1"], "lite2"),
        (["evaluate", "ema", "--data", "photos", "--looks"], "expected one or more of lite0, lite2, vgg16, inception"),
        (["compare", "ema", "fsq", "--data", "photos", "--looks"], "got --looks without a network"),
    ],
)
def test_mistakes_are_one_line(call, words, says):
    assert says in call(*words, code=2)


def test_samples_have_the_classes_of_the_images():
    labels, asked = torch.tensor([0] * 11 + [1] * 11 + [2] * 11), []

    class Prior:
        def sample(self, num, labels, generator):
            asked.extend(labels.tolist())
            return labels

    for num in (11, 33, 99):
        asked.clear()
        list(_sampled(Prior(), num, labels))
        counts = [asked.count(label) for label in range(3)]
        assert sum(counts) == num
        assert max(counts) - min(counts) <= 1
