"""Small models for exports and comparisons, and checks of codes, pictures and what files must not hold."""

import copy
import functools
import io
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizer_worlds import MEMBERS, trained
from torch import Tensor, nn

import vqvae
from vqvae import VQVAE
from vqvae.interop import compare_codes, export_onnx, export_program
from vqvae.interop.code_agreement import count_wrong_pixels
from vqvae.likelihoods import Categorical, LocalContext, LogisticMixture, Normal
from vqvae.quantizers import VectorQuantizer
from vqvae.vqgan import VQGAN

FORMS = {"program": export_program, "onnx": export_onnx}
LIKELIHOODS = {
    "normal": Normal.Config(),
    "mixture": LogisticMixture.Config(num_components=2),
    "mixture with zero": LogisticMixture.Config(num_components=2, zero_component=True),
    "context": LocalContext.Config(num_components=2, width=4, num_blocks=1),
    "categorical": Categorical.Config(),
}


@functools.cache
def _made(quantizer: str, likelihood: str, num_channels: int, large: bool) -> VQVAE:
    torch.manual_seed(0)
    model = VQVAE(
        image_size=20 if large else 5,
        num_channels=num_channels,
        width=32 if large else 4,
        downsampling=4 if large else 1,
        num_blocks=1 if large else 0,
        attention=large,
        smooth=large,
        quantizer=MEMBERS[quantizer].config,
        likelihood=LIKELIHOODS[likelihood],
    )
    model.quantizer = trained(quantizer)
    return shaken(model).eval()


def shaken(model: VQVAE) -> VQVAE:
    """With weights that make something of an image; fresh ones are the identity here and zero there."""
    for part in (model.encoder, model.decoder):
        for weight in part.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=1.4 / weight[0].numel() ** 0.5)
    return model


def make(quantizer: str = "ema", likelihood: str = "normal", num_channels: int = 1, large: bool = False) -> VQVAE:
    """A model of the member with 5 x 5 positions; a large one has all parts of the networks."""
    return copy.deepcopy(_made(quantizer, likelihood, num_channels, large))


def vqgan(channels: tuple[int, ...] = (32,), **options: Any) -> VQGAN:
    torch.manual_seed(0)
    quantizer = VectorQuantizer.Config(num_codes=16, dim=4)
    sizes = {"image_size": 8, "channels": channels, "num_blocks": 1, "latent_channels": 4}
    return VQGAN.Config(**sizes, quantizer=quantizer, **options).build().eval()


def noise(model: VQVAE, num: int, seed: int = 0) -> Tensor:
    size = model.config.image_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num, model.config.num_channels, size, size), generator=generator).to(torch.uint8)


def drawn_codes(model: VQVAE, num: int) -> Tensor:
    return torch.randint(model.num_codes, (num, *model.grid), generator=torch.Generator().manual_seed(num))


def check_codes(model: VQVAE, images: Tensor, codes: Tensor) -> None:
    assert codes.dtype == torch.int64
    agreement = compare_codes(model, images, codes)
    assert agreement.num_wrong == 0
    assert agreement.num_ties <= 1
    assert agreement.num_equal + agreement.num_ties == codes.numel()


def check_images(model: VQVAE, codes: Tensor, images: Tensor) -> None:
    assert images.dtype == torch.uint8
    assert images.shape[1:] == (model.config.num_channels, model.config.image_size, model.config.image_size)
    num_other, num_wrong = count_wrong_pixels(model, codes, images)
    assert num_wrong == 0
    assert num_other <= 1 + images.numel() // 1000
    assert (images.int() - model.decode(codes).int()).abs().amax() <= 1


def load(form: str, folder: Path) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Encoder and decoder, as somebody without this library calls them."""
    if form == "program":
        encode, decode = (torch.export.load(folder / f"{part}.pt2").module() for part in ("encoder", "decoder"))
        return encode, decode

    onnxruntime = pytest.importorskip("onnxruntime")
    sessions = [
        onnxruntime.InferenceSession(folder / f"{part}.onnx", providers=["CPUExecutionProvider"])
        for part in ("encoder", "decoder")
    ]
    return (
        lambda images: torch.from_numpy(sessions[0].run(["codes"], {"images": images.numpy()})[0]),
        lambda codes: torch.from_numpy(sessions[1].run(["images"], {"codes": codes.numpy()})[0]),
    )


def check_export(model: VQVAE, form: str, folder: Path, empty: bool = True) -> None:
    """Both programs against the model, in batches of several sizes, of none too unless told otherwise."""
    FORMS[form](model, folder)
    encode, decode = load(form, folder)
    for num in (1, 2, 5):
        images = noise(model, num)
        check_codes(model, images, encode(images))
        codes = drawn_codes(model, num)
        check_images(model, codes, decode(codes))
    if empty:
        assert encode(noise(model, 0)).shape == (0, *model.grid)
        assert decode(drawn_codes(model, 0)).shape == noise(model, 0).shape


def names_no_place(folder: Path) -> None:
    """No byte of any file of an export tells where it was written, or by what."""
    homes = {Path.home(), Path(sys.prefix), Path(sys.base_prefix), Path.cwd(), Path(vqvae.__file__).parents[1], folder}
    places = {f"{place}/" for place in {*homes, folder.parent, Path(tempfile.gettempdir())}}
    places |= {"site-packages", "/home/", "/Users/", "/usr/", f"/{Path.home().name}/", "traced.py"}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 2
    for path in files:
        for part, data in contents(path.name, path.read_bytes()):
            for place in places - {"//"}:
                assert place.encode() not in data, (part, place)
                assert place.encode("utf-16-le") not in data, (part, place)


def contents(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """What a file holds, and, where it is a zip, what its members hold, and so on."""
    yield name, data
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from contents(f"{name}/{member}", archive.read(member))
