"""What the page can do, without the page: pictures and numbers in, pictures, files and words out."""

import functools
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from priors import AnyOrderPrior, Prior, Sampling
from safefolder import packaged
from safefolder.folder import read_config
from vqvae import VQVAE, Autoencoder
from vqvae.bound import check_fit
from vqvae.cli.common import check_pair, load_test_images
from vqvae.cli.demo.codebook import CodebookViews
from vqvae.cli.demo.coded import Coded, coded
from vqvae.cli.inpainting import Inpainting, read_inpainting
from vqvae.cli.opening import Opened
from vqvae.codec import Codec, Compression
from vqvae.codec.dreaming import bytes_for_an_image, dream, undream
from vqvae.data.decoding import as_array
from vqvae.fingerprint import of_tokenizer

MOST_SAMPLES = 64
MOST_ANSWERS = 8
MOST_TEXT = 20_000
MOST_DREAMS = 8
# Test images in which codes are counted and looked for.
_LOOKED_AT = 1000
_AT_ONCE = 4
# Not by trials, whose findings would be kept in a file of the user's.
_PRECISION = "float32"


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A picture as a file, and what other formats take.

    Attributes:
        data: the file.
        sizes: bytes by the name of the format; None where what writes it is not installed.
        seconds: to write it, and to read it again.
        image: what came back.
        same: whether that is the picture to the last bit.
    """

    data: bytes
    sizes: dict[str, int | None]
    seconds: tuple[float, float]
    image: UInt8[Tensor, "c h w"]
    same: bool


class Service:
    """A tokenizer and its priors, at the service of a page.

    Args:
        source: a run, a model's folder, a hub id, or the name of a packaged model.
        prior: a folder or hub id of the prior; the run's own unless given.
        any_order: of one in any order, for inpainting; the run's own, or the packaged one, where it fits.
        data: images for examples and for the codebook; the run's own unless given.

    Attributes:
        model, prior, any_order: as they were found; `any_order` is None where there is none.
        images: some test images, at the model's size; samples of the prior where the source does not say which images
            it is of.

    Raises:
        ValueError: none there, damaged, or not of a kind that the page can show.
    """

    def __init__(self, source: str, *, prior: str | None = None, any_order: str | None = None, data: str | None = None):
        opened = Opened(source)
        model: Autoencoder = opened.model
        if not isinstance(model, VQVAE) or model.grid != model.feature_grid:
            raise ValueError(
                f"{source} is a {type(model).__name__} with latents of {model.grid}; the page is for tokenizers with "
                "one code at each position of a picture"
            )
        found = opened.prior(prior)
        check_fit(model, found, "prior")
        assert isinstance(found, Prior)
        self.source, self.model, self.prior = source, model, found
        self.any_order = self._any_order(any_order)
        self._data = data
        if data is not None:
            self.images = self._load_images()

    def _any_order(self, named: str | None) -> Prior | None:
        if isinstance(self.prior, AnyOrderPrior) and named is None:
            return self.prior
        if named is not None:
            found: Prior = AnyOrderPrior.from_pretrained(named)
            check_fit(self.model, found, "--any-order")
            check_pair(self.model, found, self.source, named)
            return found
        for name in packaged.names():
            if read_config(packaged.FOLDER / name / "prior")["class"] == AnyOrderPrior.__name__:
                found = AnyOrderPrior.from_pretrained(packaged.FOLDER / name)
                if found.trained_on is not None and found.trained_on.tokenizer == of_tokenizer(self.model):
                    return found
        return None

    def _load_images(self) -> UInt8[Tensor, "b c h w"]:
        images = load_test_images(self.source, self._data, self.model)
        return images[: min(_LOOKED_AT, len(images))].images

    @functools.cached_property
    def images(self) -> UInt8[Tensor, "b c h w"]:
        """Test images; samples of the prior where the source does not say which images it is of."""
        try:
            return self._load_images()
        except ValueError:
            codes = self.prior.sample(_LOOKED_AT // 10, None, Sampling(precision=_PRECISION), _generator(0))
            return self.model.decode(codes)

    @functools.cached_property
    def codebook(self) -> CodebookViews:
        """Codes in these images."""
        return CodebookViews(self.model, self.images, self.model.through(self.prior).encode)

    @functools.cached_property
    def codec(self) -> Codec:
        """Of the model and its prior."""
        return Codec(self.model, self.prior)

    @property
    def class_names(self) -> list[str]:
        """The names of the prior's classes, or their numbers; none of an unconditional prior."""
        names = self.prior.class_names
        return list(names) if names is not None else [str(i) for i in range(self.prior.num_classes or 0)]

    def coded(
        self,
        image: UInt8[Tensor, "c h w"],
        codes: Tensor | None = None,
        watch: Callable[[int, int], object] | None = None,
    ) -> Coded:
        """A picture of any size through the model; see `coded`."""
        return coded(self.model, self.prior, image, codes, watch)

    def exchanged(self, found: Coded, position: tuple[int, int], code: int) -> Coded:
        """The same picture with another code at a position.

        Raises:
            ValueError: no such code or position.
        """
        if not 0 <= code < self.model.num_codes:
            raise ValueError(f"got code {code}, expected one of 0 to {self.model.num_codes - 1:,}")
        rows, columns = found.codes.shape
        if not (0 <= position[0] < rows and 0 <= position[1] < columns):
            raise ValueError(f"got position {position}, expected one of a grid of {rows} by {columns}")
        codes = found.codes.clone()
        codes[position] = code
        return self.coded(found.image, codes)

    def sample(
        self, num: int, label: int | None, sampling: Sampling, seed: int, *, in_any_order: bool = False
    ) -> Iterator[tuple[Int[Tensor, "b h w"], UInt8[Tensor, "b c h w"]]]:
        """Codes and images, block by block as they are finished.

        Raises:
            ValueError: options that do not fit the prior, or too many images.
        """
        if not 1 <= num <= MOST_SAMPLES:
            raise ValueError(f"got {num} images, expected 1 to {MOST_SAMPLES}")
        prior, generator = self._in_order(in_any_order), _generator(seed)
        for start in range(0, num, _AT_ONCE):
            part = min(_AT_ONCE, num - start)
            codes = prior.sample(part, label, replace(sampling, precision=_PRECISION), generator)
            yield codes, self.model.decode(codes)

    def _in_order(self, in_any_order: bool) -> Prior:
        if not in_any_order:
            return self.prior
        if self.any_order is None:
            raise ValueError("there is no prior in any order here; start the page with --any-order, see vqvae demo -h")
        return self.any_order

    def inpainting(self, image: Path, mask: Path) -> Inpainting:
        """A picture file and the file of its mask, white where to sample anew.

        Raises:
            ValueError: there is no prior in any order here, or nothing is masked.
        """
        self._in_order(True)
        return read_inpainting(image, mask, self.model, self.model.through(self.prior).encode)

    def inpaint(self, hole: Inpainting, num: int, label: int | None, seed: int) -> Iterator[UInt8[Tensor, "c h w"]]:
        """Several answers to what might be under a mask, one after the other.

        Raises:
            ValueError: too many, or a class or a seed that is none.
        """
        prior = self._in_order(True)
        if not 1 <= num <= MOST_ANSWERS:
            raise ValueError(f"got {num} answers, expected 1 to {MOST_ANSWERS}")
        generator = _generator(seed)
        for _ in range(num):
            known = hole.given(1)
            options = Sampling(precision=_PRECISION)
            codes = prior.sample(1, label, options, generator, given=known["given"], mask=known["mask"])
            yield hole.put_back(self.model.decode(codes))[0]

    def compress(self, image: UInt8[Tensor, "c h w"]) -> Compressed:
        """A picture as a file, read again."""
        start = time.perf_counter()
        data = self.codec.compress([image], options=Compression())
        written = time.perf_counter()
        again = self.decompress(data)
        seconds = (written - start, time.perf_counter() - written)
        sizes: dict[str, int | None] = {"this model": len(data), **_others(image)}
        same = len(again) == 1 and torch.equal(again[0], image)
        return Compressed(data=data, sizes=sizes, seconds=seconds, image=again[0], same=same)

    def decompress(self, data: bytes) -> list[UInt8[Tensor, "c h w"]]:
        """The images of a file.

        Raises:
            ValueError: it is no such file, damaged, or of another model.
        """
        return list(self.codec.decompress(data))

    def dream(
        self, text: str, num: int, watch: Callable[[], object] | None = None
    ) -> tuple[UInt8[Tensor, "b c h w"], int, bool]:
        """Images whose file a text is, how many of its bytes they took, and whether they give the text again.

        The text is said again and again until it has enough bytes for an image.

        Raises:
            ValueError: no text, or a long one.
        """
        said = text.encode("utf-8", "replace")
        if not said.strip():
            raise ValueError("there is no text yet: type some words")
        if len(said) > MOST_TEXT:
            raise ValueError(f"the text has {len(said):,} bytes, expected at most {MOST_TEXT:,}")
        needed = bytes_for_an_image(self.codec) + 16
        data = said * max(1, -(-needed // len(said)))
        found = dream(self.codec, data, max(1, min(num, MOST_DREAMS)), watch)
        return found.images, len(data) - len(found.left), undream(self.codec, found) == data


def as_picture(image: UInt8[Tensor, "c h w"]) -> Image.Image:
    """An image as Pillow has it."""
    return Image.fromarray(as_array(image.cpu()))


def _generator(seed: int) -> torch.Generator:
    if not 0 <= seed < 2**32:
        raise ValueError(f"got seed {seed}, expected 0 to {2**32 - 1}")
    return torch.Generator().manual_seed(seed)


def _others(image: UInt8[Tensor, "c h w"]) -> dict[str, int | None]:
    """Bytes of the picture in other formats, all without loss and with the most effort."""
    picture = as_picture(image)

    def written(**how: Any) -> int:
        file = io.BytesIO()
        picture.save(file, **how)
        return file.tell()

    return {
        "PNG": written(format="png", optimize=True),
        "WebP": written(format="webp", lossless=True, quality=100, method=6),
        "JPEG-XL": _jpegxl(as_array(image)),
    }


def _jpegxl(pixels: np.ndarray) -> int | None:
    try:
        import imagecodecs
    except ModuleNotFoundError:
        return None
    return len(imagecodecs.jpegxl_encode(pixels, lossless=True, effort=9, usecontainer=False, numthreads=1))
