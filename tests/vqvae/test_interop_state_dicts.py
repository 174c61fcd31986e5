"""Weights in checkpoints of trainers: under which key, behind which prefix, beside what."""

import os

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from vqgan_checks import same_weights
from vqgan_references import Reference

from priors import TransformerPrior
from vqvae import VQVAE
from vqvae.interop import export_diffusers, import_diffusers, import_tokenizer
from vqvae.interop.state_dicts import find_weights
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


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "model.ckpt"
    torch.save({"state_dict": weights}, path)
    told = []
    plain = import_tokenizer(path, image_size=8, tell=told.append)
    assert not told
    return plain


def prefixed(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


def read(held, tmp_path, name="model.ckpt"):
    """The model of a file that holds this, and what was told of it."""
    torch.save(held, tmp_path / name)
    told = []
    return import_tokenizer(tmp_path / name, image_size=8, tell=told.append), " ".join(told)


@pytest.mark.parametrize(
    ("prefix", "keys", "said"),
    [
        ("module.", (), ["'module.' was taken off their names"]),
        ("_orig_mod.", ("state_dict",), ["'_orig_mod.' was taken off"]),
        ("first_stage_model.", ("state_dict",), ["'first_stage_model.' was taken off"]),
        ("module._orig_mod.", ("model",), ["'_orig_mod.' and 'module.' were taken off"]),
        ("model.", ("model_state_dict",), ["under 'model_state_dict'", "'model.' was taken off"]),
        ("vqvae.", ("net",), ["under 'net'", "'vqvae.'"]),
        ("vqgan.tokenizer.", ("params",), ["under 'params'", "'vqgan.tokenizer.'"]),
        ("", ("params_ema",), ["under 'params_ema'"]),
        ("ema.module.", ("generator",), ["under 'generator'", "'module.' and 'ema.'"]),
        ("", ("checkpoint", "state_dict"), ["under 'checkpoint.state_dict'"]),
        ("anything.at.all.", ("whatever",), ["under 'whatever'", "'anything.at.all.'"]),
    ],
)
def test_case_29_prefixes_and_keys_are_taken_off_and_told(prefix, keys, said, weights, model, tmp_path):
    held = prefixed(prefix, weights)
    for key in reversed(keys):
        held = {key: held, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    found, told = read(held, tmp_path)
    assert same_weights(found, model)
    assert all(part in told for part in [*said, str(tmp_path / "model.ckpt")])
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
    torch.save({"state_dict": {**inside, **weights}}, tmp_path / "both.ckpt")
    with pytest.raises(ValueError, match=r"both\.ckpt has .* twice: with and without "):
        import_tokenizer(tmp_path / "both.ckpt", image_size=8)


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
    for held, first, second in (
        ({"a": weights, "b": others}, "'encoder...' under 'a'", "'encoder...' under 'b'"),
        ({"state_dict": {**prefixed("x.", weights), **prefixed("y.", others)}}, "'x.encoder...'", "'y.encoder...'"),
        ({**weights, **prefixed("teacher.", others)}, "'encoder...'", "'teacher.encoder...'"),
        ({"ema": weights, "params_ema": others}, "under 'ema'", "under 'params_ema'"),
    ):
        torch.save(held, tmp_path / "model.ckpt")
        with pytest.raises(ValueError, match="holds 2 tokenizers") as caught:
            import_tokenizer(tmp_path / "model.ckpt", image_size=8)
        assert first in str(caught.value)
        assert second in str(caught.value)
        assert "save the weights of the one that you want alone" in str(caught.value)
    # A KL autoencoder has the same names and no codebook.
    kl = {name: tensor for name, tensor in others.items() if not name.startswith("quantize.")}
    _, told = read({"state_dict": {**prefixed("vae.", kl), **prefixed("vq.", weights)}}, tmp_path)
    assert "taken from 'vq.encoder...' under 'state_dict', not from 'vae.encoder...' under 'state_dict'" in told


def test_case_29_what_lacks_the_prefix_is_missing_by_name(weights, tmp_path):
    held = prefixed("model.", weights)
    held["quantize.embedding.weight"] = held.pop("model.quantize.embedding.weight")
    torch.save(held, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"has no quantize\.embedding\.weight"):
        import_tokenizer(tmp_path / "model.ckpt", image_size=8)
    held = prefixed("model.", weights) | {"model.global_step": 3}
    torch.save(held, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="has no weights by name, or something else among them"):
        import_tokenizer(tmp_path / "model.ckpt", image_size=8)


def test_safetensors_are_checkpoints_too(weights, model, tmp_path):
    safetensors.torch.save_file(prefixed("vq.", weights), tmp_path / "model.safetensors")
    told = []
    assert same_weights(import_tokenizer(tmp_path / "model.safetensors", image_size=8, tell=told.append), model)
    assert "'vq.' was taken off" in told[0]


@pytest.mark.parametrize("trainer", [False, True])
def test_case_29_weights_of_this_library_are_said_to_be_so(trainer, tmp_path):
    prior = TransformerPrior(num_codes=4, grid=(2, 2), width=8, depth=1, num_heads=1)
    quantizer = VectorQuantizer.Config(num_codes=4, dim=4)
    for made in (
        VQVAE.Config(width=8, num_blocks=0).build(),
        VQGAN.Config(image_size=8, channels=(32,), num_blocks=1, latent_channels=4, quantizer=quantizer).build(),
        prior,
    ):
        state = nn.DataParallel(made).state_dict() if trainer else made.state_dict()
        torch.save({"module": state, "step": 3} if trainer else state, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"weights of a model of this library, .* VQVAE\.from_pretrained"):
            import_tokenizer(tmp_path / "model.pt")


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
    many = torch.zeros(100_000)
    held = {f"loss.{number}": many for number in range(20)}
    torch.save({"state_dict": {**weights, **held}}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="they are the same numbers"):
        import_tokenizer(tmp_path / "model.ckpt", image_size=8)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model\.ckpt is no file, expected one"):
        import_tokenizer(tmp_path / "model.ckpt")


words = st.sampled_from(["model", "module", "vqgan", "_orig_mod", "net", "first_stage_model", "g", "tokenizer"])


@given(
    prefix=st.lists(words, max_size=3),
    keys=st.lists(st.sampled_from(["state_dict", "model", "net", "x.y", ""]), max_size=2),
    beside=st.dictionaries(st.text(max_size=8).map(lambda name: f"other {name}"), st.none(), max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_any_prefix_under_any_key_is_found(weights, tmp_path_factory, prefix, keys, beside):
    path = tmp_path_factory.getbasetemp() / "weights.pt"
    if not path.exists():
        torch.save(weights, path)  # for its size
    held = prefixed("".join(f"{word}." for word in prefix), weights)
    for key in reversed(keys):
        held = {**beside, key: held}
    told = []
    found = find_weights(held, path, "weights", told.append)
    assert found.keys() == weights.keys()
    assert all(found[name] is tensor for name, tensor in weights.items())
    assert bool(told) == bool(prefix or ".".join(keys) not in ("", "state_dict", "model"))
