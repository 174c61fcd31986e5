"""`vqvae sample`: classes, seeds, guidance, grids and folders, and parts of images drawn anew."""

import itertools
import json
import os
import re
import shutil
import sys
from contextlib import nullcontext
from dataclasses import fields

import numpy as np
import pytest
import torch
from image_files import save
from PIL import Image

from priors import AnyOrderPrior, MixtureTransformerPrior, Prior, Sampling, TransformerPrior, UnigramPrior
from priors.sampling import guidance_ramp
from vqvae import VQVAE, GaussianVAE, cli
from vqvae.cli.sampling import SamplingFlags
from vqvae.data.decoding import decode
from vqvae.quantizers import FSQ, EMAVectorQuantizer, MultiScaleQuantizer, ResidualQuantizer

CODES = EMAVectorQuantizer.Config(num_codes=8, dim=4)
SMALL = {"width": 16, "depth": 1, "num_heads": 2}
SIZE = 16
ROWS = np.repeat(np.arange(0, 256, 256 // SIZE, dtype=np.uint8)[:, None], SIZE, 1)


def save_run(folder, quantizer=CODES, kind=TransformerPrior, num_classes=3, **options):
    """A run of untrained parts, its prior far from uniform."""
    torch.manual_seed(0)
    model = VQVAE(image_size=SIZE, width=8, num_blocks=1, quantizer=quantizer, **options)
    model.save_pretrained(folder / "codebook")
    prior = kind(num_codes=model.num_codes, grid=model.grid, num_classes=num_classes, **SMALL)
    with torch.no_grad():
        for weight in prior.parameters():
            weight.normal_(std=0.5)
    prior.save_pretrained(folder / "prior")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """4 x 4 codes in raster order, three classes."""
    return save_run(tmp_path_factory.mktemp("runs") / "raster")


@pytest.fixture(scope="module")
def anywhere(run):
    """The same in any order."""
    return save_run(run.parent / "anywhere", kind=AnyOrderPrior)


@pytest.fixture(scope="module")
def gaussian(run):
    folder = run.parent / "gaussian"
    torch.manual_seed(0)
    model = GaussianVAE(image_size=SIZE, width=8, num_blocks=1, dim=3)
    model.save_pretrained(folder / "codebook")
    config = MixtureTransformerPrior.Config(dim=3, grid=model.grid, num_classes=3, **SMALL)
    config.build().save_pretrained(folder / "prior")
    return folder


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """`vqvae sample` in this process and in an empty folder; its output, or its one line of error, comes back."""
    monkeypatch.chdir(tmp_path)

    def run_command(*args, code=0):
        monkeypatch.setattr(sys, "argv", ["vqvae", "sample", *map(str, args)])
        if not code:
            with nullcontext() if code == 0 else pytest.raises(SystemExit):
                cli.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == code
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        return lines[0]

    return run_command


@pytest.fixture
def seen(monkeypatch):
    """What `Prior.samples` was asked for."""
    asked, real = [], Prior.samples

    def samples(self, num, labels, sampling, generator, **options):
        labelled = {"labels": None if labels is None else labels.tolist()}
        asked.append({"num": num, **labelled, "sampling": sampling, "generator": generator, **options})
        return real(self, num, labels, sampling, generator, **options)

    monkeypatch.setattr(Prior, "samples", samples)
    return asked


@pytest.fixture
def decoded(monkeypatch):
    """The codes that were decoded, block by block."""
    blocks, real = [], VQVAE.decode

    def note(self, latents, **options):
        blocks.append(latents)
        return real(self, latents, **options)

    monkeypatch.setattr(VQVAE, "decode", note)
    return blocks


@pytest.fixture
def picture(tmp_path):
    """A colour image twice the model's size."""
    pixels = np.random.default_rng(1).integers(0, 256, (2 * SIZE, 2 * SIZE, 3), np.uint8)
    return save(tmp_path / "in" / "picture.png", pixels)


def save_mask(tmp_path, *box, size=(SIZE, SIZE), name="mask.png"):
    """White from top, to bottom, from left, to right."""
    pixels = np.zeros(size, np.uint8)
    top, bottom, left, right = box
    pixels[top:bottom, left:right] = 255
    return save(tmp_path / "in" / name, pixels)


def pixels_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.array(image)


def size_of(path):
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ((), [0, 1, 2, 0, 1]),
        (("--label", 2), [2] * 5),
        (("--label", 2, 0), [2, 0, 2, 0, 2]),
    ],
)
def test_classes_in_turn(call, run, seen, options, labels):
    call(run, "--num", 5, *options)
    assert seen[0]["labels"] == labels


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (("--num", 12), 9),  # three classes in turn: each has columns of its own
        (("--num", 12, "--label", 1), 8),
        (("--num", 12, "--label", 1, 2), 10),
        (("--num", 12, "--columns", 5), 5),
        (("--num", 3), 3),
    ],
)
def test_columns(call, run, tmp_path, options, columns):
    call(run, *options)
    width, height = size_of(tmp_path / "samples.png")
    assert width == columns * (64 + 2) + 2
    assert height == -(-int(options[1]) // columns) * (64 + 2) + 2


def test_options_reach_the_prior(call, run, seen):
    options = ("--temperature", 0.9, "--top-k", 5, "--top-p", 0.8, "--min-p", 0.1, "--guidance", 2)
    call(run, "--num", 3, *options, "--guidance-power", 2, "--precision", "float32", "--batch-size", 2)
    asked = seen[0]
    assert asked["generator"].initial_seed() == 0
    filters = {"temperature": 0.9, "top_k": 5, "top_p": 0.8, "min_p": 0.1}
    guidance = tuple(guidance_ramp(2.0, 16, 2.0))
    assert asked["sampling"] == Sampling(**filters, guidance=guidance, precision="float32", batch_size=2)
    assert (asked["seeds"], asked["progress"]) == (None, True)


def test_every_option_of_sampling_is_a_flag(call, run, seen):
    """What `Sampling` says of a field is the help of its flag, and what it holds by default is the default."""
    call(run, "--num", 1)
    assert seen[0]["sampling"] == Sampling()
    assert {each.name for each in fields(SamplingFlags)} == {each.name for each in fields(Sampling)} | {
        "guidance_power"
    }
    text = " ".join(call("--help", code=None).replace("│", " ").split())
    for name, said in (
        ("top-k", "sample among the k likeliest codes only"),
        ("guidance", "strength of the label"),
    ):
        assert re.search(rf"--{name} \S+ {said}", text)


def test_compiled_reaches_the_prior(call, run, monkeypatch):
    asked = {}

    def samples(self, num, labels, sampling, *_, **__):
        asked["compiled"] = sampling.compiled
        yield torch.zeros(num, *self.grid, dtype=torch.int64)

    monkeypatch.setattr(Prior, "samples", samples)
    call(run, "--num", 1, "--compiled")
    assert asked["compiled"] is True


def test_what_cannot_be_compiled_is_one_line(call, run, monkeypatch):
    def samples(self, *_, **__):
        raise RuntimeError("InvalidCxxCompiler: no compiler\n\nSet TORCHDYNAMO_VERBOSE=1")
        yield

    monkeypatch.setattr(Prior, "samples", samples)
    assert call(run, "--compiled", code=2).endswith("leave it out: InvalidCxxCompiler: no compiler")


def test_each_filter_changes_the_draws(call, run, tmp_path):
    drawn = []
    for options in ((), ("--top-k", 1), ("--min-p", 0.9), ("--guidance", 3), ("--guidance", 3, "--guidance-power", 1)):
        call(run, "--num", 8, "--label", 1, *options)
        drawn.append((tmp_path / "samples.png").read_bytes())
    # Only the likeliest code, or those nearly as likely: with so peaked a prior often the same.
    for one, other in itertools.combinations((0, 1, 3, 4), 2):
        assert drawn[one] != drawn[other]
    assert drawn[0] != drawn[2]


def test_several_codes_a_step(call, anywhere, seen, tmp_path):
    call(anywhere, "--num", 2, "--num-steps", 3)
    assert seen[0]["sampling"] == Sampling(num_steps=3)
    assert (tmp_path / "samples.png").exists()


def test_a_folder_of_files_is_the_grid(call, run, tmp_path):
    """The same draws; the files hold the pixels themselves."""
    call(run, "--num", 5, "--seed", 3, "--columns", 5)
    assert "folder: 5 images" in call(run, "--num", 5, "--seed", 3, "-o", "folder/")
    assert sorted(os.listdir(tmp_path / "folder")) == [f"{i:06}.png" for i in range(5)]
    grid = pixels_of(tmp_path / "samples.png")[2:66:4, :, 0]
    for i in range(5):
        image = pixels_of(tmp_path / "folder" / f"{i:06}.png")
        assert image.shape == (SIZE, SIZE)
        assert (image == grid[:, 2 + 66 * i : 66 * (i + 1) : 4]).all()


def test_files_are_written_as_soon_as_they_are_drawn(call, run, tmp_path, monkeypatch):
    """Before the next block begins, the files of the last are there; and no more than a block is ever held."""
    real, found = VQVAE.decode, []

    def decode_and_look(self, latents, **options):
        found.append((len(latents), len(os.listdir("folder")) if os.path.isdir("folder") else 0))
        return real(self, latents, **options)

    monkeypatch.setattr(VQVAE, "decode", decode_and_look)
    call(run, "--num", 7, "--batch-size", 3, "--output", "folder")
    assert found == [(3, 0), (3, 3), (1, 6)]


def test_what_was_drawn_before_an_end_stays(call, run, tmp_path, monkeypatch):
    real, calls = VQVAE.decode, []

    def stop(self, latents, **options):
        calls.append(len(latents))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, latents, **options)

    monkeypatch.setattr(VQVAE, "decode", stop)
    call(run, "--num", 9, "--batch-size", 2, "--output", "folder", code=130)
    assert sorted(os.listdir(tmp_path / "folder")) == [f"{i:06}.png" for i in range(4)]


