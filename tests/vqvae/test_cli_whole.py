"""`vqvae reconstruct --size keep`: photographs as large as they are."""

import numpy as np
import pytest
import torch
from cli_worlds import in_empty_folder, save_run
from image_files import noise, save
from PIL import Image
from test_cli_images import photos, run  # noqa: F401

from vqvae import VQVAE
from vqvae.quantizers import MultiScaleQuantizer, VectorQuantizer

call = pytest.fixture(in_empty_folder)


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path).convert("L")))[None, None]


def test_a_photograph_comes_back_as_large_as_it_is(call, run, tmp_path):  # noqa: F811
    photo = save(tmp_path / "holiday.png", noise(601, 77))
    said = call("reconstruct", run, "--data", photo, "--size", "keep", "-o", "again.png")
    assert said.out.startswith(f"again.png: {photo}, 77x601, PSNR ")
    model = VQVAE.from_pretrained(run)
    with Image.open("again.png") as again:
        assert again.size == (77, 601)
        assert torch.equal(torch.from_numpy(np.array(again)), model.reconstruct(pixels(photo), pad=True)[0, 0])


def test_images_of_a_set_come_into_a_folder(call, run, photos, tmp_path):  # noqa: F811
    said = call("reconstruct", run, "--data", photos, "--split", "all", "--size", "keep", "--num", 3, "-o", "out")
    assert said.out.count("20x16, PSNR") == 3
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert [name[:6] for name in names] == ["000000", "000001", "000002"]
    with Image.open(tmp_path / "out" / names[0]) as image:
        assert image.size == (20, 16)
    two = [save(tmp_path / f"{number}.png", noise(9, 30 + number)) for number in range(2)]
    call("reconstruct", run, "--data", *two, "--size", "keep", "-o", "pair")
    assert sorted(path.name for path in (tmp_path / "pair").iterdir()) == ["000000-0.png", "000001-1.png"]
    call("reconstruct", run, "--data", *two, "--size", "keep", "--num", 1, "-o", "one.png")


def test_what_cannot_be_is_one_line(call, run, photos, tmp_path):  # noqa: F811
    photo = save(tmp_path / "holiday.png", noise(9, 30))
    (tmp_path / "broken.png").write_bytes(b"no image")
    for words, message in (
        (("--data", photo, photo, "-o", "a.png"), "got a.png for several images; name a folder with --output"),
        (("--data", "none.png", "-o", "a.png"), "none.png is no known source"),
        (("--data", photo, "none.png", "-o", "a"), "no file at none.png"),
        (("--data", tmp_path / "broken.png", "-o", "a.png"), "broken.png: not an image"),
        (("--data", photo, tmp_path / "broken.png", "-o", "a"), "broken.png: not an image"),
    ):
        assert message in call.refused("reconstruct", run, "--size", "keep", *words)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "a.png").exists()
    quantizer = MultiScaleQuantizer.Config(quantizer=VectorQuantizer.Config(num_codes=8, dim=4), scales=(1, 4))
    VQVAE(image_size=16, width=8, num_blocks=1, quantizer=quantizer).save_pretrained(tmp_path / "scales")
    said = call.refused("reconstruct", tmp_path / "scales", "--data", photo, "--size", "keep", "-o", "a.png")
    assert "codes of several scales" in said


def test_a_model_with_a_prior_in_its_loop_is_for_its_own_size(call, tmp_path):
    model = VQVAE.from_pretrained(save_run(tmp_path / "run"))
    looped = VQVAE(**{**vars(model.config), "beta": 1.0})
    looped.save_pretrained(tmp_path / "looped")
    photo = save(tmp_path / "holiday.png", noise(9, 30))
    said = call.refused("reconstruct", tmp_path / "looped", "--data", photo, "--size", "keep", "-o", "a.png")
    assert "are chosen through a prior, which is for images of its own size" in said
