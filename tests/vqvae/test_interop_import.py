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

    peer = vq_model(name, shrink=4)
    peer.save_pretrained(tmp_path / "theirs")
    model = import_diffusers(tmp_path / "theirs", image_size=32)
    images = pictures(64, 32)
    check_equal(model, images, peer_codes(peer, images), lambda codes: peer_decode(peer, codes))
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


@pytest.mark.slow
# Two of them are the same networks.
@pytest.mark.parametrize("name", [name for name in RELEASED if name != "ldm-super-resolution-4x-openimages"])
def test_diffusers_at_full_width(name, tmp_path):
    peer = vq_model(name)
    peer.save_pretrained(tmp_path / "theirs")
    images = pictures(48, 32)
    model = import_diffusers(tmp_path / "theirs", image_size=32)
    check_equal(model, images, peer_codes(peer, images), lambda codes: peer_decode(peer, codes))


@pytest.mark.slow
def test_a_thousand_images(tmp_path):
    peer = vq_model("vq-diffusion-ithq", shrink=4)
    peer.save_pretrained(tmp_path)
    images = pictures(1000, 32)
    codes = torch.cat([peer_codes(peer, part) for part in images.split(50)])
    check_equal(import_diffusers(tmp_path, image_size=32), images, codes, lambda codes: peer_decode(peer, codes))


def test_the_image_size_of_a_file(tmp_path):
    for name, size in (("amused", 256), ("ldm-celebahq", 256)):  # amused says 32, which is VQModel's default
        vq_model(name, shrink=4).save_pretrained(tmp_path / name)
        assert import_diffusers(tmp_path / name).config.image_size == size
    path = tmp_path / "ldm-celebahq" / "config.json"
    for said, size in ((512, 512), (130, 256), (None, 256), (10**8, 256)):
        path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": said}))
        assert import_diffusers(path.parent).config.image_size == size
    with pytest.raises(
        ValueError, match="image_size 66 is not a multiple of 4, by which the networks reduce it, having 3 levels"
    ):
        import_diffusers(path.parent, image_size=66)


def test_other_files_of_diffusers(small_folder, tmp_path):
    """Old attention names, shards, a pickle, a subfolder: the same model."""
    model = import_diffusers(small_folder, image_size=8)
    weights = safetensors.torch.load_file(small_folder / DIFFUSERS_WEIGHTS)
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, tensor in weights.items():
        for new_part, old_part in names.items():
            name = name.replace(new_part, old_part)
        old[name] = tensor
    assert len(old.keys() - weights.keys()) == 8 * sum(name.endswith("to_q.weight") for name in weights)
    for place, write in {
        "old": lambda folder: safetensors.torch.save_file(old, folder / DIFFUSERS_WEIGHTS),
        "pickled": lambda folder: torch.save(old, folder / "diffusion_pytorch_model.bin"),
        "sharded": lambda folder: shards(weights, folder),
        "pickled-shards": lambda folder: shards(weights, folder, "bin"),
    }.items():
        folder = tmp_path / place / "vqvae"
        folder.mkdir(parents=True)
        shutil.copy(small_folder / "config.json", folder)
        write(folder)
        assert same_weights(import_diffusers(folder, image_size=8), model)
        assert same_weights(import_diffusers(tmp_path / place, image_size=8, subfolder="vqvae"), model)
        with pytest.raises(ValueError, match='subfolder="vqvae"'):
            import_diffusers(tmp_path / place)


