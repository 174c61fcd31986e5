"""Importing checkpoints of taming-transformers and LlamaGen: codes and pictures, yamls, and what is refused."""

import argparse
import shutil

import pytest
import torch
import yaml
from vqgan_checks import check_equal, same_weights, some_fast
from vqgan_references import PUBLISHED, Reference, pictures, published

from vqvae.interop.llamagen import import_llamagen
from vqvae.interop.taming import import_taming
from vqvae.quantizers import GumbelQuantizer, VectorQuantizer

CH = 32
CONV_IN = "encoder.conv_in.weight"
TAMING = [name for name in PUBLISHED if name.startswith("taming")]
LLAMAGEN = [name for name in PUBLISHED if name.startswith("llamagen")]


def yaml_of(reference, **changes):
    size = 256
    networks = {
        "double_z": False,
        "z_channels": reference.z_channels,
        "resolution": size,
        "in_channels": 3,
        "out_ch": 3,
        "ch": reference.widths[0],
        "ch_mult": [width // reference.widths[0] for width in reference.widths],
        "num_res_blocks": 2,
        "attn_resolutions": [size // 2**level for level in reference.attention],
        "dropout": 0.0,
    }
    params = {"embed_dim": reference.embed_dim, "n_embed": reference.num_codes, "ddconfig": networks}
    target = "taming.models.vqgan." + ("GumbelVQ" if reference.gumbel else "VQModel")
    for name, value in changes.items():
        (params if name in ("n_embed", "embed_dim", "remap", "kl_weight") else networks)[name] = value
    return yaml.safe_dump({"model": {"base_learning_rate": 4.5e-6, "target": target, "params": params}})


def taming_file(folder, reference, **others):
    path = folder / "last.ckpt"
    extra = {"loss.perceptual_loss.lin0.model.1.weight": torch.ones(2), "loss.discriminator.main.0.bias": torch.ones(3)}
    torch.save({"epoch": 3, "state_dict": {**reference.weights, **extra}, **others}, path)
    return path


@pytest.mark.parametrize("name", some_fast(TAMING, ("taming-f16-1024", "taming-gumbel-f8")))
def test_taming(name, tmp_path):
    reference = published(name, CH)
    path = taming_file(tmp_path, reference)
    (tmp_path / "model.yaml").write_text(yaml_of(reference))
    assert import_taming(path).config.image_size == 256
    model = import_taming(path, tmp_path / "model.yaml", image_size=32)
    images = pictures(48, 32)
    check_equal(model, images, reference.codes(reference.encode(images)), reference.decode)
    assert isinstance(model.quantizer, GumbelQuantizer if reference.gumbel else VectorQuantizer)


@pytest.mark.parametrize("name", some_fast(LLAMAGEN, ("llamagen-vq8",)))
def test_llamagen(name, tmp_path):
    reference = published(name, CH)
    path = tmp_path / "vq.pt"
    weights = {**reference.weights, "quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": weights, "args": argparse.Namespace(codebook_size=16384)}, path)
    model = import_llamagen(path, image_size=32)
    images = pictures(48, 32)
    check_equal(model, images, reference.codes(reference.encode(images)), reference.decode)
    assert import_llamagen(path).config.image_size == 256
    torch.save({"model": dict(published(name, 64).weights), "ema": weights}, path)  # a trainer's own file
    assert same_weights(import_llamagen(path, image_size=32), model)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_at_full_width(name, tmp_path):
    reference = published(name)
    if name == "llamagen-vq16":
        assert len(reference.weights) + 1 == 344  # with `quantize.codebook_used`, as many as the released file has
        assert round(sum(tensor.numel() for tensor in reference.weights.values()) / 1e6, 1) == 71.9
    images = pictures(48, 32)
    torch.save({"model" if name in LLAMAGEN else "state_dict": dict(reference.weights)}, tmp_path / "model.pt")
    load = import_llamagen if name in LLAMAGEN else import_taming
    model = load(tmp_path / "model.pt", image_size=32)
    check_equal(model, images, reference.codes(reference.encode(images)), reference.decode)


def test_attention_is_where_the_weights_have_it(tmp_path):
    """At two levels, of which the input's own size says nothing."""
    reference = Reference("taming", ch=32, ch_mult=(1, 2, 2), attention=(0, 2), z_channels=8, embed_dim=4, n_embed=64)
    path = taming_file(tmp_path, reference)
    model = import_taming(path, image_size=16)
    assert model.config.down_attention == model.config.up_attention == (0, 2)
    images = pictures(24, 16)
    check_equal(model, images, reference.codes(reference.encode(images)), reference.decode)


def test_yamls_of_taming(tmp_path):
    reference = published("taming-f16-1024", CH)
    path = taming_file(tmp_path, reference)
    with pytest.raises(ValueError, match="tell the size of images: give image_size, or config"):
        import_taming(path)
    given = tmp_path / "elsewhere" / "model.yaml"
    given.parent.mkdir()
    for changes, message in (
        ({"double_z": True}, "got double_z=True"),
        ({"resamp_with_conv": False}, "got resamp_with_conv=False"),
        ({"give_pre_end": True}, "got give_pre_end=True"),
        ({"tanh_out": True}, "got tanh_out=True"),
        ({"attn_type": "linear"}, "got attn_type='linear'"),
        ({"ch_mult": [1, 1, 2, 2, 2]}, r"has channels=\(32, 32, 64, 64, 64\) and the weights \(32, 32, 64, 64, 128\)"),
        ({"n_embed": 2}, "has n_embed=2 and the weights 1024"),
        ({"num_res_blocks": 3}, "has num_res_blocks=3"),
        ({"out_ch": 1}, "has out_ch=1 and the weights 3"),
        ({"attn_resolutions": [32]}, r"has down_attention=\(3,\) and the weights \(4,\)"),
        ({"attn_resolutions": []}, r"has down_attention=\(\) and the weights \(4,\)"),
        ({"attn_type": "none"}, r"has down_attention=\(\) and the weights \(4,\)"),
        ({"resolution": 128}, r"has down_attention=\(3,\) and the weights \(4,\)"),
        ({"ch_mult": 3}, "got ch_mult=3, expected a list of integers"),
        ({"ch_mult": None}, "got ch_mult=None, expected a list of integers"),
        ({"resolution": "256"}, "got resolution='256', expected an integer"),
    ):
        given.write_text(yaml_of(reference, **changes))
        with pytest.raises(ValueError, match=message):
            import_taming(path, given)
    for text, message in (
        ("model: [", "cannot be read as yaml"),
        ("a: 1", "has no model.params.ddconfig"),
        (yaml_of(reference).replace("VQModel", "AutoencoderKL"), "is of AutoencoderKL, expected VQModel"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as yaml"),
    ):
        given.write_text(text)
        with pytest.raises(ValueError, match=message):
            import_taming(path, given)
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(yaml_of(reference))
    with pytest.raises(ValueError, match=r"has 2 yaml files \(a.yaml, b.yaml\)"):
        import_taming(path)
    (tmp_path / "last.yaml").write_text(yaml_of(reference, resolution=128, attn_resolutions=[8]))
    assert import_taming(path).config.image_size == 128


def test_yamls_of_others_are_left_alone(tmp_path):
    """That of another checkpoint, and one that is of no tokenizer."""
    path = taming_file(tmp_path, published("taming-f16-1024", CH))
    (tmp_path / "other.yaml").write_text(yaml_of(published("taming-f16-1024", CH)))
    assert import_taming(path).config.image_size == 256
    shutil.copy(path, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="tell the size of images: give image_size, or config"):
        import_taming(path)
    assert import_taming(path, image_size=32).config.image_size == 32
    for text in ("learning_rate: 1", "model: [", "- a"):
        (tmp_path / "stray.yaml").write_text(text)
        assert import_taming(path, image_size=32).config.image_size == 32
    with pytest.raises(ValueError, match=r"stray\.yaml has no model\.params\.ddconfig"):
        import_taming(path, tmp_path / "stray.yaml")


def test_weights_of_taming_that_are_refused(tmp_path):
    reference = published("taming-f16-1024", CH)
    own = dict(reference.weights)

    def refused(message, change):
        weights = dict(own)
        change(weights)
        torch.save({"state_dict": weights}, tmp_path / "model.ckpt")
        with pytest.raises(ValueError, match=message):
            import_taming(tmp_path / "model.ckpt", image_size=32)

    new = torch.zeros(1)
    refused("holds colorize, which no VQGAN", lambda each: each.update(colorize=new))
    refused(
        "decoder.up.0.block.0.temb_proj.bias", lambda each: each.update({"decoder.up.0.block.0.temb_proj.bias": new})
    )
    refused("has no quantize.embedding.weight", lambda each: each.pop("quantize.embedding.weight"))
    refused("has no encoder.conv_in.weight", lambda each: each.pop("encoder.conv_in.weight"))
    refused("missing decoder.mid_block", lambda each: each.pop("decoder.mid.attn_1.q.bias"))
    refused("renumbers its codes", lambda each: each.update({"quantize.used": new}))
    refused("has no weights by name", lambda each: each.update({3: new}))
    refused(r"has encoder.conv_in.weight of shape \(\)", lambda each: each.update({CONV_IN: torch.tensor(1.0)}))
    refused(r"has a codebook of shape \(4,\)", lambda each: each.update({"quantize.embedding.weight": torch.ones(4)}))
    refused(
        "takes images of 3 channels and gives 1",
        lambda each: each.update({"decoder.conv_out.weight": torch.zeros(1, CH, 3, 3)}),
    )
    # Numbers in names, and shapes, that would be built if they were believed.
    for name in ("encoder.down.99999.block.0.norm1.bias", "decoder.up.99999.block.0.norm1.bias"):
        refused("99999 and no ", lambda each, name=name: each.update({name: new}))
    refused("resnets.99999 and no", lambda each: each.update({"encoder.down.0.block.99999.norm1.bias": new}))
    refused("down.10000000000.block", lambda each: each.update({"encoder.down.10000000000.block.0.norm1.bias": new}))
    refused(
        r"holds less of quantize.embedding.weight than its shape \(1000000000, 256\) says",
        lambda each: each.update({"quantize.embedding.weight": torch.zeros(1).expand(10**9, 256)}),
    )
    torch.save([1], tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="has no weights by name, expected a VQGAN"):
        import_taming(tmp_path / "model.ckpt", image_size=32)
    # Averaged copies are left where they are, and a remap that the config switches off too.
    torch.save({"state_dict": {**own, "model_ema.decay": new, "quantize.used": new}}, tmp_path / "model.ckpt")
    (tmp_path / "model.yaml").write_text(yaml_of(reference, remap=None))
    assert import_taming(tmp_path / "model.ckpt", image_size=32).num_codes == 1024


def test_a_gumbel_s_weight_that_is_no_number(tmp_path):
    reference = published("taming-gumbel-f8", CH)
    path = taming_file(tmp_path, reference)
    (tmp_path / "last.yaml").write_text(yaml_of(reference, kl_weight=None))
    with pytest.raises(ValueError, match=r"last\.yaml: got kl_weight=None, expected a number"):
        import_taming(path)


def test_llamagen_files_that_are_refused(tmp_path):
    path = tmp_path / "vq.pt"
    reference = published("llamagen-vq8", CH)
    for held, message in (
        ({"model": {"x": 1}}, "has no weights by name"),
        ({"model": {**reference.weights, "encoder.mid.3.norm1.bias": torch.ones(1)}}, "encoder.mid.3.norm1.bias"),
        ({"model": {"quant_conv.bias": torch.ones(1)}}, "has no quantize.embedding.weight"),
        ({"model": [1]}, "has no weights by name, expected a tokenizer of LlamaGen's"),
        ({"model": {**reference.weights, 1: torch.ones(1)}}, "has no weights by name"),
    ):
        torch.save(held, path)
        with pytest.raises(ValueError, match=message):
            import_llamagen(path)