@pytest.mark.parametrize("options", [(), ("--pixels",), ("--label", "1", "2"), ("--guidance", "2")], ids=str)
def test_a_seed_alone_gives_the_image_that_it_gives_among_others(call, run, tmp_path, options):
    seeds = [*range(3, 20), 1000]  # more than are drawn at once
    call(run, "--seeds", *seeds, *options, "--output", "all")
    assert sorted(os.listdir(tmp_path / "all")) == sorted(f"seed-{seed}.png" for seed in seeds)
    for part in ((19,), (1000, 4)):
        call(run, "--seeds", *part, *options, "--output", f"part-{part[0]}")
        for seed in part:
            alone = (tmp_path / f"part-{part[0]}" / f"seed-{seed}.png").read_bytes()
            assert alone == (tmp_path / "all" / f"seed-{seed}.png").read_bytes()
    assert len({path.read_bytes() for path in (tmp_path / "all").iterdir()}) > 10


def test_a_seed_has_its_turn_of_the_classes(call, run, seen):
    call(run, "--seeds", 3, 5, 9)
    call(run, "--seeds", 3, 5, 9, "--label", 2, 0)
    assert [asked["labels"] for asked in seen] == [[0, 2, 0], [0, 0, 0]]


def test_seeds_make_a_grid_too(call, run, tmp_path):
    assert "samples.png: 3 images" in call(run, "--seeds", 3, 5, 9, "--num", 3)
    assert size_of(tmp_path / "samples.png")[0] == 3 * 66 + 2


