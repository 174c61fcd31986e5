"""The page that a run leaves: what is in it, that it is of the run, and the command line that it states."""

import csv
import json
import shlex
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import pytest
from run_files import SMALL, gaussian

from vqvae.training.options import load_run
from vqvae.training.parsing import parse
from vqvae.training.reproducing import command_line, public_options


class Read(HTMLParser):
    """A page as a browser reads it: its text, its attributes, and whether each element ends where it should."""

    EMPTY = ("meta", "img", "br")

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.text, self.attributes, self.names = [], "", [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, *each) for each in attrs]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(tag, *each) for each in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open[-1:] != ["style"] else ""


def check_alone(read: Read) -> None:
    """Nothing is fetched and nothing runs."""
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(read.names)
    for tag, name, value in read.attributes:
        assert not name.startswith("on")
        assert name not in ("href", "srcset", "action")
        if name == "src":
            assert tag == "img"
            assert b64decode(value.removeprefix("data:image/png;base64,"), validate=True).startswith(b"\x89PNG")
        else:
            assert "http" not in (value or "").replace("http-equiv", "")
            assert "url(" not in (value or "")
    assert all(alt for tag, name, alt in read.attributes if (tag, name) == ("img", "alt"))
    assert sum(name == "alt" for _, name, _ in read.attributes) == read.names.count("img")


def test_a_run_ends_with_its_report(run, options, tmp_path, capsys):
    run(*options)
    assert "report.html" in capsys.readouterr().out
    page = tmp_path / "run" / "report.html"
    read = Read(page)
    check_alone(read)
    style = page.read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    figures = json.loads((tmp_path / "run" / "elbo.json").read_text())
    for value in [*figures["rate"].values(), figures["distortion"], figures["negative_elbo"]]:
        assert f"{value:.2f}" in read.text
    assert f"{figures['bits_per_dim']:.4f}" in read.text
    assert f"{figures['psnr']:.2f} dB" in read.text
    assert f"perplexity {figures['perplexity']:,.1f}" in read.text
    for title in ("Bits", "Training", "Reconstructions", "Samples", "Usage of codes", "Image by image"):
        assert title in read.text
    for told in ("left", "right", figures["models"], figures["data_digest"]):
        assert told in read.text
    # Ten best and worst of six images are all of them, each with its reconstruction; and the first; and samples.
    assert read.names.count("img") == 3 * 2 * figures["images"] + 1
    assert str(tmp_path) not in page.read_text()
    assert not list((tmp_path / "run").glob(".report*"))
    for stage in ("codebook", "prior"):
        with (tmp_path / "run" / "metrics.csv").open() as file:
            assert stage in {row[0] for row in csv.reader(file)}
        assert f"Rate, {stage}" in read.text or f"Distortion, {stage}" in read.text

    # The command writes the same page but for what only the evaluation of the run knows; and twice the same bytes.
    run("report", tmp_path / "run")
    first = page.read_bytes()
    again = Read(page)
    check_alone(again)
    assert again.text == read.text
    run("report", tmp_path / "run", "-o", tmp_path / "other.html")
    assert (tmp_path / "other.html").read_bytes() == first


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--preset folder --quantizer ResidualQuantizer/FSQ --model.image-size 96 128 --data.augment.flip",
        "--latents gaussian --model.dim 16 --model.free-bits 0.1",
        "--prior-kind PixelCNN --likelihood LocalContext --no-labels --prior-fit.num-steps 7 --seed 5",
        "--model.beta 1 --schedule alternating --logger wandb",
        "--preset photo-64 --looks.perceptual 0 --looks.adversarial 0 --compile --test-images 5",
        "--preset folder --data.source hf:owner/name --prior.depth 2 --codebook-fit.ema 0.5",
    ],
)
def test_the_command_line_asks_for_the_same_run(words):
    asked = parse([*words.split(), "--run", "runs/mine"])
    said = shlex.split(command_line(asked))
    assert said[:2] == ["vqvae", "train"]
    assert parse(said[2:]) == asked


def test_the_command_line_is_short_and_tells_no_paths(tmp_path):
    asked = parse([*SMALL, "--data.source", str(tmp_path / "my photos"), "--run", str(tmp_path / "run")])
    said = command_line(asked)
    assert str(tmp_path) not in said
    assert "'my photos'" in said
    assert "--model.downsampling" not in said  # as in the preset
    assert dict(public_options(asked))["data.source"] == "my photos"


def test_a_run_of_vectors_ends_with_its_report(run, options, tmp_path):
    run(*gaussian(options))
    read = Read(tmp_path / "run" / "report.html")
    check_alone(read)
    assert "active channels" in read.text
    assert "Usage of channels" in read.text
    assert "posterior entropy" in read.text
    assert "--latents gaussian" in read.text
    assert parse(shlex.split(command_line(load_run(tmp_path / "run")))[2:]).latents == "gaussian"
