"""Files of bits, folders, tokenized sets, exports and figures of the eye by models that are on a GPU."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from codec_worlds import images_of, model_of, model_with_posterior, transformer_of, unigram_of
from device_worlds import CUDA, DEVICES, check_same_there, there
from token_worlds import tokenize, tokenizer
from torch import Tensor

from priors import TransformerPrior
from vqvae import VQVAE
from vqvae.codec import Codec, Compression, Mode
from vqvae.data import ImageTensors
from vqvae.interop import compare_codes, export_program
from vqvae.looks import (
    EfficientNetLite,
    LooksMeter,
    PerceptualDistance,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from vqvae.looks.discriminator import PatchDiscriminator, augmented
from vqvae.tokens.pipeline import Timings

CODED = {
    Mode.LOSSLESS: lambda: (model_of(), transformer_of(model_of(), num_classes=2)),
    Mode.LOSSY: lambda: (model_of(), transformer_of(model_of(), num_classes=2)),
    Mode.BITS_BACK: lambda: (model_with_posterior("gumbel"), unigram_of(model_with_posterior("gumbel"))),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", CODED, ids=lambda mode: mode.name.lower())
def test_a_file_is_read_on_either_side(mode, device):
    """Of a model that was on the other device, and of a prior that is; what comes out are images on the CPU."""
    model, prior = CODED[mode]()
    images, options = images_of(model, 6), Compression(mode=mode, images_per_block=4)
    labels = None if prior.num_classes is None else torch.arange(6) % 2
    here = Codec(model, prior)
    data = here.compress(images, labels, options)
    want = here.decompress(data)
    with there(device):
        codec = Codec(copy.deepcopy(model).to(CUDA), prior)
        assert codec.fingerprint == here.fingerprint
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # also of a block that did not come back
            other = codec.compress(images.to(CUDA), labels, options)
        found = codec.decompress(data)
        assert found.device.type == "cpu"
        assert codec.measure(images, labels).total.device.type == "cpu"
    assert torch.equal(found, want)
    assert torch.equal(here.decompress(other), want)
    if mode != Mode.BITS_BACK:  # whose posterior is drawn from by bits, from numbers that a GPU rounds otherwise
        assert other == data


@pytest.mark.parametrize("device", DEVICES)
def test_a_folder_is_that_of_the_cpu(device, tmp_path: Path):
    model = tokenizer()
    model.save_pretrained(tmp_path / "here")
    with there(device):
        copy.deepcopy(model).to(CUDA).save_pretrained(tmp_path / "there")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert VQVAE.from_pretrained(tmp_path / "there").quantizer.device.type == "cpu"


@pytest.mark.parametrize("timed", [False, True], ids=["plain", "timed"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_tokenized_set_is_that_of_the_cpu(device, timed, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    images = ImageTensors(torch.randint(256, (22, 3, 8, 8), dtype=torch.uint8, generator=generator))
    model = tokenizer()
    tokenize(images, tmp_path / "here", model)
    timings = Timings() if timed else None
    with there(device):
        tokenize(images, tmp_path / "there", copy.deepcopy(model).to(CUDA), timings=timings)
    files = sorted(path.name for path in (tmp_path / "here").glob("*.safetensors"))
    assert len(files) == 3
    assert all((tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes() for name in files)
    if timings is not None:
        assert min(timings.transfer, timings.network, timings.search) > 0


@pytest.mark.parametrize("device", DEVICES)
def test_codes_are_compared_on_either_device(device):
    """As every export is held against its model, which stays where it is."""
    model = tokenizer()
    images = torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    codes = model.encode(images)
    wrong = (codes + 1) % model.num_codes
    with there(device):
        moved = copy.deepcopy(model).to(CUDA)
        assert compare_codes(moved, images.to(CUDA), codes).num_wrong == 0
        assert compare_codes(moved, images.to(CUDA), wrong.to(CUDA)).num_wrong > 0


@pytest.mark.cuda
@pytest.mark.parametrize("export", ["program", "onnx"])
def test_an_export_is_made_of_a_model_on_a_gpu(export, tmp_path: Path):
    model = tokenizer().cuda()
    if export == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
        from vqvae.interop import export_onnx

        export_onnx(model, tmp_path / "out")
    else:
        export_program(model, tmp_path / "out")
    assert next(model.parameters()).is_cuda
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("device", DEVICES)
def test_figures_of_the_eye_are_those_of_the_cpu(device):
    network = EfficientNetLite(size=0)
    images = torch.randint(256, (6, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = torch.randint(-20, 20, images.shape, generator=torch.Generator().manual_seed(1))
    others = (images + noise).clamp(0, 255).to(torch.uint8)

    def run(place: torch.device) -> list[Tensor]:
        net, levels, shown = copy.deepcopy(network).to(place), images.to(place), others.to(place)
        distance = PerceptualDistance(net).to(place)
        given = (shown.float() / 255).requires_grad_()
        apart = distance(levels.float() / 255, given)
        apart.sum().backward()
        x, y = net.pooled(levels), net.pooled(shown)
        found = [apart, given.grad, x]
        figures = [frechet_distance(x, y).value, kernel_distance(x, y).value]
        meter = LooksMeter([net], device=place)
        meter.add(images, others)  # as a loader gives them
        figures += [each.value for each in meter.looks().reconstructions.values()]
        assert len(precision_recall(x, y)) == 2
        return [*found, torch.tensor(figures, dtype=torch.float32, device=place)]

    check_same_there(run, device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_discriminator_learns_what_it_learns_on_the_cpu(device):
    torch.manual_seed(0)
    fresh = PatchDiscriminator(num_channels=3, width=8)
    images = torch.rand(4, 3, 24, 24)

    def run(place: torch.device) -> list[Tensor]:
        judge = copy.deepcopy(fresh).to(place)
        torch.manual_seed(1)
        seen = judge(augmented(images.to(place)))
        seen.sum().backward()
        return [seen.detach(), *(each.grad for each in judge.parameters() if each.grad is not None)]

    check_same_there(run, device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_prior_that_was_trained_there_is_saved_and_read_here(device, tmp_path: Path):
    torch.manual_seed(0)
    prior = TransformerPrior(num_codes=5, grid=(2, 2), width=16, depth=1, num_heads=2)
    with there(device):
        moved = copy.deepcopy(prior).to(CUDA)
        optimizer = torch.optim.AdamW(moved.parameters(), lr=0.1)
        (-moved.log_prob(torch.zeros(3, 2, 2, dtype=torch.int64)).mean()).backward()
        optimizer.step()
        moved.save_pretrained(tmp_path / "prior")
        want = {name: each.cpu() for name, each in moved.state_dict().items()}
    found = TransformerPrior.from_pretrained(tmp_path / "prior").state_dict()
    assert all(torch.equal(found[name], each) for name, each in want.items())
    assert not torch.equal(found["logits.weight"], prior.state_dict()["logits.weight"])
