"""`vqvae tokenize --size`: codes of images as large as they are, and priors on the grids that they have."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqvae import VQVAE
from vqvae.cli.image_choice import ImageChoice, choose
from vqvae.data import load_images
from vqvae.data.decoding import FITTED
from vqvae.data.own_sizes import PADDED
from vqvae.quantizers import VectorQuantizer
from vqvae.tokens import CodeBuckets, CodeDataset
from vqvae.training.prior_data import stored_codes

SIZES = {(12, 16): 12, (16, 12): 10, (11, 16): 4}
PRIOR = ("--prior.width", 16, "--prior.depth", 1, "--prior.num-heads", 2, "--prior-fit.num-steps", 3)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Photographs of several sizes, as files of both splits."""
    generator = np.random.default_rng(0)
    for split, share in (("train", 1), ("test", 2)):
        for (height, width), num in SIZES.items():
            for number in range(num // share):
                path = tmp_path / "photos" / split / f"{height}-{width}-{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (height, width), np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def model(tmp_path: Path) -> VQVAE:
    torch.manual_seed(0)
    quantizer = VectorQuantizer.Config(num_codes=8, dim=4)
    made = VQVAE(image_size=8, width=8, num_blocks=1, quantizer=quantizer).eval()
    made.save_pretrained(tmp_path / "model")
    return made


def test_images_as_large_as_they_are(run, fails, mixed, model, tmp_path, capsys):
    run("tokenize", tmp_path / "model", mixed, "-o", tmp_path / "codes", "--size", "keep")
    out = capsys.readouterr().out
    assert f"{tmp_path / 'codes' / '12x16' / 'train'}: 16 rows in 1 shards" in out
    for split in ("train", "test"):
        buckets = CodeBuckets(tmp_path / "codes", split)
        assert {size: codes.grid for size, codes in buckets.items()} == {(12, 16): (3, 4), (16, 12): (4, 3)}
        for codes in buckets.values():
            for index in range(len(codes)):
                path = mixed / split / Path(codes.key(index)).name
                pixels = torch.from_numpy(np.array(Image.open(path)))[None, None]
                assert torch.equal(codes[index][0], model.encode(pixels, pad=True)[0])
    again = (tmp_path / "codes" / "12x16" / "train" / "codes-00000.safetensors").read_bytes()
    (tmp_path / "codes" / "12x16" / "train" / "codes-00000.safetensors").unlink()
    run("tokenize", tmp_path / "model", mixed, "-o", tmp_path / "codes", "--size", "keep")
    assert (tmp_path / "codes" / "12x16" / "train" / "codes-00000.safetensors").read_bytes() == again
    said = fails(
        "tokenize", tmp_path / "model", mixed, "-o", tmp_path / "x", "--size", "keep", "--parquet", "x.parquet"
    )
    assert "--parquet is for codes of one grid" in said


def test_a_prior_on_the_grid_of_a_size(run, fails, mixed, model, tmp_path):
    run("tokenize", tmp_path / "model", mixed, "-o", tmp_path / "codes", "--size", "keep")
    codes, folder = tmp_path / "codes" / "16x12", tmp_path / "run"
    run("--stage", "prior", "--codes", codes, "--run", folder, *PRIOR)
    assert VQVAE.from_pretrained(folder / "codebook").size == (16, 12)
    run("sample", folder, "--num", 2, "--output", tmp_path / "samples")
    assert load_images(tmp_path / "samples", "train", size=(16, 12))[0][0].shape == (1, 16, 12)
    run("evaluate", folder, "--data", mixed)
    other = tmp_path / "codes" / "12x16"
    said = fails("--resume", "--stage", "prior", "--codes", other, "--run", folder, *PRIOR)
    assert "of another tokenizer" in said


def test_a_prior_is_for_one_of_several_sizes(run, fails, mixed, model, tmp_path):
    run("tokenize", tmp_path / "model", mixed, "-o", tmp_path / "codes", "--size", "keep")
    for more in ((), ("--tokenizer", tmp_path / "model")):
        said = fails("--stage", "prior", "--codes", tmp_path / "codes", "--run", tmp_path / "run", *PRIOR, *more)
        assert "holds codes of 2 sizes, and a prior is for one" in said
        assert f"as --codes {tmp_path / 'codes' / '12x16'} (there are '12x16', '16x12')" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"2 sizes.* \(there are '12x16', '16x12'\)"):
        stored_codes(tmp_path / "codes", "test", model)


@pytest.mark.parametrize("kind", ["keep", "cropped", "gone"])
def test_a_run_on_the_codes_of_a_size_is_judged_by_images_of_that_size(run, mixed, model, tmp_path, capsys, kind):
    """Of a set of all images, brought to a size, or one that is gone, by all of them."""
    codes, folder = tmp_path / "codes" / "16x12", tmp_path / "run"
    if kind == "cropped":
        run("tokenize", tmp_path / "model", mixed, "-o", codes, "--size", "16x12")
    else:
        run("tokenize", tmp_path / "model", mixed, "-o", tmp_path / "codes", "--size", "keep")
    run("--stage", "prior", "--codes", codes, "--run", folder, *PRIOR)
    if kind == "gone":
        shutil.rmtree(codes)
    capsys.readouterr()
    run("evaluate", folder, "--output", tmp_path / "elbo.json")
    said = capsys.readouterr().err
    num = 5 if kind == "keep" else 13
    assert json.loads((tmp_path / "elbo.json").read_text())["images"] == num
    assert f"images: all {num} test images of {mixed}; --split all takes those to train on, too; " in said
    assert ("those of 16x12 alone, as the codes of its prior" in said) == (kind == "keep")
    assert ("scaled and cropped to 16x12" in said) == (kind != "keep")
    run("reconstruct", folder, "--split", "all", "--output", tmp_path / "pairs.png")
    assert f"{'15' if kind == 'keep' else '32 of 39'} images of {mixed}; " in capsys.readouterr().err
    run("reconstruct", folder, "--size", "keep", "--num", "99", "--output", tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("*.png"))) == 13
    chosen = choose(str(folder), ImageChoice(), VQVAE.from_pretrained(folder / "codebook"))
    assert chosen.prepared == (PADDED if kind == "keep" else FITTED), "as the protocol of figures for the eye says it"
    if kind == "gone":
        return
    run("--stage", "evaluate", "--run", folder)
    assert ("evaluation is on the 5 of 13 test images that are of 16x12" in capsys.readouterr().err) == (kind == "keep")
    one, other = (json.loads(path.read_text()) for path in (folder / "elbo.json", tmp_path / "elbo.json"))
    assert one["images"] == num
    assert one["rate"] == other["rate"]
    assert one["distortion"] == other["distortion"]


