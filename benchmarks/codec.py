"""Our files of bits beside PNG, WebP, JPEG-XL and xz, on the same test images: bits, speed, and pictures.

    python benchmarks/codec.py RUN [MORE RUNS...] --data fashion-mnist --root FOLDER --num 10000
    python benchmarks/codec.py RUN --data fashion-mnist --root FOLDER --others FILE   # theirs are measured once
    python benchmarks/codec.py RUN --data fashion-mnist --root FOLDER --decode-profile

A run is a folder with `codebook` and `prior`, as `train.py` makes it. Everything is on one thread. All files of all
codecs are decoded and compared with what went in.

Bits are those of whole files, headers included; `payload` is a file's coded pixels alone: IDAT of PNG, the LZMA2 stream
of xz, our stream and stored pixels. An image's code length is that of the integer tables, `Codec.measure`. No labels
are stored, and the ELBO is without labels too. Times are CPU times, the median of interleaved rounds. Lossy files of
WebP and JPEG-XL are the smallest that have at least our bytes, and the smallest they make at all where that is larger;
PSNR and SSIM are means over images.

`--decode-profile` says where decoding time goes, and measures nothing else. A clock runs for each group of functions;
it stops where a function of another group begins.
"""

import argparse
import json
import math
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import codec_report as report  # pyrefly: ignore[missing-import]
import numpy as np
import other_codecs as others  # pyrefly: ignore[missing-import]
import torch
from codec_report import Row, line, ours  # pyrefly: ignore[missing-import]
from einops import rearrange
from other_codecs import Job  # pyrefly: ignore[missing-import]
from torch import Tensor
from tqdm import tqdm

import safefolder
from priors import Prior
from vqvae import VQVAE, load_images
from vqvae.codec import Archive, Codec, Mode, container, tables
from vqvae.codec.body import STORED, Body
from vqvae.codec.coder import RangeReader
from vqvae.elbo import elbo
from vqvae.metrics import psnr, ssim

ARCHIVES = (2000, 10_000)
NUM_LOSSY = 64
# One image by itself takes so much longer that fewer are timed.
ALONE_OF = 8
BATCH = 500


