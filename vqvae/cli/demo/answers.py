"""What each button of the page does: files, numbers and words in, pictures, files and words out.

Whatever goes wrong is told in words on the page, which lives on.
"""

import functools
import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from priors import Sampling
from vqvae.cli.demo import maps
from vqvae.cli.demo.coded import Coded
from vqvae.cli.demo.service import MOST_SAMPLES, Service
from vqvae.cli.demo.uploads import MOST_BYTES, read_picture

ANY_CLASS = "any"
# What sliders and fields give.
Number = int | float
_TILE = 140


def in_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose errors are told on the page, without a stack of calls."""

    def told(error: Exception) -> gr.Error:
        foreseen = isinstance(error, ValueError | OSError)
        text = str(error) if foreseen else f"this went wrong here, and is a fault: {type(error).__name__}: {error}"
        return gr.Error(text[:500], print_exception=False)

    if inspect.isgeneratorfunction(inspect.unwrap(function)):

        @functools.wraps(function)
        def each(*args: Any, **options: Any) -> Iterator[Any]:
            try:
                yield from function(*args, **options)
            except gr.Error:
                raise
            except Exception as error:
                raise told(error) from None

        return each

    @functools.wraps(function)
    def once(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except gr.Error:
            raise
        except Exception as error:
            raise told(error) from None

    return once


class Answers:
    """What a page answers.

    Args:
        service: what it shows.
        folder: for the files that it makes; whoever gave it removes it.
    """

    def __init__(self, service: Service, folder: Path):
        self.service, self.folder = service, folder

    @in_words
    def reconstruct(
        self, path: str | None, resize: bool = True, progress: gr.Progress = gr.Progress()
    ) -> tuple[Any, ...]:
        """A picture file, and whether to fit it to the model's size, to five pictures and what they cost, in words."""
        image = self._read(path, resize)
        found = self.service.coded(image, watch=lambda done, of: progress((done, of), unit="tiles"))
        return (
            maps.enlarged(found.decoded),
            maps.difference(found.image, found.decoded),
            maps.code_map(found.codes, self.service.model.num_codes),
            maps.heat(found.code_bits),
            maps.heat(found.pixel_bits),
            said(found),
        )

    @in_words
    def sample(
        self,
        label: str = ANY_CLASS,
        num: Number = 8,
        seed: Number | None = 0,
        temperature: Number = 1.0,
        guidance: Number = 1.0,
        top_k: Number = 0,
        top_p: Number = 1.0,
        in_any_order: bool = False,
        num_steps: Number = 16,
        progress: gr.Progress = gr.Progress(),
    ) -> Iterator[tuple[Any, Any]]:
        """Class and options to images as they are finished, and at the end a file of their codes."""
        index = self._class(label)
        if guidance != 1 and index is None:
            raise ValueError("guidance leads towards a class: choose one, or set guidance to 1")
        sampling = Sampling(
            temperature=temperature,
            top_k=int(top_k) or None,
            top_p=None if top_p == 1 else top_p,
            guidance=None if guidance == 1 else guidance,
            num_steps=min(int(num_steps), int(np.prod(self.service.model.grid))) if in_any_order else None,
        )
        found: list[Any] = []
        codes: list[np.ndarray] = []
        seed = _whole(seed, "a seed")
        for grids, images in self.service.sample(int(num), index, sampling, seed, in_any_order=in_any_order):
            codes.append(grids.numpy())
            found += [self._picture(image, _TILE) for image in images]
            progress((len(found), int(num)), unit="images")
            yield found, None
        path = self.file("codes.npy")
        np.save(path, np.concatenate(codes))
        yield found, str(path)

    @in_words
    def inpaint(
        self,
        value: dict[str, Any] | None,
        label: str = ANY_CLASS,
        num: Number = 4,
        seed: Number | None = 0,
        progress: gr.Progress = gr.Progress(),
    ) -> Iterator[list[Any]]:
        """A picture with a layer painted over it to several answers."""
        background = (value or {}).get("background")
        if value is None or background is None:
            raise ValueError("there is no picture yet: drop one, or click an example")
        mask = np.zeros((background.height, background.width), dtype=bool)
        for layer in value["layers"]:
            alpha = np.asarray(layer.convert("RGBA"))[..., 3] > 0
            if alpha.shape != mask.shape:
                raise ValueError(
                    f"the mask is of {alpha.shape[1]}x{alpha.shape[0]} pixels, expected the picture's "
                    f"{mask.shape[1]}x{mask.shape[0]}"
                )
            mask |= alpha
        if not mask.any():
            raise ValueError("nothing is painted: paint over what is to be made anew")
        under, over = self.file("picture.png"), self.file("mask.png")
        background.convert("RGB").save(under)
        Image.fromarray(mask.astype(np.uint8) * 255).save(over)
        hole = self.service.inpainting(under, over)
        found: list[Any] = []
        for image in self.service.inpaint(hole, int(num), self._class(label), _whole(seed, "a seed")):
            found.append(self._picture(image, 2 * _TILE))
            progress((len(found), int(num)), unit="answers")
            yield found

    @in_words
    def compress(self, path: str | None, resize: bool = True) -> tuple[str, str, Any]:
        """A picture file to a file of bits, what others take, and what it decodes to."""
        found = self.service.compress(self._read(path, resize))
        file = self.file("picture.vq")
        file.write_bytes(found.data)
        least = min(size for size in found.sizes.values() if size is not None)
        rows = "".join(
            f"| {name} | {'not installed' if size is None else f'{size:,}'} | "
            f"{'' if size is None else f'{size / least:.2f}'} |\n"
            for name, size in found.sizes.items()
        )
        same = "equal to the last bit" if found.same else "**not** the same: please report this"
        written, read = found.seconds
        return (
            str(file),
            f"| {size_of(found.image)}, without loss | bytes | times the least |\n|---|---:|---:|\n{rows}\n"
            f"Written in {written:.1f} s, read again in {read:.1f} s: {same}. The weights of the model are in none "
            "of these.",
            maps.enlarged(found.image),
        )

    @in_words
    def decompress(self, path: str | None) -> list[Any]:
        """A file of bits to its pictures."""
        if path is None:
            raise ValueError("there is no file yet: drop one, or write one above")
        if Path(path).stat().st_size > MOST_BYTES:
            raise ValueError(f"the file has over {MOST_BYTES >> 20} MB")
        try:
            found = self.service.decompress(Path(path).read_bytes())
        except ValueError as error:  # which names a function that mends some files, and is not on the page
            raise ValueError(str(error).partition("; recover()")[0]) from error
        return [maps.enlarged(image, _TILE) for image in found[:MOST_SAMPLES]]

    @in_words
    def dream(self, text: str, num: Number = 4, progress: gr.Progress = gr.Progress()) -> tuple[list[Any], str]:
        """A text to the pictures whose file it is."""
        made = itertools.count(1)
        images, used, same = self.service.dream(
            text, int(num), lambda: progress((next(made), int(num)), unit="pictures")
        )
        again = "and encoded again they give the same bytes" if same else "and **do not** give the bytes again"
        return [maps.enlarged(image, _TILE) for image in images], f"The pictures took {used:,} bytes, {again}."

    @in_words
    def open(self, path: str | None) -> tuple[Any, ...]:
        """A picture file to what is remembered of it, what its codes decode to, and what it costs."""
        return self._shown(self.service.coded(self._read(path, True)), None)

    @in_words
    def choose(self, state: tuple[Coded, Any] | None, where: gr.SelectData) -> tuple[Any, ...]:
        """The same with the place marked that was clicked at, and the code there."""
        if state is None:
            raise ValueError("open a picture first")
        coded, (rows, columns) = state[0], state[0].codes.shape
        high, wide = maps.enlarged(coded.decoded).shape[:2]
        x, y = where.index
        position = min(rows - 1, int(y * rows / high)), min(columns - 1, int(x * columns / wide))
        return (*self._shown(coded, position), int(coded.codes[position]))

    @in_words
    def exchange(self, state: tuple[Coded, Any] | None, code: Number | None) -> tuple[Any, ...]:
        """The same with another code at that place."""
        if state is None or state[1] is None:
            raise ValueError("open a picture, and click a place in it first")
        return self._shown(self.service.exchanged(state[0], state[1], _whole(code, "a code")), state[1])

    def _shown(self, coded: Coded, position: tuple[int, int] | None) -> tuple[Any, ...]:
        grid = coded.codes.shape[0], coded.codes.shape[1]
        picture = maps.marked(maps.enlarged(coded.decoded), grid, position)
        words = said(coded)
        if position is not None:
            row, column = position
            words = (
                f"Row {row + 1}, column {column + 1}: code {int(coded.codes[position])}, "
                f"{coded.code_bits[position]:.1f} bits.\n\n{words}"
            )
        return (coded, position), picture, words

    @in_words
    def code(self, number: Number | None) -> tuple[list[Any], list[Any], str]:
        """The number of a code to what it looks like in context, its nearest codes, and how often it is used."""
        most = self.service.model.num_codes - 1
        index = _whole(number, "a code")
        if not 0 <= index <= most:
            raise ValueError(f"got code {index}, expected one of 0 to {most:,}")
        views = self.service.codebook
        count, total = int(views.counts[index]), int(views.counts.sum())
        rank = int((views.ranked == index).nonzero()) + 1
        near = views.neighbours(index)
        shown = [(maps.enlarged(each, _TILE), str(i)) for i, each in zip(near, views.atlas(near), strict=True)]
        return (
            [maps.enlarged(each, _TILE) for each in views.in_context(index)],
            shown,
            f"Code {index:,} stands at {count:,} of {total:,} positions of {len(views.codes):,} images, which is "
            f"number {rank:,} of {most + 1:,}; {int((views.counts > 0).sum()):,} codes are used there.",
        )

    @in_words
    def atlas(self) -> list[Any]:
        """64 of the codes that are used, from the most used to the least, with their numbers."""
        views = self.service.codebook
        used = views.ranked[: int((views.counts > 0).sum())]
        ranked = used[np.linspace(0, len(used) - 1, min(64, len(used))).astype(int)].tolist()
        return [(maps.enlarged(each, 48), str(i)) for i, each in zip(ranked, views.atlas(ranked), strict=True)]

    def _read(self, path: str | None, resize: bool) -> Any:
        return read_picture(path, self.service.model.config.num_channels, self.service.model.size if resize else None)

    def _class(self, label: str) -> int | None:
        names = self.service.class_names
        if label in (ANY_CLASS, None, ""):
            return None
        if label not in names:
            raise ValueError(f"got class {label!r:.60}, expected {ANY_CLASS} or one of {', '.join(names) or 'none'}")
        return names.index(label)

    def _picture(self, image: Any, side: int) -> str:
        """An image as a file, which is written once, however often the page is told of it."""
        path = self.file("image.png")
        Image.fromarray(maps.enlarged(image, side)).save(path)
        return str(path)

    def file(self, name: str) -> Path:
        """A file of this name, in a folder of its own: nobody else's has its place."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / name


def _whole(value: Number | None, what: str) -> int:
    """A whole number out of a field. ValueError where it is empty."""
    if value is None:
        raise ValueError(f"there is no number where {what} belongs")
    return int(value)


def said(coded: Coded) -> str:
    """What a picture costs, in words."""
    codes, pixels = coded.code_bits.sum().item(), coded.pixel_bits.sum().item()
    exact = f"{coded.psnr:.2f} dB" if np.isfinite(coded.psnr) else "infinite: they are equal"
    return (
        f"{size_of(coded.image)}: PSNR {exact}. {coded.codes.numel():,} codes take {codes:,.0f} bits under the prior, "
        f"the pixels beside them {pixels:,.0f}: {(codes + pixels) / 8:,.0f} bytes, {coded.bits_per_dim:.3f} bits for "
        f"each of {coded.image.numel():,} numbers. A code takes up to {coded.code_bits.max():.1f} bits, a pixel up to "
        f"{coded.pixel_bits.max():.1f}."
    )


def size_of(image: Any) -> str:
    """What the model is given of a picture."""
    return f"{image.shape[2]}x{image.shape[1]} pixels in {'grey' if len(image) == 1 else 'colour'}"
