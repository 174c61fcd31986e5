"""Weights in checkpoints of trainers: under which key, behind which prefix, beside what."""

import os

import pytest
import safetensors.torch
import torch
from torch import nn
from vqgan_checks import same_weights
from vqgan_references import Reference

from priors import TransformerPrior
from vqvae import VQVAE
from vqvae.interop import export_diffusers, import_diffusers, import_tokenizer
from vqvae.quantizers import VectorQuantizer
from vqvae.vqgan import VQGAN

SIZES = {"ch": 32, "ch_mult": (1,), "attention": (), "z_channels": 4, "embed_dim": 4, "n_embed": 16}


@pytest.fixture(scope="module")
def weights():
    return dict(Reference("taming", **SIZES).weights)


@pytest.fixture(scope="module")
def others():
    """Of another tokenizer, whose numbers are others."""
    return {name: tensor + 1 for name, tensor in Reference("taming", **SIZES).weights.items()}


def prefixed(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


def read(held, tmp_path, name="model.ckpt"):
    """The model of a file that holds this, and what was told of it."""
    save = safetensors.torch.save_file if name.endswith(".safetensors") else torch.save
    save(held, tmp_path / name)
    told = []
    return import_tokenizer(tmp_path / name, image_size=8, tell=told.append), " ".join(told)


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory):
    plain, told = read({"state_dict": weights}, tmp_path_factory.mktemp("plain"))
    assert not told
    return plain


def refused(held, tmp_path, message):
    with pytest.raises(ValueError, match=message):
        read(held, tmp_path)


@pytest.mark.parametrize(
    ("prefix", "keys", "said"),
    [
        ("", (), []),
        ("", ("model",), []),
        ("_orig_mod.", (), ["'_orig_mod.' was taken off their names"]),
        ("module._orig_mod.", ("model",), ["'_orig_mod.' and 'module.' were taken off"]),
        ("model.", ("model_state_dict",), ["under 'model_state_dict'", "'model.' was taken off"]),
        ("", ("params_ema",), ["under 'params_ema'"]),
        ("ema.module.", ("generator",), ["under 'generator'", "'module.' and 'ema.'"]),
        ("anything.at.all.", ("checkpoint", "state_dict"), ["under 'checkpoint.state_dict'", "'anything.at.all.'"]),
    ],
)
def test_case_29_prefixes_and_keys_are_taken_off_and_told(prefix, keys, said, weights, model, tmp_path):
    held = prefixed(prefix, weights)
    for key in reversed(keys):
        held = {key: held, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    for name in ("model.ckpt", "model.safetensors")[: 1 if keys else 2]:
        found, told = read(held, tmp_path, name)
        assert same_weights(found, model)
        assert all(part in told for part in [*said, str(tmp_path / name)]) if said else not told
        assert "\n" not in told


def test_case_29_wrappers_within_names_are_taken_out(weights, model, tmp_path):
    """Of parts that were compiled or wrapped on their own."""
    inside = {
        name.replace("encoder.", "encoder._orig_mod.").replace("decoder.", "decoder._fsdp_wrapped_module.", 1): tensor
        for name, tensor in weights.items()
    }
    found, told = read({"state_dict": inside}, tmp_path)
    assert same_weights(found, model)
    assert "'_fsdp_wrapped_module.' and '_orig_mod.' were taken off" in told
    refused({"state_dict": {**inside, **weights}}, tmp_path, "has .* twice: with and without ")


def test_case_29_of_latent_diffusion_the_first_stage_alone_is_taken(weights, others, model, tmp_path):
    beside = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.ones(3),
        "cond_stage_model.transformer.weight": torch.ones(2),
        "betas": torch.ones(4),
        "model_ema.decay": torch.tensor(0.9),
    }
    held = {**prefixed("first_stage_model.", weights), "first_stage_model.loss.logvar": torch.ones(1), **beside}
    found, told = read({"state_dict": held}, tmp_path)
    assert same_weights(found, model)
    assert "4 others are left out (betas., cond_stage_model., model. and 1 more)" in told
    # Of a transformer over codes, whose conditions have a tokenizer too.
    found, told = read({"state_dict": {**held, **prefixed("cond_stage_model.", others)}}, tmp_path)
    assert same_weights(found, model)
    assert "not from 'cond_stage_model.encoder...' under 'state_dict'" in told


