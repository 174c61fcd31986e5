"""Importing models of diffusers: codes and pictures, files of every kind, and what is refused."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from vqgan_checks import check_equal, same_weights, some_fast
from vqgan_references import RELEASED, pictures, vq_model

from vqvae import VQVAE
from vqvae.interop.diffusers import export_diffusers, import_diffusers
from vqvae.vqgan import VQGAN

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def peer_codes(peer, images):
    with torch.no_grad():
        h = peer.encode(images / 127.5 - 1).latents
        return peer.quantize(h)[2][2].reshape(len(h), *h.shape[2:])


def peer_decode(peer, codes):
    with torch.no_grad():
        vectors = peer.quantize.embedding(codes).permute(0, 3, 1, 2)
        quantised = peer.post_quant_conv(vectors)
        return peer.decoder(quantised, vectors if peer.config.norm_type == "spatial" else None)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq") / "model"
    vq_model("narrow-codes", shrink=2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", some_fast(RELEASED, ("amused", "kandinsky-movq", "narrow-codes")))
def test_diffusers_there_and_back(name, tmp_path):
    """Codes, pictures, weights and config; the round trip's model is diffusers' again, to the bit."""
    import diffusers

    peer = vq_model(name, shrink=1 if name == "vq-diffusion-ithq" else 4)  # one in its full width
    peer.save_pretrained(tmp_path / "theirs")
    model = import_diffusers(tmp_path / "theirs", image_size=32)
    images = pictures(64, 32)
    check_equal(model, images, peer_codes(peer, images), lambda codes: peer_decode(peer, codes))
    wide = torch.cat([images[:8], images[8:16].flip(2)], 3)  # of any size, as the networks are
    for others in (wide, wide.mT.contiguous()):
        check_equal(model, others, peer_codes(peer, others), lambda codes: peer_decode(peer, codes))
    export_diffusers(model, tmp_path / "ours")
    again = diffusers.VQModel.from_pretrained(tmp_path / "ours")
    assert same_weights(peer, again)
    said, kept = (
        {key: list(value) if isinstance(value, tuple) else value for key, value in each.config.items() if key[0] != "_"}
        for each in (peer, again)
    )
    if said["vq_embed_dim"] is None:  # the same as the number that an export writes
        said["vq_embed_dim"] = said["latent_channels"]
    assert kept == said
    twice = import_diffusers(tmp_path / "ours", image_size=32)
    assert twice.config == model.config
    assert same_weights(twice, model)


def test_the_image_size_of_a_file(small_folder, tmp_path):
    path = tmp_path / "model" / "config.json"
    shutil.copytree(small_folder, path.parent)
    plain = json.loads(path.read_text())
    factor = 2 ** (len(plain["block_out_channels"]) - 1)
    # 32 is the default of VQModel's, and so says nothing.
    for said, size in ((512, 512), (128 + factor // 2, 256), (None, 256), (32, 256), (10**8, 256)):
        path.write_text(json.dumps({**plain, "sample_size": said}))
        assert import_diffusers(path.parent).config.image_size == size
    with pytest.raises(ValueError, match=f"image_size 65 is not a multiple of {factor}"):
        import_diffusers(path.parent, image_size=65)


OLD_ATTENTION = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


@pytest.mark.parametrize("form", ["old", "pickled", "sharded"])
def test_other_files_of_diffusers(form, small_folder, tmp_path):
    """Old attention names, a pickle, shards, all in a subfolder: the same model."""
    weights = safetensors.torch.load_file(small_folder / DIFFUSERS_WEIGHTS)
    old = dict(weights)
    for new_part, old_part in OLD_ATTENTION.items():
        old = {name.replace(new_part, old_part): tensor for name, tensor in old.items()}
    assert len(old.keys() - weights.keys()) == 8 * sum(name.endswith("to_q.weight") for name in weights)
    folder = tmp_path / "vqvae"
    folder.mkdir()
    shutil.copy(small_folder / "config.json", folder)
    if form == "old":
        safetensors.torch.save_file(old, folder / DIFFUSERS_WEIGHTS)
    elif form == "pickled":
        torch.save(old, folder / "diffusion_pytorch_model.bin")
    else:
        file = "diffusion_pytorch_model-00001-of-00001.safetensors"
        safetensors.torch.save_file(weights, folder / file)
        index = {"weight_map": dict.fromkeys(weights, file)}
        (folder / f"{DIFFUSERS_WEIGHTS}.index.json").write_text(json.dumps(index))
    model = import_diffusers(tmp_path, image_size=8, subfolder="vqvae")
    assert same_weights(import_diffusers(small_folder, image_size=8), model)
    with pytest.raises(ValueError, match='subfolder="vqvae"'):
        import_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "is of AutoencoderKL, expected VQModel"),
        ({"act_fn": "gelu"}, "got act_fn='gelu', expected 'silu'"),
        ({"down_block_types": ["DownEncoderBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "got 1 up_block_types"),
        ({"magic": 1}, "has magic"),
        ({"norm_num_groups": 24}, "multiples of num_groups, 24"),
        ({"block_out_channels": [32, 32]}, "do not fit its config"),
        ({"norm_type": "spatial"}, "expected latent_channels for spatial norms"),
        ({"layers_per_block": "two"}, "got layers_per_block='two', expected an integer"),
        ({"layers_per_block": 2**60}, "residual blocks in 2 levels need more than [0-9]+ tensors"),
        *(
            ({name: 2**40}, "fit")
            for name in ("latent_channels", "num_vq_embeddings", "vq_embed_dim", "norm_num_groups")
        ),
        ({"block_out_channels": [2**20, 2**20]}, "fit"),
        ({"block_out_channels": [2**60, 2**60]}, "fit"),
        ({"block_out_channels": None}, "got block_out_channels=None, expected a list of integers"),
        ({"sample_size": -1}, "got sample_size=-1, expected pixels along a side"),
        ({"vq_embed_dim": "4"}, "got vq_embed_dim='4', expected an integer or null"),
        ({"scaling_factor": None}, "got scaling_factor=None, expected a number"),
        ({"in_channels": 4, "out_channels": 4}, "does not fit a VQGAN: num_channels must be"),
        ({"block_out_channels": [64] * 10**5}, "got 100,000 block_out_channels, expected at most 20"),
        ({"down_block_types": ["x" * 10**5, "y"]}, "got down_block_types with 'xxx"),
        ({"_class_name": None, "class": [1] * 10**5, "format": 1}, "that this library saved"),
        ({"x" * 10**5: 1}, "which this version does not know"),
        ({"scaling_factor": 10**90}, "got scaling_factor=.* 299 bits, expected a number"),
    ],
)
def test_case_22_configs_of_diffusers_that_are_refused(changes, message, small_folder, tmp_path, monkeypatch):
    """In one short line, and nothing of sizes is built but on torch's device without memory."""
    made = []
    build = VQGAN.Config.build
    monkeypatch.setattr(
        VQGAN.Config, "build", lambda config: made.append(torch.get_default_device().type) or build(config)
    )
    folder = tmp_path / "model"
    shutil.copytree(small_folder, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message) as caught:
        import_diffusers(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(folder), "")) < 500
    assert set(made) <= {"meta"}