def test_a_gaussian_run_in_folders_and_batches(call, gaussian, tmp_path):
    call(gaussian, "--num", 5, "--batch-size", 2, "--label", 0, 2, "--output", "folder")
    assert len(os.listdir(tmp_path / "folder")) == 5


def test_a_part_of_an_image_is_drawn_anew(call, anywhere, picture, tmp_path, seen, decoded):
    """Codes outside the mask are those of the image; inside they differ from draw to draw. So do pixels."""
    mask = save_mask(
        tmp_path, 5, 7, 4, 13
    )  # positions (1, 1), (1, 2), (1, 3): two whole in width, of the last a column
    call(anywhere, "--inpaint", picture, "--mask", mask, "--num", 12, "--temperature", 2, "-o", "folder")
    assert seen[0]["labels"] is None
    model = VQVAE.from_pretrained(anywhere / "codebook")
    image = decode(picture, (SIZE, SIZE), 1)
    codes, drawn = model.encode(image[None]), torch.cat(decoded)
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[1, 1:] = True
    assert (drawn[:, ~inside] == codes[:, ~inside]).all()
    assert (drawn[:, inside] != codes[:, inside]).any(0).all()
    assert len(drawn[:, inside].unique(dim=0)) > 3
    pictures = np.stack([pixels_of(tmp_path / "folder" / f"{i:06}.png") for i in range(12)])
    masked = pixels_of(mask) > 0
    assert (pictures[:, ~masked] == image[0].numpy()[~masked]).all()
    whole = model.decode(drawn)[:, 0].numpy()
    assert (pictures[:, masked] == whole[:, masked]).all()
    assert (pictures != whole).any()