def test_case_29_of_averaged_weights_and_others_the_averaged_are_taken(weights, others, model, tmp_path):
    for held in (
        {"model": others, "ema": weights},
        {"params": others, "params_ema": weights},
        {"state_dict": {**prefixed("vqgan.", others), **prefixed("ema_model.", weights)}},
        {**others, **prefixed("ema.", weights)},
    ):
        found, told = read(held, tmp_path)
        assert same_weights(found, model)
        assert "taken from" in told
        assert "not from" in told
    torch.save({"one": weights, "same": weights}, tmp_path / "model.ckpt")  # one dict under two names
    assert same_weights(import_tokenizer(tmp_path / "model.ckpt", image_size=8), model)


def test_case_29_two_tokenizers_are_refused_by_both_names(weights, others, tmp_path):
    for held, names in (
        ({"a": weights, "b": others}, "'encoder...' under 'a' and 'encoder...' under 'b'"),
        ({**weights, **prefixed("teacher.", others)}, "'encoder...' and 'teacher.encoder...'"),
        ({"ema": weights, "params_ema": others}, "under 'ema' and .* under 'params_ema'"),
    ):
        refused(held, tmp_path, f"holds 2 tokenizers, .*{names}.* save the weights of the one that you want alone")
    # A KL autoencoder has the same names and no codebook.
    kl = {name: tensor for name, tensor in others.items() if not name.startswith("quantize.")}
    _, told = read({"state_dict": {**prefixed("vae.", kl), **prefixed("vq.", weights)}}, tmp_path)
    assert "taken from 'vq.encoder...' under 'state_dict', not from 'vae.encoder...' under 'state_dict'" in told


def test_case_29_what_lacks_the_prefix_is_missing_by_name(weights, tmp_path):
    held = prefixed("model.", weights)
    refused(held | {"model.global_step": 3}, tmp_path, "has no weights by name, or something else among them")
    held["quantize.embedding.weight"] = held.pop("model.quantize.embedding.weight")
    refused(held, tmp_path, r"has no quantize\.embedding\.weight")


@pytest.mark.parametrize("trainer", [False, True])
def test_case_29_weights_of_this_library_are_said_to_be_so(trainer, tmp_path):
    for made in (
        VQVAE(width=8, num_blocks=0),
        VQGAN(image_size=8, channels=(32,), latent_channels=4, quantizer=VectorQuantizer.Config(num_codes=4, dim=4)),
        TransformerPrior(num_codes=4, grid=(2, 2), width=8, depth=1, num_heads=1),
    ):
        state = nn.DataParallel(made).state_dict() if trainer else made.state_dict()
        held = {"module": state, "step": 3} if trainer else state
        refused(held, tmp_path, r"weights of a model of this library, .* VQVAE\.from_pretrained")


def test_what_is_of_diffusers_is_asked_for_by_its_folder(tmp_path):
    quantizer = VectorQuantizer.Config(num_codes=4, dim=2, revival="off")
    sizes = {"image_size": 8, "channels": (2,), "num_groups": 2, "num_blocks": 1, "latent_channels": 2}
    export_diffusers(VQGAN.Config(**sizes, quantizer=quantizer).build().eval(), tmp_path / "folder")
    path = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"weights of a VQModel of diffusers: name its folder"):
        import_tokenizer(path)
    plain = import_diffusers(tmp_path / "folder")
    # And in a folder names may have been put before too.
    safetensors.torch.save_file(prefixed("module.vq.", safetensors.torch.load_file(path)), path)
    told = []
    assert same_weights(import_diffusers(tmp_path / "folder", tell=told.append), plain)
    assert "'module.' and 'vq.' were taken off their names" in told[0]


def test_numbers_that_many_weights_share_are_not_taken_for_as_many(weights, tmp_path):
    """A small file could else ask for much memory."""
    held = dict.fromkeys((f"loss.{number}" for number in range(20)), torch.zeros(100_000))
    refused({"state_dict": {**weights, **held}}, tmp_path, "they are the same numbers")


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model\.ckpt is no file, expected one"):
        import_tokenizer(tmp_path / "model.ckpt")