def test_folders_of_diffusers_that_are_refused(small_folder, tmp_path):
    weights = safetensors.torch.load_file(small_folder / DIFFUSERS_WEIGHTS)
    fewer = {name: tensor for name, tensor in weights.items() if name != "quant_conv.bias"}
    other = {name: tensor for name, tensor in weights.items() if name != "quantize.embedding.weight"}
    for number, (message, files) in enumerate(
        (
            ("is a pointer of Git LFS", {DIFFUSERS_WEIGHTS: b"version https://git-lfs.github.com/spec/v1\noid x"}),
            ("corrupt or no safetensors", {DIFFUSERS_WEIGHTS: b"nothing of the kind"}),
            ("missing encoder.quant_conv.bias", {DIFFUSERS_WEIGHTS: safetensors.torch.save(fewer)}),
            ("has no quantize.embedding.weight", {DIFFUSERS_WEIGHTS: safetensors.torch.save(other)}),
            ("has no config.json", {"config.json": None}),
            ("has no diffusion_pytorch_model", {DIFFUSERS_WEIGHTS: None}),
            ("it has model.fp16.safetensors. Of variants", {DIFFUSERS_WEIGHTS: None, "model.fp16.safetensors": b""}),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(small_folder, folder)
        for name, data in files.items():
            if data is None:
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            import_diffusers(folder)
    with pytest.raises(ValueError, match="no folder at"):
        import_diffusers(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no revision"):
        import_diffusers(small_folder, revision="main")
    VQVAE.Config(width=8, num_blocks=0).build().save_pretrained(tmp_path / "run" / "codebook")
    with pytest.raises(ValueError, match=r"it has folders with one, codebook, which are of others"):
        import_diffusers(tmp_path / "run")


def test_pickles_are_fetched_where_there_is_nothing_else(small_folder, tmp_path, monkeypatch):
    repository, fetched = tmp_path / "repository", tmp_path / "fetched"
    shutil.copytree(small_folder, repository / "vqvae")
    torch.save(
        safetensors.torch.load_file(small_folder / DIFFUSERS_WEIGHTS),
        repository / "vqvae" / "diffusion_pytorch_model.bin",
    )

    def download(source, patterns, *, revision):
        assert (source, revision) == ("owner/name", "v1")
        for path in (path for pattern in patterns for path in repository.glob(pattern)):
            (fetched / "vqvae").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, fetched / "vqvae")
        return fetched

    monkeypatch.setattr("vqvae.interop.diffusers.download", download)
    plain = import_diffusers(small_folder, image_size=8)
    for weights in (DIFFUSERS_WEIGHTS, "diffusion_pytorch_model.bin"):
        model = import_diffusers("owner/name", image_size=8, revision="v1", subfolder="vqvae")
        assert same_weights(model, plain)
        assert {path.name for path in fetched.rglob("*.*")} == {"config.json", weights}
        (repository / "vqvae" / weights).unlink()
        shutil.rmtree(fetched)


def test_imported_models_are_models(small_folder, tmp_path):
    """Saved, read by the library's own name, and the same; there is nothing to import then."""
    model = import_diffusers(small_folder, image_size=8)
    model.save_pretrained(tmp_path / "saved")
    twin = VQVAE.from_pretrained(tmp_path / "saved")
    assert type(twin) is type(model)
    assert twin.config == model.config
    assert same_weights(twin, model)
    with pytest.raises(ValueError, match="is of a VQGAN that this library saved, so there is nothing to import"):
        import_diffusers(tmp_path / "saved")
