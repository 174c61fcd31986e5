"""Importing checkpoints of taming-transformers and LlamaGen: codes and pictures, yamls, and what is refused."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from vqgan_checks import check_equal, same_weights, some_fast
from vqgan_references import PUBLISHED, Reference, pictures, published

from vqvae import VQGAN
from vqvae.fingerprint import of_tokenizer
from vqvae.interop.llamagen import import_llamagen
from vqvae.interop.taming import import_taming
from vqvae.quantizers import GumbelQuantizer, VectorQuantizer

CH = 32
ROOT = Path(__file__).parents[2]


def yaml_of(reference, **changes):
    size = 256
    networks = {
        "double_z": False,
        "z_channels": reference.z_channels,
        "resolution": size,
        "out_ch": 3,
        "ch": reference.widths[0],
        "ch_mult": [width // reference.widths[0] for width in reference.widths],
        "num_res_blocks": 2,
        "attn_resolutions": [size // 2**level for level in reference.attention],
    }
    params = {"embed_dim": reference.embed_dim, "n_embed": reference.num_codes, "ddconfig": networks}
    for name, value in changes.items():
        (params if name in ("n_embed", "remap", "kl_weight") else networks)[name] = value
    target = "taming.models.vqgan." + ("GumbelVQ" if reference.gumbel else "VQModel")
    return yaml.safe_dump({"model": {"target": target, "params": params}})


@pytest.fixture(scope="module")
def small():
    """At two levels attention, of which the input's own size says nothing."""
    return Reference("taming", ch=32, ch_mult=(1, 2, 2), attention=(0, 2), z_channels=8, embed_dim=4, n_embed=64)


def taming_file(folder, reference, **others):
    path = folder / "last.ckpt"
    extra = {"loss.perceptual_loss.lin0.model.1.weight": torch.ones(2), "loss.discriminator.main.0.bias": torch.ones(3)}
    torch.save({"epoch": 3, "state_dict": {**reference.weights, **extra}, **others}, path)
    return path


@pytest.mark.parametrize("name", some_fast(PUBLISHED, ("taming-f16-1024", "taming-gumbel-f8", "llamagen-vq8")))
def test_published(name, tmp_path):
    # The others in their full width.
    reference = published(name, CH if name not in ("taming-f16-16384", "llamagen-vq16") else 128)
    if name.startswith("taming"):
        path, load = taming_file(tmp_path, reference), import_taming
        (tmp_path / "last.yaml").write_text(yaml_of(reference))
    else:
        path, load = tmp_path / "vq.pt", import_llamagen
        weights = {**reference.weights, "quantize.codebook_used": torch.zeros(65536)}
        torch.save({"model": weights, "args": argparse.Namespace(codebook_size=16384)}, path)
    if name == "llamagen-vq16":
        assert len(weights) == 344  # as many as the released file has
        assert round(sum(tensor.numel() for tensor in reference.weights.values()) / 1e6, 1) == 71.9
    assert load(path).config.image_size == 256
    model = load(path, image_size=32)
    images = pictures(48, 32)
    check_equal(model, images, reference.codes(reference.encode(images)), reference.decode)
    assert isinstance(model.quantizer, GumbelQuantizer if reference.gumbel else VectorQuantizer)


def test_of_a_trainer_s_own_file_of_llamagen_the_averages_are_taken(tmp_path):
    weights, others = (dict(published("llamagen-vq8", width).weights) for width in (32, 64))
    torch.save({"model": others, "ema": weights}, tmp_path / "trainer.pt")
    torch.save({"model": weights}, tmp_path / "plain.pt")
    plain, model = (import_llamagen(tmp_path / f"{name}.pt", image_size=32) for name in ("plain", "trainer"))
    assert same_weights(plain, model)


def test_attention_is_where_the_weights_have_it(small, tmp_path):
    model = import_taming(taming_file(tmp_path, small), image_size=16)
    assert model.config.down_attention == model.config.up_attention == (0, 2)
    images = pictures(24, 16)
    check_equal(model, images, small.codes(small.encode(images)), small.decode)


def test_yamls_of_taming(small, tmp_path):
    path = taming_file(tmp_path, small)
    with pytest.raises(ValueError, match="tell the size of images: give image_size, or config"):
        import_taming(path)
    given = tmp_path / "elsewhere" / "model.yaml"
    given.parent.mkdir()
    attention = r"has down_attention=.* and the weights \(0, 2\)"
    for changes, message in (
        ({"double_z": True}, "got double_z=True"),
        ({"attn_type": "linear"}, "got attn_type='linear'"),
        ({"ch_mult": [1, 1, 2]}, r"has channels=\(32, 32, 64\) and the weights \(32, 64, 64\)"),
        ({"n_embed": 2}, "has n_embed=2 and the weights 64"),
        ({"attn_type": "none"}, attention),
        ({"resolution": 128}, attention),
        ({"ch_mult": None}, "got ch_mult=None, expected a list of integers"),
        ({"resolution": "256"}, "got resolution='256', expected an integer"),
        ({"kl_weight": None}, r"model\.yaml: got kl_weight=None, expected a number"),
    ):
        given.write_text(yaml_of(small, **changes))
        with pytest.raises(ValueError, match=message):
            import_taming(path, given)
    for text, message in (
        ("model: [", "cannot be read as yaml"),
        ("a: 1", "has no model.params.ddconfig"),
        (yaml_of(small).replace("VQModel", "AutoencoderKL"), "is of AutoencoderKL, expected VQModel"),
    ):
        given.write_text(text)
        with pytest.raises(ValueError, match=message):
            import_taming(path, given)
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(yaml_of(small))
    with pytest.raises(ValueError, match=r"has 2 yaml files \(a.yaml, b.yaml\)"):
        import_taming(path)
    (tmp_path / "last.yaml").write_text(yaml_of(small, resolution=128, attn_resolutions=[128, 32]))
    assert import_taming(path).config.image_size == 128