@pytest.mark.parametrize(("size", "grid"), [((16, 20), (4, 5)), ((12,), (3, 3))])
def test_another_size_than_the_model_s(run, fails, mixed, model, tmp_path, size, grid):
    run("tokenize", tmp_path / "model", mixed, "-o", tmp_path / "codes", "--size", "x".join(map(str, size)))
    codes = CodeDataset(tmp_path / "codes" / "train")
    assert codes.grid == grid
    images = load_images(mixed, "train", size=size if len(size) == 2 else size[0], channels=1)
    assert torch.equal(codes[:5].codes, model.encode(images[:5].images))
    said = fails("tokenize", tmp_path / "model", mixed, "-o", tmp_path / "odd", "--size", "10x12")
    assert "image_size (10, 12) is not a multiple of 4" in said
    assert not (tmp_path / "odd").exists()


def test_what_is_no_image_is_named_noted_and_the_status_is_one(run, mixed, model, tmp_path, capsys):
    words = ("tokenize", tmp_path / "model", mixed, "-o", tmp_path / "codes", "--size", "keep")
    for name in ("broken", "other"):
        (mixed / "train" / f"{name}.png").write_bytes(b"no image")
    path = tmp_path / "codes" / "unreadable-train.json"
    for _ in range(2):  # also where all else is there
        with pytest.raises(SystemExit) as stopped:
            run(*words)
        assert stopped.value.code == 1
        said = capsys.readouterr()
        assert "skipped broken.png: not an image" in said.err.replace("train/", "")
        assert f"{path}: 2 of 28 train images are in no set, " in said.out
        assert "test images are in no set" not in said.out
        noted = json.loads(path.read_text())["unreadable"]
        assert [(Path(each["key"]).name, each["reason"]) for each in noted] == [
            (name, "not an image in a known format") for name in ("broken.png", "other.png")
        ]
    buckets = CodeBuckets(tmp_path / "codes")
    assert len(buckets) == 2
    assert buckets.unreadable == tuple((each["key"], each["reason"]) for each in noted)
    assert CodeBuckets(tmp_path / "codes", "test").unreadable == ()
    path.write_text('{"unreadable": [{"key": 3}]}')
    with pytest.raises(ValueError, match=r"unreadable-train\.json is damaged"):
        CodeBuckets(tmp_path / "codes")
    for name in ("broken", "other"):
        (mixed / "train" / f"{name}.png").unlink()
    run(*words)
    assert not path.exists()


def test_sets_of_a_source_that_changed_and_of_another_tokenizer_are_refused_before_anything(
    run, fails, mixed, model, tmp_path
):
    words = ("tokenize", tmp_path / "model", mixed, "-o", tmp_path / "codes", "--size", "keep")
    run(*words)
    before = {path: path.read_bytes() for path in (tmp_path / "codes").rglob("*") if path.is_file()}
    odd = mixed / "train" / "odd.png"
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(odd)
    run(*words)
    odd.unlink()
    said = fails(*words)
    assert "32x32/train holds codes of a size that no train image has now" in said
    quantizer = VectorQuantizer.Config(num_codes=8, dim=4)
    VQVAE(image_size=8, width=8, num_blocks=0, quantizer=quantizer).save_pretrained(tmp_path / "other")
    shutil.rmtree(tmp_path / "codes" / "32x32")
    said = fails("tokenize", tmp_path / "other", mixed, "-o", tmp_path / "codes", "--size", "keep")
    assert "tokenizer" in said
    assert {path: path.read_bytes() for path in (tmp_path / "codes").rglob("*") if path.is_file()} == before


def test_a_size_is_one_word_before_what_is_read_too(run, fails, mixed, model, tmp_path):
    run("tokenize", "--size", "12x16", tmp_path / "model", mixed, "-o", tmp_path / "codes")
    assert CodeDataset(tmp_path / "codes" / "train").grid == (3, 4)
    for size in ("12 x 16", "0", "x12", "1e3", "-4"):
        said = fails("tokenize", tmp_path / "model", mixed, "-o", tmp_path / "odd", f"--size={size}")
        assert "expected a side in pixels, as 256, or height and width, as 192x256" in said


def test_a_budget_for_a_prior_on_codes(run, mixed, model, tmp_path, capsys):
    run("tokenize", tmp_path / "model", mixed, "-o", tmp_path / "codes")
    run("--stage", "prior", "--tokenizer", tmp_path / "model", "--codes", tmp_path / "codes", "--run", tmp_path / "run",
        *PRIOR[:-2], "--time-budget", "10s")  # fmt: skip
    assert "time budget 10s: " in capsys.readouterr().err
    assert (tmp_path / "run" / "prior" / "model.safetensors").is_file()