def test_pixels_outside_may_be_decoded_too(call, anywhere, picture, tmp_path, decoded):
    mask = save_mask(tmp_path, 4, 8, 4, 8)
    call(anywhere, "--inpaint", picture, "--mask", mask, "--num", 2, "--no-keep-pixels", "--output", "folder")
    whole = VQVAE.from_pretrained(anywhere / "codebook").decode(torch.cat(decoded))
    for i in range(2):
        assert (pixels_of(tmp_path / "folder" / f"{i:06}.png") == whole[i, 0].numpy()).all()


def test_the_grid_starts_with_the_image_grey_where_masked(call, anywhere, picture, tmp_path):
    mask = save_mask(tmp_path, 4, 9, 0, 3)
    assert "samples.png: 2 images" in call(anywhere, "--inpaint", picture, "--mask", mask, "--num", 2)
    grid = pixels_of(tmp_path / "samples.png")
    assert grid.shape == (68, 3 * 66 + 2, 3)
    expected = decode(picture, (SIZE, SIZE), 1)[0].numpy().copy()
    expected[4:9, :3] = 128
    assert (grid[2:66:4, 2:66:4, 0] == expected).all()


def test_labels_seeds_and_guidance_of_inpainting(call, anywhere, picture, tmp_path, seen):
    mask = save_mask(tmp_path, 4, 9, 0, 3)
    around = ("--inpaint", picture, "--mask", mask, "--label", 2, "--guidance", 2, "--num-steps", 1)
    call(anywhere, *around, "--seeds", 7, 8, "--output", "both")
    call(anywhere, *around, "--seeds", 8, "--output", "one")
    assert seen[0]["labels"] == [2, 2]
    assert (tmp_path / "one" / "seed-8.png").read_bytes() == (tmp_path / "both" / "seed-8.png").read_bytes()


def test_everything_may_be_drawn_anew(call, anywhere, picture, tmp_path, decoded):
    mask = save_mask(tmp_path, 0, SIZE, 0, SIZE)
    call(anywhere, "--inpaint", picture, "--mask", mask, "--num", 1)
    assert decoded[0].shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("size", "box", "positions"),
    [
        ((SIZE, SIZE), (15, 16, 15, 16), [(3, 3)]),
        ((160, 160), (79, 81, 0, 1), [(1, 0), (2, 0)]),  # a line of a hundredth: nothing is averaged away
        ((4, 4), (0, 1, 2, 3), [(0, 2)]),  # smaller than the image
        ((SIZE, 3 * SIZE), (0, 1, SIZE, SIZE + 1), [(0, 0)]),  # the middle of a wide one counts
    ],
)
def test_masks_of_any_size(call, anywhere, picture, tmp_path, seen, size, box, positions):
    call(anywhere, "--inpaint", picture, "--mask", save_mask(tmp_path, *box, size=size), "--num", 1)
    assert seen[0]["mask"].nonzero().tolist() == [list(position) for position in positions]