def test_yamls_of_others_are_left_alone(small, tmp_path):
    """That of another checkpoint, and one that is of no tokenizer."""
    path = taming_file(tmp_path, small)
    (tmp_path / "other.yaml").write_text(yaml_of(small))
    assert import_taming(path).config.image_size == 256
    shutil.copy(path, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="tell the size of images: give image_size, or config"):
        import_taming(path)
    for text in ("learning_rate: 1", "model: ["):
        (tmp_path / "stray.yaml").write_text(text)
        assert import_taming(path, image_size=32).config.image_size == 32


ONE = torch.zeros(1)
WRONG_WEIGHTS = [
    ("holds colorize, which no VQGAN", {"colorize": ONE}),
    ("has no quantize.embedding.weight", {"quantize.embedding.weight": None}),
    ("has no encoder.conv_in.weight", {"encoder.conv_in.weight": None}),
    ("missing decoder.mid_block", {"decoder.mid.attn_1.q.bias": None}),
    ("renumbers its codes", {"quantize.used": ONE}),
    ("has no weights by name", {3: ONE}),
    (r"has encoder.conv_in.weight of shape \(\)", {"encoder.conv_in.weight": torch.tensor(1.0)}),
    (r"has a codebook of shape \(4,\)", {"quantize.embedding.weight": torch.ones(4)}),
    ("takes images of 3 channels and gives 1", {"decoder.conv_out.weight": torch.zeros(1, 32, 3, 3)}),
    # Numbers in names, and shapes, that would be built if they were believed.
    ("99999 and no ", {"decoder.up.99999.block.0.norm1.bias": ONE}),
    ("resnets.99999 and no", {"encoder.down.0.block.99999.norm1.bias": ONE}),
    ("down.10000000000.block", {"encoder.down.10000000000.block.0.norm1.bias": ONE}),
    (r"holds less of .* \(1000000000, 256\) says", {"quantize.embedding.weight": ONE.expand(10**9, 256)}),
]


@pytest.mark.parametrize(("message", "changes"), WRONG_WEIGHTS)
def test_weights_of_taming_that_are_refused(message, changes, small, tmp_path):
    weights = {name: tensor for name, tensor in {**small.weights, **changes}.items() if tensor is not None}
    torch.save({"state_dict": weights}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=message):
        import_taming(tmp_path / "model.ckpt", image_size=32)


def test_averaged_copies_and_a_remap_that_is_off_are_left_where_they_are(small, tmp_path):
    torch.save({"state_dict": {**small.weights, "model_ema.decay": ONE, "quantize.used": ONE}}, tmp_path / "model.ckpt")
    (tmp_path / "model.yaml").write_text(yaml_of(small, remap=None))
    assert import_taming(tmp_path / "model.ckpt", image_size=32).num_codes == 64


def test_llamagen_files_that_are_refused(tmp_path):
    path = tmp_path / "vq.pt"
    weights = published("llamagen-vq8", CH).weights
    for held, message in (
        ({"model": {**weights, "encoder.mid.3.norm1.bias": ONE}}, "encoder.mid.3.norm1.bias"),
        ({"model": {"quant_conv.bias": ONE}}, "has no quantize.embedding.weight"),
        ({"model": [1]}, "has no weights by name, expected a tokenizer of LlamaGen's"),
    ):
        torch.save(held, path)
        with pytest.raises(ValueError, match=message):
            import_llamagen(path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["taming", "llamagen"])
def test_an_imported_tokenizer_learns_for_the_eye(layout, small, tmp_path):
    """By commands alone: its decoder, which leaves its codes what they are, and then all of it."""
    if layout == "taming":
        path = taming_file(tmp_path, small)
        (tmp_path / "last.yaml").write_text(yaml_of(small))
    else:
        path = tmp_path / "vq.pt"
        torch.save({"model": published("llamagen-vq8", CH).weights}, path)
    for split, num in (("train", 12), ("test", 4)):
        for number, picture in enumerate(pictures(num, 32)):
            file = tmp_path / "photos" / split / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            levels = (picture * 255).round().to(torch.uint8) if picture.is_floating_point() else picture
            Image.fromarray(levels.permute(1, 2, 0).numpy()).save(file)

    def call(*words):
        command = [sys.executable, "-m", "vqvae", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    photos, made = tmp_path / "photos", tmp_path / "made"
    call("import", path, "-o", made, "--data", photos, "--image-size", 32)
    looks = ["--looks.perceptual", 1, "--looks.adversarial", 0.1, "--looks.start", 1, "--looks.width", 8]
    steps = ["--codebook-fit.num-steps", 3, "--codebook-fit.batch-size", 2, "--looks.num-halvings", 1]
    both = ["--preset", "folder", "--data.source", photos, "--tokenizer", made, "--stage", "codebook", *looks, *steps]
    before = VQGAN.from_pretrained(made)
    call("train", *both, "--train", "decoder", "--run", tmp_path / "decoder")
    after = VQGAN.from_pretrained(tmp_path / "decoder")
    assert of_tokenizer(after) == of_tokenizer(before)
    assert not same_weights(after, before)
    call("train", *both, "--run", tmp_path / "whole")
    assert of_tokenizer(VQGAN.from_pretrained(tmp_path / "whole")) != of_tokenizer(before)