class Run:
    """A trained model and prior, as a codec and as they are."""

    def __init__(self, folder: Path):
        self.name = folder.name
        self.model = VQVAE.from_pretrained(folder / "codebook").eval()
        self.prior = Prior.from_pretrained(folder / "prior").eval()
        self.codec = Codec(self.model, self.prior)
        self.weight_bytes = sum((folder / part / "model.safetensors").stat().st_size for part in ("codebook", "prior"))
        self.num_codes = math.prod(self.model.grid)

    def pack(self, images: Tensor, what: str, **how: Any) -> bytes:
        """`Codec.compress` with a progress bar."""
        bar = tqdm(images, desc=f"{self.name}: {what}", unit="img", disable=None)
        blocks = self.codec.blocks(bar, mode=Mode.LOSSLESS, verify=False, **how)
        return container.pack(self.codec.header(Mode.LOSSLESS), blocks)

    def unpack(self, data: bytes, images: Tensor, what: str) -> None:
        """Decode a file and compare it with what went in, bit for bit."""
        start = 0
        with Archive.from_bytes(data) as archive, self._bar(len(images), f"{what}, back") as bar:
            for block in self.codec.decode(archive):
                back = torch.stack(block.images)
                if not torch.equal(back, images[start : start + len(back)]):
                    raise ValueError(f"{self.name}: {what}: other pixels came back than went in")
                start += len(back)
                bar.update(len(back))
        if start != len(images):
            raise ValueError(f"{self.name}: {what}: {start} images came back, expected {len(images)}")
        print(f"{self.name}: {what}: pixels equal, {start:,} of {len(images):,} images", flush=True)

    def _bar(self, num: int, what: str) -> tqdm:
        return tqdm(total=num, desc=f"{self.name}: {what}", unit="img", disable=None)

    @torch.no_grad()
    def bounds(self, images: Tensor) -> dict[str, np.ndarray]:
        """Bits of each image: the negative ELBO in float32 and in float64, and the integer tables' code length."""
        found: dict[str, list[Tensor]] = {"float32": [], "float64": [], "tables": [], "rate": []}
        with self._bar(len(images), "ELBO") as bar:
            for part in images.split(BATCH):
                for name, model, prior in (
                    ("float32", self.model, self.prior),
                    ("float64", self.codec.coder.model, self.codec.coder.prior),
                ):
                    found[name].append(elbo(model, prior, part).negative.double() / math.log(2))
                cost = self.codec.measure(part)
                found["tables"].append(cost.total)
                found["rate"].append(cost.rate)
                bar.update(len(part))
        return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def measure(run: Run, images: Tensor) -> dict[str, Any]:
    """Lossless bits of one run, in archives and one by one."""
    bounds = run.bounds(images)
    archives = {}
    for num in sorted({min(num, len(images)) for num in ARCHIVES}):
        what = f"archive of {num:,}"
        data = run.pack(images[:num], what)
        run.unpack(data, images[:num], what)
        archives[num] = parts_of(run, data) | {
            f"over_{name}": 8 * len(data) / bounds[name][:num].sum() - 1 for name in ("float32", "float64", "tables")
        }
    data = run.pack(images, "one by one", images_per_block=1)
    run.unpack(data, images, "one by one")
    with Archive.from_bytes(data) as archive:
        packed = [archive.body(i) for i in range(len(images))]
    bodies = [_body(run, body) for body in packed]
    payload = np.array([len(body.stream) + len(body.stored) for body in bodies])
    single = np.array([_file_bytes(len(body)) for body in packed])
    for i in np.linspace(0, len(images) - 1, 4).astype(int):
        if (real := len(run.codec.compress(images[i : i + 1]))) != single[i]:
            raise ValueError(f"{run.name}: image {i} as a file of its own has {real} bytes, {single[i]} were counted")
    above = 8 * payload - bounds["tables"]
    return {
        "bounds": {name: float(bits.mean()) for name, bits in bounds.items()},
        "single": single.tolist(),
        "payload": payload.tolist(),
        "archive": archives[max(archives)]["bytes"],
        "archives": archives,
        "payload_above_tables": {"mean": float(above.mean()), "max": float(above.max())},
        "weight_bytes": run.weight_bytes,
        "codes_per_image": run.num_codes,
    }


def _body(run: Run, data: bytes) -> Body:
    return Body.unpack(data, run.codec.coder.num_channels, run.codec.coder.size)


def _file_bytes(length: int) -> int:
    """Of a file of one image whose body has so many bytes."""
    entry = container.varint(1) + container.varint(length)
    return container.HEADER.size + container.BLOCK.size + length + len(entry) + container.TRAILER.size


def parts_of(run: Run, data: bytes) -> dict[str, Any]:
    """What a file's bytes are spent on, and how its images are coded."""
    with Archive.from_bytes(data) as archive:
        packed = [archive.body(i) for i in range(len(archive.blocks))]
    bodies = [_body(run, body) for body in packed]
    kinds = [kind for body in bodies for kind in body.kinds]
    ends = container.HEADER.size + container.TRAILER.size
    streams, stored = (sum(len(getattr(body, part)) for body in bodies) for part in ("stream", "stored"))
    around = container.BLOCK.size * len(packed)
    inside = sum(map(len, packed))
    return {
        "bytes": len(data),
        "header": ends,
        "blocks": around + inside - streams - stored,
        "index": len(data) - ends - around - inside,
        "streams": streams,
        "stored_pixels": stored,
        "num_blocks": len(packed),
        "share_shifted": sum(0 < kind < STORED for kind in kinds) / len(kinds),
        "share_stored": sum(kind == STORED for kind in kinds) / len(kinds),
    }


