"""Pictures at each validation: of the same things, in step with the run, and without a say in it."""

import struct
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from run_files import gaussian, stopped, weights, without
from tensorboardX.proto import event_pb2
from torch import nn

from priors import Prior
from vqvae.training import previews
from vqvae.training.previews import LONG_SECONDS, Preview


def names(folder: Path) -> dict[str, list[str]]:
    return {each: sorted(path.name for path in (folder / each).iterdir()) for each in ("reconstructions", "samples")}


def shown(folder: Path, stage: str) -> list[tuple[int, bytes]]:
    """Step and PNG of each picture in a stage's TensorBoard files, in the order of their steps."""
    found = []
    for path in (folder / "tensorboard" / stage).glob("events*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                if value.HasField("image"):
                    found.append((event.step, value.image.encoded_image_string))
                    with Image.open(folder / value.tag / f"{event.step:06}.png") as opened:
                        assert opened.size == (value.image.width, value.image.height)
            data = data[12 + length + 4 :]
    return sorted(found)


@pytest.mark.parametrize("kind", ["codes", "gaussian", "loop"])
def test_each_validation_has_a_picture_which_changes_no_weight(run, options, tmp_path, monkeypatch, kind):
    args = gaussian(options) if kind == "gaussian" else options
    if kind == "loop":
        sizes = ["--model.quantizer.num-codes", "8", "--model.quantizer.dim", "4"]
        args = [*without("--model.quantizer.", options), *sizes, "--quantizer", "GumbelQuantizer", "--model.beta", "1"]
    run(*args)
    folder = tmp_path / "run"
    assert names(folder) == {
        "reconstructions": ["000004.png", "000008.png"],
        "samples": ["000003.png", "000006.png"],
    }
    for stage, kept, steps in (("codebook", "reconstructions", (4, 8)), ("prior", "samples", (3, 6))):
        assert shown(folder, stage) == [(step, (folder / kept / f"{step:06}.png").read_bytes()) for step in steps]
    monkeypatch.setattr(Preview, "png", lambda self, kept: None)
    run(*args, "--run", tmp_path / "without")
    assert not (tmp_path / "without" / "samples").exists()
    assert weights(folder) == weights(tmp_path / "without")


def test_pictures_of_a_resumed_run_are_those_of_an_uninterrupted_one(run, options, tmp_path, monkeypatch):
    run(*options)
    whole, cut = (tmp_path / "run").rename(tmp_path / "whole"), tmp_path / "run"
    stopped(run, monkeypatch, cut, options, codebook=(3,))
    # Of steps that a kill took back, also where no validation comes to them again; and what is somebody's own.
    (cut / "reconstructions").mkdir(exist_ok=True)
    for left in ("000004.png", "000007.png", "000009.png", "mine.png"):
        (cut / "reconstructions" / left).write_bytes(b"of another future")
    with (cut / "metrics.csv").open("a") as file:
        file.write("codebook,7,test,psnr,1\n")
    run("--resume", "--run", cut)
    own = ["000009.png", "mine.png"]
    assert names(cut) == {**names(whole), "reconstructions": ["000004.png", "000008.png", *own]}
    for kept, found in names(whole).items():
        for name in found:
            assert (cut / kept / name).read_bytes() == (whole / kept / name).read_bytes()


def test_the_same_picture_comes_of_the_same_weights(run, options, tmp_path):
    """The second training at a rate of zero moves nothing, and random numbers are those of every validation."""
    still = ["--codebook-fit.learning-rate", "0", "--prior-fit.learning-rate", "0", "--quantizer", "VectorQuantizer"]
    sizes = ["--model.quantizer.num-codes", "8", "--model.quantizer.dim", "4"]
    run(*without("--model.quantizer.", options), *still, *sizes, "--model.quantizer.revival", "off")
    for kept, found in names(tmp_path / "run").items():
        assert len({(tmp_path / "run" / kept / name).read_bytes() for name in found}) == 1


def test_a_prior_knows_what_its_classes_are_called(run, options, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(previews.pictures, "grid", lambda images, columns, heads=(), **_: seen.append(heads) or PIXELS)
    run(*options)
    assert Prior.from_pretrained(tmp_path / "run" / "prior").class_names == ("left", "right")
    assert seen[-1] == ["left", "right"] * 5  # samples.png
    assert ["left", "right"] * 5 in seen[:-1]  # samples/STEP.png


PIXELS = torch.zeros(4, 4, 3, dtype=torch.uint8)


def test_what_takes_long_is_left_out_and_what_fits_in_no_memory_too(monkeypatch, capsys):
    clock, calls = [0.0], []
    monkeypatch.setattr(previews.time, "monotonic", lambda: clock[0])

    def make(kept: nn.Module) -> torch.Tensor:
        calls.append(clock[0])
        clock[0] += 2 * LONG_SECONDS
        return PIXELS

    preview = Preview(Fabric(accelerator="cpu", devices=1), make, 0)
    for now in (0.0, 100.0, 150.0, 221.0):
        clock[0] = now
        preview.png(nn.Identity())
    assert calls == [0.0, 221.0]
    assert capsys.readouterr().err.count("note: a picture takes 20 s") == 1

    def fails(kept: nn.Module) -> torch.Tensor:
        calls.append(-1.0)
        raise MemoryError

    preview = Preview(Fabric(accelerator="cpu", devices=1), fails, 0)
    assert [preview.png(nn.Identity()) for _ in range(3)] == [None] * 3
    assert calls.count(-1.0) == 1
    assert "not enough memory for pictures" in capsys.readouterr().err


def test_random_numbers_are_as_they_were():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    seen = []
    preview = Preview(Fabric(accelerator="cpu", devices=1), lambda kept: seen.append(torch.rand(2)) or PIXELS, 5)
    found = []
    for _ in range(2):
        preview.png(nn.Identity())
        found.append(torch.rand(1))
    assert torch.equal(torch.cat(found), expected)
    assert torch.equal(*seen)
