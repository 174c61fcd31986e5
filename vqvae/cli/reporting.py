"""What a run made as a page that opens anywhere, and several runs side by side: report."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tqdm import tqdm

import safefolder
from priors import Prior, UniformPrior
from vqvae.cli.common import at_least_one, first_images, printable, tell
from vqvae.cli.image_choice import Chosen, ImageChoice, choose
from vqvae.cli.opening import Opened
from vqvae.codec.model_fingerprint import fingerprint
from vqvae.data import Batch
from vqvae.evaluation import Evaluation, evaluate, images_at_once
from vqvae.report.comparison_page import Compared, comparison_page, shown_of
from vqvae.report.curves import Curves
from vqvae.report.figures import Figures, looks_of
from vqvae.report.gallery import Gallery, is_png
from vqvae.report.page import write
from vqvae.report.run_page import RunContents, described, run_page

# Images that are evaluated anew unless more are asked for: seconds for small models.
_NUM = 1000
# Samples take long on large grids.
_LARGE_GRID = 256


def report(
    runs_or_models: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    choice: Annotated[ImageChoice, tyro.conf.OmitArgPrefixes] = ImageChoice(),
    num: int = _NUM,
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
) -> None:
    """Write what a run made as one HTML page, which opens anywhere.

    The page has bits, figures of the eye, curves of the training, images with what each costs, and the options. The
    figures are those of the run's elbo.json where it is of these weights; what each image costs is measured on the
    first images. Figures of the eye are those of JSON files in the run's folder that `vqvae evaluate --looks` wrote.

    Example: vqvae report runs/fashion-mini

    Example: vqvae report runs/small runs/large -o compare.html

    Args:
        runs_or_models: a run's folder, a tokenizer's folder, or a hub id; several for a comparison on the same images.
        num: how many images are measured anew, the first so many.
        output: the HTML file to write; report.html in the run's folder unless given, of several compare.html here.
    """
    at_least_one(num, "--num")
    if not runs_or_models:
        raise ValueError("got no run to report on; expected a run's folder, or several")
    target = _target(runs_or_models, output)
    if len(runs_or_models) == 1:
        text, told = _of_one(runs_or_models[0], choice, num)
    else:
        text, told = _of_several(runs_or_models, choice, num)
    write(target, text)
    print(f"{target}: {printable(told)}, {len(text.encode()) / 1e6:.1f} MB")


def _target(names: Sequence[str], output: Path | None) -> Path:
    """Where the page goes."""
    if output is None:
        in_run = Path(names[0]) / "report.html" if (Path(names[0]) / "state").is_dir() else Path("report.html")
        return in_run if len(names) == 1 else Path("compare.html")
    if output.is_dir():
        raise ValueError(f"-o {output} is a folder, expected the name of an HTML file, as {output / 'report.html'}")
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"got -o {output}, expected the name of an HTML file, as {output.with_suffix('.html')}")
    return output


class _Source:
    """What is named, opened, with what its folder says."""

    def __init__(self, name: str):
        self.opened = Opened(name)
        self.folder = Path(name)
        self.priors = self.opened.priors(None)
        self.curves = Curves.read(self.folder)
        (self.last_name, self.last) = list(self.priors.items())[-1]

    @property
    def name(self) -> str:
        """What a page calls it."""
        return safefolder.cards.public_name(str(self.folder.absolute())) if self.folder.exists() else str(self.folder)

    @property
    def has_prior(self) -> bool:
        """Whether a prior was trained."""
        return self.opened.own_prior is not None

    @property
    def described(self) -> str:
        return described(self.opened.model, self.last if self.has_prior else None, self.last_name)

    @functools.cached_property
    def mark(self) -> str:
        """What figures of these weights carry."""
        return fingerprint(self.opened.model, self.last).hex()

    @functools.cached_property
    def _files(self) -> list[tuple[Path, Mapping[str, Any]]]:
        """The figures of these weights that lie in the folder."""
        found: list[tuple[Path, Mapping[str, Any]]] = []
        for path in sorted(self.folder.glob("*.json")) if self.folder.is_dir() else []:
            try:
                plain = safefolder.tensors.read_json(path)
            except ValueError as error:
                tell(f"note: {printable(str(error))}")
                continue
            if plain.get("models") == self.mark:
                found.append((path, plain))
        return found

    @functools.cached_property
    def stored(self) -> Figures | None:
        """The run's elbo.json, where it is of these weights."""
        for path, plain in self._files:
            if path.name == "elbo.json":
                try:
                    return Figures(plain=plain)
                except ValueError as error:
                    tell(f"note: {path} is not looked at: {error}")
        return None

    @functools.cached_property
    def looks(self) -> list[Mapping[str, Any]]:
        """Figures of the eye of these weights."""
        found = [looks for _, plain in self._files if (looks := looks_of(plain)) is not None]
        return [looks for at, looks in enumerate(found) if looks not in found[:at]]

    @functools.cached_property
    def options(self) -> tuple[list[tuple[str, str]], str | None]:
        """The options of a run, and its command line; of what is no run of this version, neither."""
        if not (self.folder / "state" / "run.json").is_file():
            return [], None
        from vqvae.training.options import load_run
        from vqvae.training.reproducing import command_line, public_options

        try:
            run = load_run(self.folder)
        except ValueError as error:
            tell(f"note: {error}")
            return [], None
        return public_options(run), command_line(run)

    @property
    def notes(self) -> list[str]:
        """What the page says first."""
        said = [self.name + note.removeprefix(self.opened.source) for note in self.opened.notes]
        if not self.has_prior:
            said.append(
                f"{self.name} has no prior of its own yet: its rate is that of latents of which nothing is known."
            )
        if (self.folder / "elbo.json").is_file() and self.stored is None:
            said.append(f"The elbo.json of {self.name} is of other weights, or damaged: all is measured anew.")
        return said

    def evaluated(self, chosen: Chosen, num: int) -> tuple[Evaluation, Gallery]:
        """Figures of the first images, and what each costs."""
        gallery = Gallery()
        size = images_at_once(*self.opened.model.size)
        rows = range(len(chosen.images))[:num]
        with tqdm(total=len(rows), desc="evaluate", unit="img", disable=None) as bar:
            stream = _parts(chosen, rows, size, bar)
            return evaluate(self.opened.model, self.priors, stream, observe_bounds=gallery.add), gallery

    def samples(self) -> bytes | None:
        """A picture of samples: that of the run, where it is of these weights."""
        if not self.has_prior:
            return None
        path = self.folder / "samples.png"
        if self.stored is not None and path.is_file() and is_png(stored := path.read_bytes()):
            return stored
        from vqvae import pictures
        from vqvae.training.previews import sample_grid

        rows = 4 if self.last.num_positions <= _LARGE_GRID else 1
        return pictures.to_png(sample_grid(self.opened.model, self.last, rows))