def test_a_mask_of_the_images_shape_lies_over_it(call, anywhere, tmp_path):
    """A mark in a wide image, and the mask over the mark, end at the same pixels."""
    marked = np.zeros((2 * SIZE, 3 * SIZE), np.uint8)
    marked[8:16, 16:24] = 255
    image = save(tmp_path / "in" / "image.png", marked)
    call(anywhere, "--inpaint", image, "--mask", image, "--num", 1)
    first = pixels_of(tmp_path / "samples.png")[2:66:4, 2:66:4, 0]
    masked = np.zeros((SIZE, SIZE), bool)
    masked[4:8, 4:8] = True
    assert (first[masked] == 128).all()
    assert (first[~masked] < 64).all()


def test_a_prior_in_raster_order_draws_the_end(call, run, picture, tmp_path, decoded):
    mask = save_mask(tmp_path, 9, SIZE, 0, SIZE)
    call(run, "--inpaint", picture, "--mask", mask, "--num", 3)
    codes = VQVAE.from_pretrained(run / "codebook").encode(decode(picture, (SIZE, SIZE), 1)[None])
    assert (torch.cat(decoded)[:, :2] == codes[:, :2]).all()
    save_mask(tmp_path, 4, 8, 4, 8)
    message = call(run, "--inpaint", picture, "--mask", mask, code=2)
    assert "TransformerPrior looks only at codes before" in message
    assert "vqvae train --stage prior --prior-kind AnyOrder" in message


def test_all_codes_of_a_position_go_together(call, tmp_path, picture, seen):
    deep = ResidualQuantizer.Config(depth=2, quantizer=FSQ.Config(levels=(3, 3)))
    folder = save_run(tmp_path / "deep", quantizer=deep, kind=AnyOrderPrior)
    call(folder, "--inpaint", picture, "--mask", save_mask(tmp_path, 0, 1, 4, 5), "--num", 1)
    assert seen[0]["mask"].nonzero().tolist() == [[0, 1, 0], [0, 1, 1]]


def test_a_prior_in_the_loop_encodes(call, anywhere, tmp_path, picture, decoded):
    """Codes come from the run's own prior, whichever draws."""
    folder = tmp_path / "loop"
    shutil.copytree(anywhere, folder)
    config = json.loads((folder / "codebook" / "config.json").read_text())
    (folder / "codebook" / "config.json").write_text(json.dumps({**config, "beta": 50.0}))
    model, own = VQVAE.from_pretrained(folder / "codebook"), Prior.from_pretrained(folder / "prior").eval()
    image = decode(picture, (SIZE, SIZE), 1)[None]
    codes = model.through(own).encode(image)
    assert (codes != model.encode(image)).any()
    UnigramPrior(num_codes=8, grid=(4, 4)).save_pretrained(tmp_path / "other")
    mask = save_mask(tmp_path, 12, SIZE, 0, SIZE)
    for options in ((), ("--prior", tmp_path / "other")):
        decoded.clear()
        call(folder, *options, "--inpaint", picture, "--mask", mask, "--num", 1)
        assert (decoded[0][:, :3] == codes[:, :3]).all()


def test_codes_over_several_scales_are_refused(call, tmp_path, picture):
    scales = MultiScaleQuantizer.Config(scales=(1, 2, 4), quantizer=CODES)
    folder = save_run(tmp_path / "scales", quantizer=scales)
    mask = save_mask(tmp_path, 0, 4, 0, 4)
    assert "row of 21 over several scales" in call(folder, "--inpaint", picture, "--mask", mask, code=2)


