"""Put a run, or a model of one, on the Hugging Face hub: push."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

import safefolder
from priors.grid import GridModel
from vqvae import Autoencoder
from vqvae.cli.common import check_pair, tell
from vqvae.codec.model_fingerprint import fingerprint
from vqvae.training.prior_kinds import untrained

# What a run has to give: folders of models, of which the first is always there.
PARTS = ("codebook", "prior", "unigram", "ngram", "draft")

Folder = Annotated[Path, tyro.conf.Positional]
Repository = Annotated[str, tyro.conf.Positional]


def push(run_or_model: Folder, repository: Repository, private: bool = False, revision: str | None = None) -> None:
    """Upload a run, or a saved model, to the Hugging Face hub.

    It is one commit, with a model card. Of a run go: its tokenizer, its priors, elbo.json and the pictures, with the
    README.md of its folder, or else a card that is made of these. After that `vqvae sample OWNER/NAME` works anywhere,
    and so does `VQVAE.from_pretrained("OWNER/NAME", subfolder="codebook")`. Log in first, by `hf auth login`.

    Example: vqvae push runs/fashion-mini owner/fashion-mini --private

    Args:
        run_or_model: a run's folder, or a saved model's.
        repository: where to, as OWNER/NAME; it is made where there is none.
        private: make it a private one.
        revision: the branch to upload to; main unless given.
    """
    send = push_run if (run_or_model / PARTS[0]).is_dir() else push_model
    print(send(run_or_model, repository, private=private, revision=revision))


def push_run(run: Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload the models, the figures and the pictures of a run with its card; the address at this commit comes back.

    Raises:
        ValueError: a part of the run cannot be read, or the hub could not be written to.
    """
    files: dict[str, Path | bytes] = {}
    model = Autoencoder.from_pretrained(run / PARTS[0])
    for part in PARTS:
        if (run / part).is_dir():
            if part not in ("codebook", "draft"):
                check_pair(model, GridModel.from_pretrained(run / part), str(run))
            files |= {f"{part}/{name}": run / part / name for name in safefolder.folder.members(run / part)}
    beside = [name for name in safefolder.folder.BESIDE if (run / name).is_file()]
    if "elbo.json" in beside and _figures(run, *_parts(run)) is None:
        beside = [name for name in beside if name == "README.md"]
        tell(
            f"{run / 'elbo.json'} and the pictures are of other weights and stay here; make them anew by "
            f"`vqvae train --stage evaluate --run {run}`"
        )
    files |= {name: _public(run / name) for name in beside}
    if "README.md" not in beside:
        files["README.md"] = run_card(run, repo_id, revision=revision).encode()
    return safefolder.hub.upload(
        files,
        repo_id,
        message=f"The run {run.resolve().name}",
        # What an earlier run or model left there would pass for this run's.
        replaces=[*(f"{part}/*" for part in PARTS), safefolder.folder.CONFIG_NAME, *safefolder.folder.stale_patterns()],
        private=private,
        revision=revision,
    )


def push_model(folder: Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a saved model with its card, and with figures where an elbo.json lies beside it."""
    beside = [name for name in safefolder.folder.BESIDE if (folder / name).is_file()]
    names = [*safefolder.folder.members(folder), *beside]
    files: dict[str, Path | bytes] = {name: _public(folder / name) for name in names}
    if "README.md" not in files:
        card = _model(folder).model_card(_read_figures(folder), source=repo_id, revision=revision)
        files["README.md"] = card.encode()
    return safefolder.hub.upload(
        files,
        repo_id,
        message="A model of vqvae-priors",
        replaces=safefolder.folder.stale_patterns(),
        private=private,
        revision=revision,
    )


def run_card(run: Path, repo_id: str, *, revision: str | None = None) -> str:
    """The card of a run: its tokenizer and its prior, how to use them together, and what it measured."""
    model, prior = _parts(run)
    facts = {f"tokenizer, {name}": value for name, value in model.card_facts().items()}
    imports = [safefolder.cards.import_line(type(model))]
    lines = [f"model = {safefolder.cards.loading(type(model), repo_id, revision=revision, subfolder='codebook')}"]
    if prior is None:
        c, (height, width) = model.config.num_channels, model.size
        lines += [f"images = torch.zeros(1, {c}, {height}, {width}, dtype=torch.uint8)  # yours"]
        lines += ["codes = model.encode(images)", "again = model.decode(codes)"]
        imports.insert(0, "import torch\n")
    else:
        kept = ("class", "classes", "parameters")
        facts |= {f"prior, {name}": value for name, value in prior.card_facts().items() if name in kept}
        imports.insert(0, safefolder.cards.import_line(type(prior)))
        lines += [f"prior = {safefolder.cards.loading(type(prior), repo_id, revision=revision, subfolder='prior')}"]
        lines += ["images = model.decode(prior.sample(4))  # sampled anew"]
        lines += ["codes = model.through(prior).encode(images)"]
    figures = _figures(run, model, prior)
    usage = safefolder.cards.python(*imports, "", *lines)
    if prior is not None and revision is None:
        usage += f"\n\n```sh\nvqvae sample {repo_id} --num 16 --output samples.png\n```"
    and_prior = "" if prior is None else f" and a prior over its latents ({type(prior).__name__})"
    return safefolder.cards.card(
        title=repo_id.rpartition("/")[2],
        summary=f"An image tokenizer ({type(model).__name__}){and_prior}.",
        facts=facts,
        usage=usage,
        tags=["vq-vae", "image-tokenizer", "image-generation", "likelihood"],
        figures=figures,
        data=safefolder.cards.data_of(figures),
        pictures=[name for name in safefolder.cards.PICTURES if (run / name).is_file()] if figures is not None else [],
        pipeline_tag=None if prior is None else "unconditional-image-generation",
    )


def _parts(run: Path) -> tuple[Autoencoder, GridModel | None]:
    prior = GridModel.from_pretrained(run / "prior") if (run / "prior").is_dir() else None
    return Autoencoder.from_pretrained(run / "codebook"), prior


def _model(folder: Path) -> Autoencoder | GridModel:
    """The model of a folder, of whichever of the two families."""
    kind = safefolder.folder.read_config(folder)["class"]
    return GridModel.from_pretrained(folder) if kind in _names(GridModel) else Autoencoder.from_pretrained(folder)


def _names(kind: type) -> set[str]:
    return {kind.__name__}.union(*(_names(below) for below in kind.__subclasses__()))


def _figures(run: Path, model: Autoencoder, prior: GridModel | None) -> Mapping[str, Any] | None:
    """What elbo.json says, if it is of these very weights."""
    found = _read_figures(run)
    (even,) = untrained(model).values()  # what `vqvae evaluate` takes where there is no prior
    of = fingerprint(model, prior or even).hex()
    return found if found is not None and found.get("models") == of else None


def _public(path: Path) -> Path | bytes:
    """A file as it may be seen by others: of figures, without where the images lie on this machine."""
    if path.name != "elbo.json" or "data" not in (figures := _read_figures(path.parent) or {}):
        return path
    return (json.dumps({**figures, "data": safefolder.cards.data_of(figures)}, indent=2) + "\n").encode()


def _read_figures(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "elbo.json"
    if not path.is_file():
        return None
    try:
        return safefolder.tensors.read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it, or make it anew by `vqvae evaluate`") from error
