"""`vqvae sample`: classes, seeds, guidance, grids and folders, and parts of images drawn anew."""

import json
import os
import re
import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch
from cli_worlds import CODES, SIZE, in_empty_folder, save_run
from image_files import save
from PIL import Image

from priors import AnyOrderPrior, Prior, Sampling, UnigramPrior
from priors.sampling import guidance_ramp
from vqvae import VQVAE
from vqvae.cli.sampling import SamplingFlags
from vqvae.data.decoding import decode
from vqvae.quantizers import FSQ, MultiScaleQuantizer, ResidualQuantizer

call = pytest.fixture(in_empty_folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """4 x 4 codes in raster order, three classes."""
    return save_run(tmp_path_factory.mktemp("runs") / "raster")


@pytest.fixture(scope="module")
def anywhere(run):
    """The same in any order."""
    return save_run(run.parent / "anywhere", kind=AnyOrderPrior)


@pytest.fixture
def seen(monkeypatch):
    """What `Prior.samples` was asked for: labels, options, and what to sample around."""
    asked, real = [], Prior.samples

    def samples(self, num, labels, sampling, generator, *, mask=None, **options):
        asked.append((None if labels is None else labels.tolist(), sampling, mask))
        return real(self, num, labels, sampling, generator, mask=mask, **options)

    monkeypatch.setattr(Prior, "samples", samples)
    return asked


@pytest.fixture
def decoded(monkeypatch):
    """The codes that were decoded, block by block."""
    blocks, real = [], VQVAE.decode
    monkeypatch.setattr(VQVAE, "decode", lambda self, codes, **options: blocks.append(codes) or real(self, codes))
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


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        (("--num", 5), [0, 1, 2, 0, 1]),
        (("--num", 5, "--label", 2), [2] * 5),
        (("--num", 5, "--label", 2, 0), [2, 0, 2, 0, 2]),
        (("--seeds", 3, 5, 9), [0, 2, 0]),
        (("--seeds", 3, 5, 9, "--label", 2, 0), [0, 0, 0]),
    ],
)
def test_classes_in_turn(call, run, seen, options, labels):
    call("sample", run, *options)
    assert seen[0][0] == labels


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        (("--num", 12), 9),  # three classes in turn: each has columns of its own
        (("--num", 12, "--label", 1), 8),
        (("--num", 12, "--label", 1, 2), 10),
        (("--num", 12, "--columns", 5), 5),
        (("--num", 3, "--seeds", 3, 5, 9), 3),
    ],
)
def test_columns(call, run, tmp_path, options, columns):
    assert f"samples.png: {options[1]} images" in call("sample", run, *options).out
    height, width, _ = pixels_of(tmp_path / "samples.png").shape
    assert (width, height) == (columns * 66 + 2, -(-options[1] // columns) * 66 + 2)


def test_options_reach_the_prior(call, run, monkeypatch):
    asked = []

    def samples(self, num, labels, sampling, generator, **options):
        asked.append((sampling, generator.initial_seed(), options["seeds"]))
        yield torch.zeros(num, *self.grid, dtype=torch.int64)

    monkeypatch.setattr(Prior, "samples", samples)
    call("sample", run, "--num", 1)
    options = ("--temperature", 0.9, "--top-k", 5, "--top-p", 0.8, "--min-p", 0.1, "--guidance", 2)
    options += ("--guidance-power", 2, "--precision", "float32", "--batch-size", 2, "--compiled", "--seed", 7)
    call("sample", run, "--num", 3, *options)
    filters = {"temperature": 0.9, "top_k": 5, "top_p": 0.8, "min_p": 0.1}
    more = {"guidance": tuple(guidance_ramp(2.0, 16, 2.0)), "precision": "float32", "batch_size": 2, "compiled": True}
    assert asked == [(Sampling(), 0, None), (Sampling(**filters, **more), 7, None)]


def test_every_option_of_sampling_is_a_flag(call):
    """What `Sampling` says of a field is the help of its flag."""
    flags = {each.name for each in fields(SamplingFlags)}
    assert flags == {each.name for each in fields(Sampling)} | {"guidance_power"}
    text = " ".join(call("sample", "--help").out.replace("│", " ").split())
    for name, said in (("top-k", "sample among the k likeliest codes only"), ("guidance", "strength of the label")):
        assert re.search(rf"--{name} \S+ {said}", text)


def test_what_cannot_be_compiled_is_one_line(call, run, monkeypatch):
    def samples(self, *_, **__):
        raise RuntimeError("InvalidCxxCompiler: no compiler\n\nSet TORCHDYNAMO_VERBOSE=1")
        yield

    monkeypatch.setattr(Prior, "samples", samples)
    assert call.refused("sample", run, "--compiled").endswith("leave it out: InvalidCxxCompiler: no compiler")


def test_a_folder_of_files_is_the_grid(call, run, tmp_path):
    """The same draws; the files hold the pixels themselves. The same seed draws the same, another does not."""
    call("sample", run, "--num", 5, "--seed", 3, "--columns", 5)
    assert "folder: 5 images" in call("sample", run, "--num", 5, "--seed", 3, "-o", "folder/").out
    assert sorted(os.listdir(tmp_path / "folder")) == [f"{i:06}.png" for i in range(5)]
    whole = pixels_of(tmp_path / "samples.png")
    for i in range(5):
        image = pixels_of(tmp_path / "folder" / f"{i:06}.png")
        assert image.shape == (SIZE, SIZE)
        assert (image == whole[2:66:4, 2 + 66 * i : 66 * (i + 1) : 4, 0]).all()
    call("sample", run, "--num", 5, "--seed", 4, "--columns", 5)
    assert (pixels_of(tmp_path / "samples.png") != whole).any()


def test_files_are_written_as_soon_as_they_are_drawn(call, run, tmp_path, monkeypatch):
    """Before the next block begins, the files of the last are there, and they stay whatever comes."""
    real, found = VQVAE.decode, []

    def decode_and_look(self, latents, **options):
        found.append((len(latents), len(os.listdir("folder")) if os.path.isdir("folder") else 0))
        if len(found) == 3:
            raise KeyboardInterrupt
        return real(self, latents, **options)

    monkeypatch.setattr(VQVAE, "decode", decode_and_look)
    call("sample", run, "--num", 7, "--batch-size", 3, "--output", "folder", code=130)
    assert found == [(3, 0), (3, 3), (1, 6)]
    assert sorted(os.listdir(tmp_path / "folder")) == [f"{i:06}.png" for i in range(6)]


@pytest.mark.parametrize("options", [("--pixels",), ("--label", "1", "2", "--guidance", "2")], ids=str)
def test_a_seed_alone_gives_the_image_that_it_gives_among_others(call, run, tmp_path, options):
    seeds = [*range(3, 20), 1000]  # more than are drawn at once
    call("sample", run, "--seeds", *seeds, *options, "--output", "all")
    together = {path.name: path.read_bytes() for path in (tmp_path / "all").iterdir()}
    assert together.keys() == {f"seed-{seed}.png" for seed in seeds}
    for part in ((19,), (1000, 4)):
        call("sample", run, "--seeds", *part, *options, "--output", f"part-{part[0]}")
        for path in (tmp_path / f"part-{part[0]}").iterdir():
            assert path.read_bytes() == together[path.name]
    assert len(set(together.values())) > 10


def inpaint(run, image, mask, *options):
    """The words of a command."""
    return ("sample", run, "--inpaint", image, "--mask", mask, *options)


def test_a_part_of_an_image_is_drawn_anew(call, anywhere, picture, tmp_path, seen, decoded):
    """Codes outside the mask are those of the image; inside they differ from draw to draw. So do pixels."""
    # Positions (1, 1), (1, 2), (1, 3): two whole in width, of the last a column.
    mask = save_mask(tmp_path, 5, 7, 4, 13)
    call(*inpaint(anywhere, picture, mask, "--num", 12, "--temperature", 2, "-o", "folder"))
    assert seen[0][0] is None
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
    # Pixels outside may be decoded too.
    decoded.clear()
    call(*inpaint(anywhere, picture, mask, "--num", 1, "--no-keep-pixels", "-o", "decoded"))
    assert (pixels_of(tmp_path / "decoded" / "000000.png") == model.decode(decoded[0])[0, 0].numpy()).all()


def test_labels_seeds_and_guidance_of_inpainting(call, anywhere, picture, tmp_path, seen):
    mask = save_mask(tmp_path, 4, 9, 0, 3)
    around = inpaint(anywhere, picture, mask, "--label", 2, "--guidance", 2, "--num-steps", 1)
    call(*around, "--seeds", 7, 8, "--output", "both")
    call(*around, "--seeds", 8, "--output", "one")
    labels, sampling, _ = seen[0]
    assert (labels, sampling.num_steps) == ([2, 2], 1)
    assert (tmp_path / "one" / "seed-8.png").read_bytes() == (tmp_path / "both" / "seed-8.png").read_bytes()


@pytest.mark.parametrize(
    ("size", "box", "positions"),
    [
        ((SIZE, SIZE), (15, 16, 15, 16), [[3, 3]]),
        ((SIZE, SIZE), (0, SIZE, 0, SIZE), [[i, j] for i in range(4) for j in range(4)]),
        ((160, 160), (79, 81, 0, 1), [[1, 0], [2, 0]]),  # a line of a hundredth: nothing is averaged away
        ((4, 4), (0, 1, 2, 3), [[0, 2]]),  # smaller than the image
        ((SIZE, 3 * SIZE), (0, 1, SIZE, SIZE + 1), [[0, 0]]),  # the middle of a wide one counts
    ],
)
def test_masks_of_any_size(call, anywhere, picture, tmp_path, seen, size, box, positions):
    call(*inpaint(anywhere, picture, save_mask(tmp_path, *box, size=size), "--num", 1))
    assert seen[0][2].nonzero().tolist() == positions


def test_the_grid_starts_with_the_image_grey_where_masked(call, anywhere, tmp_path):
    """A mark in a wide image, and the mask over the mark, which has the image's shape, end at the same pixels."""
    image = save_mask(tmp_path, 8, 16, 16, 24, size=(2 * SIZE, 3 * SIZE))
    assert "samples.png: 2 images" in call(*inpaint(anywhere, image, image, "--num", 2)).out
    grid = pixels_of(tmp_path / "samples.png")
    assert grid.shape == (68, 3 * 66 + 2, 3)
    expected = decode(image, (SIZE, SIZE), 1)[0].numpy().copy()
    assert (expected[4:8, 4:8] > 200).all()
    expected[4:8, 4:8] = 128
    assert (grid[2:66:4, 2:66:4, 0] == expected).all()


def test_a_prior_in_raster_order_draws_the_end(call, run, picture, tmp_path, decoded):
    call(*inpaint(run, picture, save_mask(tmp_path, 9, SIZE, 0, SIZE), "--num", 3))
    codes = VQVAE.from_pretrained(run / "codebook").encode(decode(picture, (SIZE, SIZE), 1)[None])
    assert (torch.cat(decoded)[:, :2] == codes[:, :2]).all()
    message = call.refused(*inpaint(run, picture, save_mask(tmp_path, 4, 8, 4, 8)))
    assert "TransformerPrior looks only at codes before" in message
    assert "--prior-kind AnyOrder" in message


def test_all_codes_of_a_position_go_together(call, tmp_path, picture, seen):
    deep = ResidualQuantizer.Config(depth=2, quantizer=FSQ.Config(levels=(3, 3)))
    folder = save_run(tmp_path / "deep", quantizer=deep, kind=AnyOrderPrior)
    call(*inpaint(folder, picture, save_mask(tmp_path, 0, 1, 4, 5), "--num", 1))
    assert seen[0][2].nonzero().tolist() == [[0, 1, 0], [0, 1, 1]]


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
        call(*inpaint(folder, picture, mask, "--num", 1, *options))
        assert (decoded[0][:, :3] == codes[:, :3]).all()


def test_mistakes_are_one_line(call, run, anywhere, picture, tmp_path):
    scales = save_run(tmp_path / "in" / "scales", MultiScaleQuantizer.Config(scales=(1, 2, 4), quantizer=CODES))
    black, mask = save_mask(tmp_path, 0, 0, 0, 0, name="black.png"), save_mask(tmp_path, 0, 4, 0, 4)
    broken = tmp_path / "in" / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000001.png").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    for args, message in (
        ((run, "--label", 0, 7), "--label must lie in [0, 3), got 7"),
        ((run, "--min-p", 1.5), "min_p=1.5"),
        ((run, "--guidance-power", 1), "give its strength with --guidance"),
        ((run, "--guidance", 2, "--guidance-power", "-1"), "power=-1"),
        ((run, "--seed", "-1"), "--seed must lie in [0, 2^32), got -1"),
        ((run, "--seeds", 1, 2**32), "--seeds must lie in"),
        ((run, "--seeds", 1, 2, "--num", 3), "got 2 --seeds for --num 3"),
        ((run, "--seeds", 1, 1), "each once"),
        ((run, "--seeds", 1, "--seed", 1), "so --seed has no say"),
        ((run, "--seeds", 1, "--batch-size", 1), "so --batch-size has no say"),
        ((run, "--columns", 0), "--columns must be at least 1"),
        ((run, "--columns", 3, "--output", "folder"), "--columns is for a grid"),
        ((run, "--num-steps", 3), "prior-kind AnyOrder"),
        ((anywhere, "--num-steps", 17), "expected an integer from 1 to 16"),
        ((run, "--num", 10**6), "images are too many for one picture"),
        ((run, "--output", "photo.jpg"), "would be no PNG"),
        ((run, "--output", "file"), "file is no folder"),
        ((run, "--output", "full"), "000001.png is there already"),
        ((run, "--mask", mask), "give both or neither"),
        ((run, "--no-keep-pixels"), "--no-keep-pixels belongs to --inpaint"),
        (inpaint(anywhere, "nowhere.png", mask)[1:], "no file at nowhere.png; name an image with --inpaint"),
        (inpaint(anywhere, picture, tmp_path)[1:], "name an image with --mask"),
        (inpaint(anywhere, broken, mask)[1:], "broken.png: "),
        (inpaint(anywhere, picture, broken)[1:], "--mask"),
        (inpaint(anywhere, picture, black)[1:], "nothing to sample"),
        (inpaint(anywhere, picture, mask, "--label", 3)[1:], "--label must lie in"),
        (inpaint(anywhere, picture, mask, "--guidance", 2)[1:], "add --label"),
        (inpaint(scales, picture, mask)[1:], "row of 21 over several scales"),
    ):
        assert message in call.refused("sample", *args)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "full" / "000001.png").read_text() == "mine"


def test_an_existing_folder_named_like_a_picture_is_a_folder(call, run, tmp_path):
    """A file must never take the place of a folder."""
    (tmp_path / "x.png").mkdir()
    (tmp_path / "x.png" / "mine.txt").write_text("mine")
    call("sample", run, "--num", 1, "--output", "x.png")
    assert sorted(os.listdir(tmp_path / "x.png")) == ["000000.png", "mine.txt"]