def timing_jobs(run: Run, images: Tensor) -> dict[tuple[str, str, str], tuple[Job, int]]:
    """What is timed, as in `other_codecs.timing_jobs`."""
    codec, few = run.codec, images[: max(1, len(images) // ALONE_OF)]
    jobs: dict[tuple[str, str, str], tuple[Job, int]] = {}

    def add(kind: str, parts: Sequence[Tensor]) -> None:
        files = [codec.compress(part, verify=False) for part in parts]
        ways: dict[str, Job] = {
            "encode": lambda: [codec.compress(part, verify=False) for part in parts],
            "encode, verified": lambda: [codec.compress(part, verify=True) for part in parts],
            "decode": lambda: [codec.decompress(file) for file in files],
        }
        jobs.update({(ours(run.name), kind, what): (job, sum(map(len, parts))) for what, job in ways.items()})

    add("single", few.split(1))
    add("archive", [images])
    return jobs


# -------------------------------------------------------------------------------------------------------------- lossy


def lossy(run: Run, images: Tensor) -> dict[str, list[Row]]:
    """Ours, WebP and JPEG-XL at equal bytes, all images as one file and each as its own: pixels and figures."""
    pictures = others.pictures_of(images)
    alone = [run.codec.compress(image[None], mode=Mode.LOSSY) for image in images.unbind()]
    data = run.codec.compress(images, mode=Mode.LOSSY)

    def decoded(files: Sequence[bytes]) -> Tensor:
        return torch.cat([torch.stack(list(run.codec.decompress(file))) for file in files])

    def row(name: str, found: others.Lossy) -> Row:
        back = torch.from_numpy(np.ascontiguousarray(found.pictures)).view(len(images), *pictures.shape[1:3], -1)
        back = rearrange(back, "b h w c -> b c h w")
        return _row(name, images, back, found.num_bytes, found.num_smallest)

    rows = {"one file": [_row(ours(run.name), images, decoded([data]), len(data))]}
    rows["files of their own"] = [_row(ours(run.name), images, decoded(alone), sum(map(len, alone)))]
    for name in tqdm(others.LOSSY, desc=f"{run.name}: lossy", disable=None):
        rows["one file"].append(row(name, others.lossy(pictures, name, len(data))))
        each = others.lossy_each(pictures, name, [len(file) for file in alone])
        rows["files of their own"].append(row(name, each))
    return rows


def _row(name: str, images: Tensor, back: Tensor, num_bytes: int, num_smallest: int = 0) -> Row:
    quality = {"psnr": psnr(images, back).mean().item(), "ssim": ssim(images, back).mean().item()}
    size = {"bytes": num_bytes, "bits_per_pixel": 8 * num_bytes / images.numel(), "files_at_smallest": num_smallest}
    return name, back, {**size, **quality}


# ------------------------------------------------------------------------------------------------------------ profile


class Clock:
    """CPU time of groups of functions: what one calls of another group counts for that one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._stack = ["rest"]
        self._since = time.process_time()

    def change(self, group: str | None) -> None:
        """Begin a group, or end the one that is on."""
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now
        self._stack.append(group) if group else self._stack.pop()

    def of(self, group: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function, timed; or one that gives an iterator, whose steps are."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.change(group)
            try:
                result = function(*args, **kwargs)
            finally:
                self.change(None)
            return self._steps(group, result) if isinstance(result, Iterator) else result

        return timed

    def _steps(self, group: str, steps: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.change(group)
            try:
                step = next(steps)
            except StopIteration:
                return
            finally:
                self.change(None)
            yield step


def profile(run: Run, images: Tensor) -> str:
    """Where decoding goes, in one archive and one by one, as a table."""
    coder = run.codec.coder
    parts: list[tuple[str, Any, str]] = [
        ("prior's walk", coder.prior, "walk"),
        ("decoder network", coder.model.decoder, "forward"),
        ("decoder network", coder.model, "vectors"),
        ("likelihood's context network", coder.likelihood, "_pixel_steps"),
        ("likelihood, the rest", coder.likelihood, "visit"),
        ("integer tables", tables, "CodeTables"),
        ("integer tables", tables.CodeTables, "widths"),
        *(("integer tables", tables.LevelTables, name) for name in ("__init__", "high", "low")),
        ("coder", RangeReader, "get"),
        ("coder", RangeReader, "__init__"),
    ]
    found = {}
    for kind, files in (
        (f"one archive of {len(images):,}", [run.codec.compress(images, verify=False)]),
        ("one by one", [run.codec.compress(image[None], verify=False) for image in images[:: 2 * ALONE_OF]]),
    ):
        with ExitStack() as patches:
            clock = Clock()
            for group, owner, name in parts:
                patches.enter_context(mock.patch.object(owner, name, clock.of(group, getattr(owner, name))))
            for file in files:
                run.codec.decompress(file)
            clock.change("end")
        found[kind] = {group: clock.seconds[group] for group in [*dict.fromkeys(part[0] for part in parts), "rest"]}
    num = dict(zip(found, (len(images), len(images[:: 2 * ALONE_OF])), strict=True))
    lines = [line(f"decoding, {run.name}", *found), line(*["---"] * (1 + len(found)))]
    for group in next(iter(found.values())):
        lines.append(line(group, *(f"{spent[group] / sum(spent.values()):.1%}" for spent in found.values())))
    speeds = [f"{1000 * sum(spent.values()) / num[kind]:.1f} ms" for kind, spent in found.items()]
    return "\n".join([*lines, line("CPU time an image", *speeds)])


# --------------------------------------------------------------------------------------------------------------- main


def compare(runs: Sequence[Run], images: Tensor, options: argparse.Namespace) -> None:
    """Everything on the same images: figures, tables and pictures."""
    timed, some = images[: options.num_timed], images[:NUM_LOSSY]
    of = {
        "pixels": f"{zlib.crc32(images.numpy().tobytes()):08x}",
        "num": len(images),
        "num_timed": len(timed),
        "num_slow": min(options.num_slow, len(images)),
    }
    kept = others_in(options.others, of)
    rows = {run.name: lossy(run, some) for run in runs}
    found = others.measure(others.pictures_of(images), of["num_slow"]) if kept is None else kept
    jobs = others.timing_jobs(others.pictures_of(timed)) if kept is None else {}
    for run in runs:
        jobs |= timing_jobs(run, timed)
    for (name, kind, what), speed in others.images_per_second(jobs, options.rounds).items():
        found.setdefault(name, {}).setdefault("speed", {}).setdefault(kind, {})[what] = speed
    if kept is None and options.others is not None:
        theirs = {name: codec for name, codec in found.items() if name in others.CODECS}
        safefolder.files.write_text(options.others, json.dumps({"of": of, "codecs": theirs}) + "\n")
    for run in runs:
        found[ours(run.name)] |= measure(run, images)
    result = report.figures(found, rows, images, len(timed), ALONE_OF)
    folder: Path = options.output_dir
    safefolder.files.write_text(folder / "codec.json", json.dumps(result, indent=1) + "\n")
    report.draw_bits(found, images[0].numel(), len(images), folder / "codec_bits.png")
    report.draw_lossy(some, rows, folder / "codec_lossy.png")
    print(report.tables(result))


def others_in(path: Path | None, of: dict[str, Any]) -> dict[str, Any] | None:
    """The other codecs' figures in a file, if it is there; ValueError unless they are of the same images."""
    if path is None or not path.exists():
        return None
    kept = json.loads(path.read_text())
    if not isinstance(kept, dict) or kept.get("of") != of:
        raise ValueError(f"{path} has no figures of {of}; remove it, or give the file of these images")
    return kept["codecs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders with codebook and prior")
    parser.add_argument("--data", required=True, help="whose test images, as load_images takes it")
    parser.add_argument("--root", help="folder of the data's files")
    parser.add_argument("--num", type=int, default=10_000, help="the first so many images")
    parser.add_argument("--num-timed", type=int, default=512, help="images whose coding is timed")
    parser.add_argument("--num-slow", type=int, default=10_000, help=f"images of their own for {others.SLOW}")
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--others", type=Path, metavar="FILE", help="keep the other codecs' figures here, or take them")
    parser.add_argument("--decode-profile", action="store_true", help="say where decoding time goes, and nothing else")
    options = parser.parse_args()
    if min(options.num, options.num_timed, options.num_slow, options.rounds) < 1:
        parser.error("--num, --num-timed, --num-slow and --rounds are at least 1")
    if len({run.name for run in options.runs}) < len(options.runs):
        parser.error("two runs have the same name; rename a folder")
    torch.set_num_threads(1)
    try:
        runs = [Run(folder) for folder in options.runs]
        data = load_images(options.data, "test", root=options.root)
        num = min(len(data), options.num_timed if options.decode_profile else options.num)
        images = data[:num].images
        if options.decode_profile:
            for run in runs:
                print(profile(run, images), end="\n\n")
        else:
            options.output_dir.mkdir(parents=True, exist_ok=True)
            compare(runs, images, options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