def shards(weights, folder, ending="safetensors"):
    save = safetensors.torch.save_file if ending == "safetensors" else torch.save
    places = {}
    for number, part in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        file = f"diffusion_pytorch_model-{number:05}-of-00002.{ending}"
        save({name: weights[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / f"diffusion_pytorch_model.{ending}.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "is of AutoencoderKL, expected VQModel"),
        ({"_class_name": "PaellaVQModel"}, "PaellaVQModel"),
        ({"_class_name": None}, "no class of diffusers"),
        ({"act_fn": "gelu"}, "got act_fn='gelu', expected 'silu'"),
        ({"norm_type": "layer"}, "got norm_type='layer'"),
        ({"down_block_types": ["DownEncoderBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "got 1 up_block_types"),
        ({"out_channels": 4}, "got out_channels=4"),
        ({"magic": 1}, "has magic"),
        ({"norm_num_groups": 24}, "multiples of num_groups, 24"),
        ({"block_out_channels": [32, 32]}, "do not fit its config"),
        ({"norm_type": "spatial"}, "expected latent_channels for spatial norms"),
        ({"layers_per_block": "two"}, "got layers_per_block='two', expected an integer"),
        ({"layers_per_block": 1.0}, "got layers_per_block=1.0, expected an integer"),
        ({"layers_per_block": 10**12}, "residual blocks in 2 levels need more than [0-9]+ tensors"),
        ({"layers_per_block": True}, "got layers_per_block=True"),
        ({"block_out_channels": None}, "got block_out_channels=None, expected a list of integers"),
        ({"block_out_channels": 64}, "got block_out_channels=64"),
        ({"block_out_channels": [32, 10**7 * 32]}, "do not fit its config"),
        ({"block_out_channels": [32, 10**30]}, "does not fit a VQGAN"),
        ({"down_block_types": None}, "got down_block_types=None, expected a list of texts"),
        ({"num_vq_embeddings": 1000.0}, "got num_vq_embeddings=1000.0"),
        ({"num_vq_embeddings": 10**12}, "do not fit its config"),
        ({"num_vq_embeddings": 10**19}, "does not fit a VQGAN"),
        ({"num_vq_embeddings": 0}, "does not fit a VQGAN"),
        ({"vq_embed_dim": "4"}, "got vq_embed_dim='4', expected an integer or null"),
        ({"mid_block_add_attention": 1}, "got mid_block_add_attention=1, expected true or false"),
        ({"scaling_factor": None}, "got scaling_factor=None, expected a number"),
        ({"in_channels": 4, "out_channels": 4}, "does not fit a VQGAN: num_channels must be"),
        ({"block_out_channels": [64] * 10**5}, "got 100,000 block_out_channels, expected at most 20"),
        ({"block_out_channels": ["64"] * 10**5}, "expected a list of integers"),
        ({"down_block_types": ["x" * 10**5, "y"]}, "got down_block_types with 'xxx"),
        ({"up_block_types": [[]]}, "got up_block_types="),
        ({"_class_name": "x" * 10**5}, "is of xxx"),
        ({"_class_name": ["VQModel"] * 10**4}, "is of "),
        ({"_class_name": None, "class": [1] * 10**5, "format": 1}, "that this library saved"),
        ({"x" * 10**5: 1}, "which this version does not know"),
        ({"act_fn": ["silu"] * 10**5}, "got act_fn="),
        ({"sample_size": "28"}, "got sample_size='28', expected an integer or null"),
        ({"sample_size": -1}, "got sample_size=-1, expected pixels along a side"),
        ({"sample_size": 0}, "got sample_size=0"),
        ({"sample_size": [28]}, "got sample_size="),
        ({"scaling_factor": 10**90}, "got scaling_factor=1000.*, expected a number"),
        ({"scaling_factor": float("nan")}, "has the number NaN, expected finite numbers"),
        ({"latent_channels": -(10**18)}, "does not fit a VQGAN"),
        ({"norm_num_groups": 0}, "does not fit a VQGAN"),
        ({"norm_num_groups": 10**18}, "does not fit a VQGAN"),
        ({"in_channels": [3]}, "got in_channels="),
        ({"num_vq_embeddings": 10**99}, "does not fit a VQGAN"),
        ({"layers_per_block": 10**10**2 - 1}, "cannot be read as JSON: .* 100 digits|residual blocks in 2 levels"),
    ],
)
def test_case_22_configs_of_diffusers_that_are_refused(changes, message, small_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small_folder, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message) as caught:
        import_diffusers(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(folder), "")) < 500


def test_case_22_sizes_are_held_against_the_weights_before_memory_is_asked_for(small_folder, tmp_path, monkeypatch):
    """Each size alone, as large as an address goes: nothing of it is built but on torch's device without memory."""
    folder = tmp_path / "model"
    shutil.copytree(small_folder, folder)
    plain = json.loads((small_folder / "config.json").read_text())
    made = []
    build = VQGAN.Config.build

    def noted(config):
        made.append(torch.get_default_device().type)
        return build(config)

    monkeypatch.setattr(VQGAN.Config, "build", noted)
    for name in ("latent_channels", "num_vq_embeddings", "vq_embed_dim", "norm_num_groups", "layers_per_block"):
        for value in (10**6, 10**9, 10**12, 2**62):
            (folder / "config.json").write_text(json.dumps({**plain, name: value}))
            with pytest.raises(ValueError, match="fit"):
                import_diffusers(folder)
    for value in (2**20, 2**30, 2**40, 2**60):
        (folder / "config.json").write_text(json.dumps({**plain, "block_out_channels": [value, value]}))
        with pytest.raises(ValueError, match="fit"):
            import_diffusers(folder)
    assert set(made) == {"meta"}


def test_folders_of_diffusers_that_are_refused(small_folder, tmp_path):
    def refused(message, change):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(small_folder, folder)
        change(folder)
        with pytest.raises(ValueError, match=message):
            import_diffusers(folder)

    def put(name, data):
        return lambda folder: (folder / name).write_bytes(data)

    refused("is a pointer of Git LFS", put(DIFFUSERS_WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid x"))
    refused("corrupt or no safetensors", put(DIFFUSERS_WEIGHTS, b"nothing of the kind"))
    refused("is empty", put(DIFFUSERS_WEIGHTS, b""))
    refused("cannot be read as JSON", put("config.json", b"{"))
    refused("holds a list", put("config.json", b"[]"))
    refused("has no diffusion_pytorch_model", lambda folder: (folder / DIFFUSERS_WEIGHTS).unlink())
    refused("has no config.json", lambda folder: (folder / "config.json").unlink())

    def index(places):
        def change(folder):
            (folder / DIFFUSERS_WEIGHTS).unlink()
            (folder / f"{DIFFUSERS_WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))

        return change

    refused("expected .safetensors files of this folder", index({"a": "../model.safetensors"}))
    refused("missing b.safetensors", index({"a": "b.safetensors"}))
    refused("no 'weight_map' from names", index({"a": 1}))
    refused("no 'weight_map' from names", index({"a": ["x"]}))
    refused("cannot be read as JSON", put("config.json", b"\xff\xfe{"))

    def variant(folder):
        (folder / DIFFUSERS_WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")

    refused("it has diffusion_pytorch_model.fp16.safetensors. Of variants .* none is read", variant)
    weights = safetensors.torch.load_file(small_folder / DIFFUSERS_WEIGHTS)

    def keep(change):
        altered = dict(weights)
        change(altered)
        return lambda folder: safetensors.torch.save_file(altered, folder / DIFFUSERS_WEIGHTS)

    refused("has no quantize.embedding.weight", keep(lambda each: each.pop("quantize.embedding.weight")))
    refused("missing encoder.quant_conv.bias", keep(lambda each: each.pop("quant_conv.bias")))
    refused("unknown extra", keep(lambda each: each.update(extra=torch.zeros(1))))
    with pytest.raises(ValueError, match="no folder at"):
        import_diffusers(tmp_path / "absent")
    with pytest.raises(ValueError, match="has no revision"):
        import_diffusers(small_folder, revision="main")
    VQVAE.Config(width=8, num_blocks=0).build().save_pretrained(tmp_path / "run" / "codebook")
    with pytest.raises(
        ValueError, match=r"has no config\.json, .*; it has folders with one, codebook, which are of others"
    ):
        import_diffusers(tmp_path / "run")


def test_what_is_ours_already_is_said_to_be(small_folder, tmp_path):
    import_diffusers(small_folder, image_size=8).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="is of a VQGAN that this library saved, so there is nothing to import"):
        import_diffusers(tmp_path / "saved")


def test_pickles_are_fetched_where_there_is_nothing_else(small_folder, tmp_path, monkeypatch):
    weights = safetensors.torch.load_file(small_folder / DIFFUSERS_WEIGHTS)
    repository = tmp_path / "repository"
    shutil.copytree(small_folder, repository / "vqvae")
    torch.save(weights, repository / "vqvae" / "diffusion_pytorch_model.bin")
    fetched = tmp_path / "fetched"
    asked = []

    def download(source, patterns, *, revision):
        assert (source, revision) == ("owner/name", "v1")
        for pattern in patterns:
            for path in repository.glob(pattern):
                (fetched / "vqvae").mkdir(parents=True, exist_ok=True)
                shutil.copy(path, fetched / "vqvae")
                asked.append(path.name)
        return fetched

    monkeypatch.setattr("vqvae.interop.diffusers.download", download)
    model = import_diffusers("owner/name", image_size=8, revision="v1", subfolder="vqvae")
    assert sorted(asked) == ["config.json", DIFFUSERS_WEIGHTS]
    (repository / "vqvae" / DIFFUSERS_WEIGHTS).unlink()
    shutil.rmtree(fetched)
    asked.clear()
    assert same_weights(import_diffusers("owner/name", image_size=8, revision="v1", subfolder="vqvae"), model)
    assert set(asked) == {"config.json", "diffusion_pytorch_model.bin"}


def test_imported_models_are_models(small_folder, tmp_path):
    """Saved, read by the library's own name, and the same."""
    model = import_diffusers(small_folder, image_size=8)
    model.save_pretrained(tmp_path / "saved")
    twin = VQVAE.from_pretrained(tmp_path / "saved")
    assert type(twin) is type(model)
    assert twin.config == model.config
    assert same_weights(twin, model)
    export_diffusers(twin, tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["_class_name"] == "VQModel"
