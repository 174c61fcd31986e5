"""Folders of an exported tokenizer: two programs that were checked against the model, and how to call them.

    FOLDER/encoder.SUFFIX     images, uint8 "b c h w"   ->  codes, int64 "b *grid"
    FOLDER/decoder.SUFFIX     codes, int64 "b *grid"    ->  images, uint8 "b c h w"
    FOLDER/tokenizer.json     sizes, the model's fingerprint, and how to call the two

What was written is read again and must give the model's own codes (but for ties, `vqvae.interop.code_agreement`) and
pixels for batches of several sizes; only then does it take the folder's place. The judge is a copy of the model on the
CPU, in full float32, wherever the model is: what another device rounds otherwise says nothing of the files.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

import safefolder
from vqvae import fingerprint
from vqvae.interop.code_agreement import compare_codes, count_wrong_pixels
from vqvae.interop.precision import without_autocast
from vqvae.interop.traced import CodesToImages, ImagesToCodes, check_exportable
from vqvae.model import VQVAE

FORMAT = 1
INFO_NAME = "tokenizer.json"
PARTS = ("encoder", "decoder")
# Batches of the check: another size than the traced one, and a single image, which some tools take for a constant.
CHECKED_BATCHES = (1, 3)
TRACED_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Program:
    """One of the two graphs, and what it is traced with.

    Attributes:
        input, output: names of the tensors.
        example: an input of `TRACED_BATCH` images.
        metadata: for the file, where its format has a place for it.
    """

    module: nn.Module
    input: str
    output: str
    example: Tensor
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Form:
    """A kind of file.

    Attributes:
        name: what people call it.
        suffix: of its files.
        usage: lines of Python that call it.
        beside: what may follow the suffix in further names of files.
        save: writes a program to a path, which may get further files of its name beside it.
        load: reads a path as a function.
    """

    name: str
    suffix: str
    usage: str
    beside: tuple[str, ...]
    save: Callable[[Program, Path], None]
    load: Callable[[Path], Callable[[Tensor], Tensor]]


def write_folder(model: VQVAE, folder: Path, form: Form) -> None:
    """Write both programs and `tokenizer.json`, all or none; an earlier export of the same form is replaced.

    Raises:
        ValueError: a model that has no such graph, a folder with other files in it, a disk that is full, or programs
            that do not give what the model gives. What was there before is untouched.
    """
    names = [INFO_NAME, *(f"{part}{form.suffix}{rest}" for part in PARTS for rest in ("", *form.beside))]
    check_exportable(model)
    with safefolder.files.replacing_folder(folder, names) as scratch, without_autocast():
        judge = copy.deepcopy(model).cpu()
        # In torch's plain layout: `torch.export.save` takes others for parts of larger tensors.
        encoder, decoder = (
            part.to(memory_format=torch.contiguous_format) for part in (ImagesToCodes(judge), CodesToImages(judge))
        )
        info = _info(model, form)
        metadata = {key: json.dumps(info[key]) for key in ("grid", "num_codes", "image_size", "num_channels")}
        metadata["fingerprint"] = info["fingerprint"]
        images = _check_images(judge, TRACED_BATCH)
        parts = {
            "encoder": Program(module=encoder, input="images", output="codes", example=images, metadata=metadata),
            "decoder": Program(
                module=decoder, input="codes", output="images", example=judge.encode(images), metadata=metadata
            ),
        }
        for name, program in parts.items():
            form.save(program, scratch / f"{name}{form.suffix}")
        (scratch / INFO_NAME).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        encode, decode = (form.load(scratch / f"{name}{form.suffix}") for name in parts)
        for num in CHECKED_BATCHES:
            _check(judge, form.name, encode, decode, num)


def _info(model: VQVAE, form: Form) -> dict[str, Any]:
    size, num_channels = model.config.image_size, model.config.num_channels
    images = {"name": "images", "dtype": "uint8", "shape": ["batch", num_channels, *model.size]}
    codes = {"name": "codes", "dtype": "int64", "shape": ["batch", *model.grid]}
    return {
        "format": FORMAT,
        "form": form.name,
        "grid": list(model.grid),
        "num_codes": model.num_codes,
        "image_size": size,
        "num_channels": num_channels,
        "fingerprint": fingerprint.of_tokenizer(model),
        "encoder": {"file": f"encoder{form.suffix}", "input": images, "output": codes},
        "decoder": {"file": f"decoder{form.suffix}", "input": codes, "output": images},
        "usage": form.usage.strip().splitlines(),
    }


def _check_images(model: VQVAE, num: int) -> UInt8[Tensor, "b c h w"]:
    """Noise, from fine to coarse."""
    generator = torch.Generator().manual_seed(num)
    pictures = []
    for index in range(num):
        sides = [max(1, side >> index) for side in model.size]
        noise = torch.randint(256, (1, model.config.num_channels, *sides), generator=generator)
        pictures.append(nn.functional.interpolate(noise.float(), size=model.size, mode="bilinear"))
    return torch.cat(pictures).round().to(torch.uint8)


def _check(
    model: VQVAE, form: str, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], num: int
) -> None:
    images = _check_images(model, num)
    agreement = compare_codes(model, images, encode(images))
    if agreement.num_wrong:
        raise ValueError(
            f"the encoder as {form} gives {agreement.num_wrong} of {agreement.num_codes_compared} codes that are not "
            "the model's, and that no tie of two codes explains; nothing was written"
        )
    drawn = torch.randint(model.num_codes, (num, *model.grid), generator=torch.Generator().manual_seed(num))
    for codes in (model.encode(images), drawn):
        _, num_wrong = count_wrong_pixels(model, codes, decode(codes))
        if num_wrong:
            raise ValueError(
                f"the decoder as {form} gives {num_wrong} of {images.numel()} pixels that are not the model's; "
                "nothing was written"
            )