def _parts(chosen: Chosen, rows: range, size: int, bar: tqdm) -> Iterator[Batch]:
    for start in range(0, len(rows), size):
        batch = chosen.images.__getitems__(rows[start : start + size])
        for name, reason in batch.skipped:
            tell(f"skipped {printable(name)}: {reason}")
        if len(batch):
            yield batch
        bar.update(len(rows[start : start + size]))


def _of_one(name: str, choice: ImageChoice, num: int) -> tuple[str, str]:
    source = _Source(name)
    chosen = choose(name, choice, source.opened.model)
    evaluation, gallery = source.evaluated(chosen, num)
    is_own = choice == ImageChoice()
    figures = source.stored if is_own and source.stored is not None else None
    if figures is None:
        figures = Figures(plain=evaluation.plain(split=chosen.split, models=source.mark))
    options, command = source.options
    contents = RunContents(
        name=source.name,
        model=source.described,
        data=chosen.public_name,
        figures=figures,
        looks=source.looks,
        gallery=gallery,
        usage=evaluation.code_usage,
        curves=source.curves,
        samples=source.samples(),
        class_names=chosen.images.class_names,
        columns=source.last.class_names,
        options=options,
        command=command,
        notes=source.notes,
    )
    return run_page(contents), f"{source.name} on {figures['images']:,} {chosen.what}"


def _of_several(names: Sequence[str], choice: ImageChoice, num: int) -> tuple[str, str]:
    sources = [_Source(name) for name in names]
    first = sources[0]
    for source in sources[1:]:
        for option in ("image_size", "num_channels"):
            got, expected = (getattr(each.opened.model.config, option) for each in (source, first))
            if got != expected:
                raise ValueError(
                    f"{source.opened.source} has {option} {got} and {first.opened.source} {expected}: they see "
                    "different images, whose figures are not comparable"
                )
    chosen = choose(names[0], choice, first.opened.model)
    stored = [source.stored for source in sources]
    protocols = {None if each is None else each.protocol for each in stored}
    if choice == ImageChoice() and len(protocols) == 1 and None not in protocols:
        figures = [each for each in stored if each is not None]
    else:  # all anew, on the same images
        plain = [source.evaluated(chosen, num)[0].plain(split=chosen.split, models=source.mark) for source in sources]
        figures = [Figures(plain=each) for each in plain]
    images = first_images(chosen.images, shown_of(*first.opened.model.size))
    with torch.no_grad():
        compared = [
            Compared(
                name=called,
                model=source.described,
                figures=each,
                reconstructions=source.opened.reconstructed(images),
                looks=source.looks,
                curves=source.curves,
                num_positions=source.last.num_positions
                if isinstance(source.last, Prior) and not isinstance(source.last, UniformPrior)
                else None,
                command=source.options[1],
            )
            for called, source, each in zip(_told_apart(sources), sources, figures, strict=True)
        ]
    notes = list(dict.fromkeys(note for source in sources for note in source.notes))
    text = comparison_page(compared, images, data=chosen.public_name, said_first=notes)
    return text, f"{len(names)} runs on {figures[0]['images']:,} {chosen.what}"


def _told_apart(sources: Sequence[_Source]) -> list[str]:
    """Names of runs, with a number where two have the same."""
    names = [source.name for source in sources]
    return [name if names.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(names, start=1)]