def test_mistakes_are_one_line(call, run, anywhere, gaussian, picture, tmp_path):
    black, mask = save_mask(tmp_path, 0, 0, 0, 0, name="black.png"), save_mask(tmp_path, 0, 4, 0, 4)
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000001.png").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    around = ("--inpaint", picture, "--mask", mask)
    for args, message in (
        ((run, "--num", 0), "--num must be at least 1"),
        ((run, "--label", 3), "--label must lie in [0, 3), got 3"),
        ((run, "--label", 0, 7), "--label must lie in [0, 3), got 7"),
        ((run, "--min-p", 1.5), "got min_p=1.5, expected 0 <= min_p <= 1"),
        ((run, "--top-k", 0), "got top_k=0"),
        ((run, "--guidance", "-1"), "guidance=-1"),
        ((run, "--guidance-power", 1), "give its strength with --guidance"),
        ((run, "--guidance", 2, "--guidance-power", "-1"), "got power=-1"),
        ((run, "--seed", "-1"), "--seed must lie in [0, 2^32), got -1"),
        ((run, "--seeds", 1, 2**32), "--seeds must lie in"),
        ((run, "--seeds", 1, 2, "--num", 3), "got 2 --seeds for --num 3"),
        ((run, "--seeds", 1, 1), "each once"),
        ((run, "--seeds", 1, "--seed", 1), "so --seed has no say"),
        ((run, "--seeds", 1, "--batch-size", 1), "so --batch-size has no say"),
        ((run, "--batch-size", 0), "got batch_size=0, expected an integer >= 1"),
        ((run, "--columns", 0), "--columns must be at least 1"),
        ((run, "--columns", 3, "--output", "folder"), "--columns is for a grid"),
        ((run, "--num-steps", 3), "prior-kind AnyOrder"),
        ((anywhere, "--num-steps", 17), "expected an integer from 1 to 16"),
        ((run, "--num", 10**6), "images are too many for one picture"),
        ((run, "--output", "photo.jpg"), "would be no PNG"),
        ((run, "--output", "file"), "file is no folder"),
        ((run, "--output", "full"), "000001.png is there already"),
        ((run, "--mask", mask), "give both or neither"),
        ((run, "--inpaint", picture), "give both or neither"),
        ((run, "--no-keep-pixels"), "--no-keep-pixels belongs to --inpaint"),
        (
            (anywhere, "--inpaint", "nowhere.png", "--mask", mask),
            "no file at nowhere.png; name an image with --inpaint",
        ),
        ((anywhere, "--inpaint", picture, "--mask", tmp_path), "name an image with --mask"),
        ((anywhere, "--inpaint", tmp_path / "in" / "broken.png", "--mask", mask), "broken.png: "),
        ((anywhere, "--inpaint", picture, "--mask", tmp_path / "in" / "broken.png"), "--mask"),
        ((anywhere, "--inpaint", picture, "--mask", black), "nothing to sample"),
        ((anywhere, *around, "--label", 3), "--label must lie in"),
        ((anywhere, *around, "--guidance", 2), "add --label"),
        ((gaussian, *around), "--inpaint cannot be had of a prior over real vectors"),
        ((gaussian, "--seeds", 3, "--min-p", 0.1), "--min-p and --seeds cannot be had"),
        ((gaussian, "--precision", "int8", "--compiled"), "--precision and --compiled cannot be had"),
    ):
        assert message in call(*args, code=2)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "full" / "000001.png").read_text() == "mine"


def test_an_existing_folder_named_like_a_picture_is_a_folder(call, run, tmp_path):
    """A file must never take the place of a folder."""
    (tmp_path / "x.png").mkdir()
    (tmp_path / "x.png" / "mine.txt").write_text("mine")
    call(run, "--num", 1, "--output", "x.png")
    assert sorted(os.listdir(tmp_path / "x.png")) == ["000000.png", "mine.txt"]
