"""Every program under examples runs, on small data, and does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import vqvae
from vqvae import VQVAE, load_images
from vqvae.data import ImageTensors
from vqvae.quantizers import EMAVectorQuantizer
from vqvae.tokens import CodeDataset, Tokenizing, tokenize, write_parquet

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *args: object, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a tokenizer that nobody trained, whose codes are at least not all the same."""
    torch.manual_seed(0)
    model = VQVAE(width=8, num_blocks=1, quantizer=EMAVectorQuantizer.Config(num_codes=16, dim=4))
    images = load_images("fashion-mini").__getitems__(range(64)).images
    model(images)
    model.update()  # the k-means start
    folder = tmp_path_factory.mktemp("run")
    model.eval().save_pretrained(folder / "codebook")
    return folder


@pytest.fixture(scope="module")
def codes(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codes")
    tokenizer = VQVAE.from_pretrained(model / "codebook")
    for split in ("train", "test"):
        some = load_images("fashion-mini", split).__getitems__(range(200))
        images = ImageTensors(some.images, some.labels, name="some")
        tokenize(tokenizer, images, folder / split, Tokenizing(split=split, shard_size=64))
    write_parquet(CodeDataset(folder / "train"), folder / "train.parquet")
    return folder


@pytest.mark.slow
def test_our_quantizer_in_your_model(tmp_path):
    out = run("our_quantizer_in_your_model.py", "--num-steps", 60, cwd=tmp_path)
    decibels, used = re.search(r"PSNR ([\d.]+) dB, (\d+)% of the codebook", out).groups()
    assert float(decibels) > 14  # a mean image has 11
    assert int(used) > 50


@pytest.mark.slow
def test_tokenizer_in_a_dataset(model, tmp_path):
    for index, image in enumerate(load_images("fashion-mini", "test").__getitems__(range(40)).images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{index:02}.png")
    out = run("tokenizer_in_a_dataset.py", model, tmp_path, cwd=tmp_path)
    images = load_images("fashion-mini", "test").__getitems__([32]).images
    first = VQVAE.from_pretrained(model / "codebook").encode(images)[0].flatten()[:8].tolist()
    assert [line.split(" ")[0] for line in out.splitlines()] == ["32", "8"]
    assert out.strip().endswith(f"32.png begins with {first}")


@pytest.mark.slow
def test_read_codes_without_us(codes, tmp_path):
    assert not re.search(r"^ *(import|from) vqvae", (EXAMPLES / "read_codes_without_us.py").read_text(), re.MULTILINE)
    out = run("read_codes_without_us.py", codes / "train", cwd=tmp_path)
    assert "200 rows of codes 0..15, grid [7, 7], uint16" in out
    assert "codes-00003.safetensors: (8, 7, 7)" in out
    used = CodeDataset(codes / "train").__getitems__(range(200)).codes.unique().numel()
    assert f"{used} codes are in use" in out
    out = run("read_codes_without_us.py", codes / "train.parquet", cwd=tmp_path)
    assert f"codes {CodeDataset(codes / 'train')[0][0].flatten()[:8].tolist()}" in out


@pytest.mark.slow
def test_train_a_hugging_face_llama(model, codes, tmp_path):
    options = ("--num-steps", 60, "--output", tmp_path / "llama")
    out = run("train_a_hugging_face_llama.py", model, codes, *options, cwd=tmp_path)
    found = re.findall(r"([\d.]+) bits a code on test codes, (.*); even codes would take 4.000", out)
    assert [name for _, name in found] == ["labels known", "no labels"]
    labelled, without = (float(bits) for bits, _ in found)
    assert labelled < 3.9
    # The token of no class is trained too: a label says little of these codes, a random start costs much.
    assert without < min(3.9, labelled + 0.1)
    assert (tmp_path / "llama" / "samples.png").exists()


@pytest.mark.slow
def test_diffusers_in_and_out(tmp_path):
    out = run("diffusers_in_and_out.py", "--output", tmp_path / "out", cwd=tmp_path)
    assert re.search(r"num_wrong=0\b", out)
    assert int(re.search(r"largest difference of a pixel: (\d+) level", out)[1]) <= 1
    assert vqvae.VQVAE.from_pretrained(tmp_path / "out" / "ours").grid == (8, 8)


def test_every_example_is_run_and_listed():
    programs = {path.name for path in EXAMPLES.glob("*.py")}
    tests = {name: each for name, each in globals().items() if name.startswith("test_") and callable(each)}
    run_here = {name for each in tests.values() for name in each.__code__.co_consts if name in programs}
    assert programs == run_here
    page = (EXAMPLES / "README.md").read_text()
    assert all(f"({name})" in page for name in programs)
