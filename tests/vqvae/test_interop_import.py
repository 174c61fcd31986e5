"""Importers: codes and pictures of public tokenizers' layouts, and what is refused."""

import argparse
import json
import shutil

import pytest
import safetensors.torch
import torch
import yaml
from vqgan_references import PUBLISHED, RELEASED, Reference, pictures, published, vq_model

from vqvae import VQVAE
from vqvae.interop.diffusers import export_diffusers, import_diffusers
from vqvae.interop.llamagen import import_llamagen
from vqvae.interop.taming import import_taming
from vqvae.interop.ties import compare_codes
from vqvae.quantizers import GumbelQuantizer, VectorQuantizer

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"


def check_equal(model, images, codes, decode):
    """Codes of the images equal `codes` but for ties, and both decoders give the same picture for them."""
    agreement = compare_codes(model, images, codes)
    assert agreement.num_codes_compared == codes.numel()
    assert agreement.num_wrong == 0
    assert agreement.num_ties <= 1e-3 * codes.numel() + 1
    assert len(codes.unique()) > 8  # else there would be nothing to tell apart
    with torch.no_grad():
        features = model.decoder(model.vectors(codes[:4]))
        theirs = decode(codes[:4])
    assert theirs.std() > 0.05
    torch.testing.assert_close(features, theirs, rtol=0, atol=1e-4)
    assert torch.equal(model.decode(codes[:4]), (127.5 * (1 + features)).round().clamp(0, 255).to(torch.uint8))


def peer_codes(peer, images):
    with torch.no_grad():
        h = peer.encode(images / 127.5 - 1).latents
        return peer.quantize(h)[2][2].reshape(len(h), *h.shape[2:])


def peer_decode(peer, codes):
    with torch.no_grad():
        vectors = peer.quantize.embedding(codes).permute(0, 3, 1, 2)
        quantised = peer.post_quant_conv(vectors)
        return peer.decoder(quantised, vectors if peer.config.norm_type == "spatial" else None)


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vq") / "model"
    vq_model("narrow-codes", shrink=2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RELEASED)
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
@pytest.mark.parametrize("name", RELEASED)
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
    for said, size in ((512, 512), (130, 256), (None, 256)):
        path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": said}))
        assert import_diffusers(path.parent).config.image_size == size
    with pytest.raises(ValueError, match="image_size 66 is not a multiple"):
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
    }.items():
        folder = tmp_path / place / "vqvae"
        folder.mkdir(parents=True)
        shutil.copy(small_folder / "config.json", folder)
        write(folder)
        assert same_weights(import_diffusers(folder, image_size=8), model)
        assert same_weights(import_diffusers(tmp_path / place, image_size=8, subfolder="vqvae"), model)
        with pytest.raises(ValueError, match='subfolder="vqvae"'):
            import_diffusers(tmp_path / place)


def shards(weights, folder):
    places = {}
    for number, part in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        file = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        safetensors.torch.save_file({name: weights[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / f"{DIFFUSERS_WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))


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
        ({"layers_per_block": "two"}, "does not fit a VQGAN"),
    ],
)
def test_configs_of_diffusers_that_are_refused(changes, message, small_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small_folder, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        import_diffusers(folder)


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

    refused("expected files of its own folder", index({"a": "../model.safetensors"}))
    refused("no file at", index({"a": "b.safetensors"}))
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


CH = 32
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
        (params if name in ("n_embed", "embed_dim", "remap") else networks)[name] = value
    return yaml.safe_dump({"model": {"base_learning_rate": 4.5e-6, "target": target, "params": params}})


def taming_file(folder, reference, **others):
    path = folder / "last.ckpt"
    extra = {"loss.perceptual_loss.lin0.model.1.weight": torch.ones(2), "loss.discriminator.main.0.bias": torch.ones(3)}
    torch.save({"epoch": 3, "state_dict": {**reference.weights, **extra}, **others}, path)
    return path


@pytest.mark.parametrize("name", TAMING)
def test_taming(name, tmp_path):
    reference = published(name, CH)
    path = taming_file(tmp_path, reference)
    (tmp_path / "model.yaml").write_text(yaml_of(reference))
    assert import_taming(path).config.image_size == 256
    model = import_taming(path, tmp_path / "model.yaml", image_size=32)
    images = pictures(48, 32)
    check_equal(model, images, reference.codes(reference.encode(images)), reference.decode)
    assert isinstance(model.quantizer, GumbelQuantizer if reference.gumbel else VectorQuantizer)


@pytest.mark.parametrize("name", LLAMAGEN)
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
    with pytest.raises(ValueError, match="do not tell the size of images: give image_size, or config"):
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
        (tmp_path / name).write_text(yaml_of(reference, resolution=64))
    with pytest.raises(ValueError, match=r"has 2 yaml files \(a.yaml, b.yaml\)"):
        import_taming(path)
    (tmp_path / "last.yaml").write_text(yaml_of(reference, resolution=128))
    assert import_taming(path).config.image_size == 128


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
    torch.save([1], tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="has no state_dict of tensors"):
        import_taming(tmp_path / "model.ckpt", image_size=32)
    # Averaged copies are left where they are, and a remap that the config switches off too.
    torch.save({"state_dict": {**own, "model_ema.decay": new, "quantize.used": new}}, tmp_path / "model.ckpt")
    (tmp_path / "model.yaml").write_text(yaml_of(reference, remap=None))
    assert import_taming(tmp_path / "model.ckpt", image_size=32).num_codes == 1024


def test_llamagen_files_that_are_refused(tmp_path):
    path = tmp_path / "vq.pt"
    reference = published("llamagen-vq8", CH)
    for held, message in (
        ({"model": {"x": 1}}, "no weights under model"),
        ({"model": {**reference.weights, "encoder.mid.3.norm1.bias": torch.ones(1)}}, "encoder.mid.3.norm1.bias"),
        ({"model": {"quant_conv.bias": torch.ones(1)}}, "has no quantize.embedding.weight"),
    ):
        torch.save(held, path)
        with pytest.raises(ValueError, match=message):
            import_llamagen(path)


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
