"""The models that come with the package, trained anew: a tokenizer of Fashion-MNIST and two priors of its codes.

    python -m benchmarks train_packaged --root FOLDER_WITH_THE_IDX_FILES --output safefolder/models

The codebook is trained, and its weights rounded to bfloat16, in which they are stored; the priors learn the codes of
the rounded one, and are rounded, too. Then all are judged by the test images as they will be read, beside what they
were before they were rounded. What a run of --runs has finished is not trained again, and what is not goes on.
"""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from priors import Prior
from safefolder import SavedModel
from safefolder.files import write_text
from safefolder.folder import CARD_NAME
from vqvae import VQVAE, load_images
from vqvae.bound import check_fit
from vqvae.cli.pushing import run_card
from vqvae.codec.model_fingerprint import fingerprint
from vqvae.evaluation import Evaluation, evaluate, images_at_once
from vqvae.fingerprint import of_tokenizer
from vqvae.training.prior_kinds import name_of

QUICK = (
    "--source fashion-mini --codebook-steps 4 --prior-steps 2 --test-images 50 "
    "--output runs/benchmarks/packaged-quick --runs runs/benchmarks/packaged-runs-quick"
)
NAME = "fashion-28"
CODEBOOK = ("--preset", "fashion-mnist", "--codebook-fit.learning-rate", "4e-3", "--codebook-fit.validate-every", 2000)
MUON = ["--prior-fit.muon", "0.05", "--prior-fit.learning-rate", "8e-3", "--prior-fit.weight-decay", "0.1"]
# By the name of the packaged model: what the prior is, beside what both are. Together they are to stay below 8 MB.
PRIORS = {
    NAME: ["--prior-kind", "Transformer", "--prior.width", "160", "--prior.num-heads", "5"],
    f"{NAME}-any-order": ["--prior-kind", "AnyOrder", "--prior.width", "144", "--prior.num-heads", "6"],
}


def main(
    source: str = "fashion-mnist",
    root: Path | None = None,
    codebook_steps: int = 20_000,
    prior_steps: int = 3000,
    test_images: int = 10_000,
    runs: Path = harness.OUT / "packaged",
    output: Path = harness.OUT / "packaged" / "models",
) -> None:
    """Train what is not trained yet, round it, judge it, and write it with its cards to `output`."""
    data = ["--data.source", source, *(["--data.root", str(root.resolve())] if root else [])]
    codebook_run = runs / "codebook"
    steps = ["--codebook-fit.num-steps", str(codebook_steps)]
    _train(codebook_run, "codebook", "--stage", "codebook", *CODEBOOK, *data, *steps)
    exact = VQVAE.from_pretrained(codebook_run)
    model = rounded(VQVAE.from_pretrained(codebook_run))
    _save(model, runs / "rounded" / "codebook", in_half=False)
    found: dict[str, Prior] = {}
    for name, options in PRIORS.items():
        run, steps = runs / name, ["--prior-fit.num-steps", str(prior_steps)]
        told = ["--preset", "fashion-mnist", "--stage", "prior", "--tokenizer", str((runs / "rounded").resolve())]
        _train(run, "prior", *told, *data, *options, *MUON, *steps)
        found[name] = Prior.from_pretrained(run)
    images = load_images(source, "test", root=root)
    table = harness.Table("", "bits/dim", "codes (nats)", "pixels (nats)", "PSNR (dB)", "weights (MB)")

    def judged(of: VQVAE, priors: dict[str, Prior]) -> Evaluation:
        for name, prior in priors.items():
            check_fit(of, prior, name)
        rows, size = range(len(images))[:test_images], images_at_once(*of.size)
        parts = (images.__getitems__(rows[start : start + size]) for start in range(0, len(rows), size))
        return evaluate(of, priors, parts)

    def row(what: str, result: Evaluation, prior: str, megabytes: str = "") -> None:
        rate, distortion = result.bound.rate[prior], result.bound.distortion
        bits = f"{result.bits(rate + distortion):.4f}"
        table.row(what, bits, f"{rate:.2f}", f"{distortion:.2f}", f"{result.psnr:.2f}", megabytes)

    before = judged(exact, found)
    for name in found:
        half = rounded(Prior.from_pretrained(runs / name))
        parts: dict[str, SavedModel] = {"prior": half} | ({"codebook": model} if name == NAME else {})
        for part, each in parts.items():
            _save(each, output / name / part, in_half=True)
        size = sum(path.stat().st_size for path in (output / name).rglob("*.safetensors"))
        row(f"{name}, float32 weights", before, name)
        result = judged(model, {name_of(half): half})
        row(f"{name}, as it is read", result, name_of(half), f"{size / 1e6:.2f}")
        folder = output / name
        digests = {"models": fingerprint(model, half).hex(), "tokenizer": of_tokenizer(model)}
        result.save(folder / "elbo.json", **digests, split="test", data=source)
        card = run_card(folder, name) if "codebook" in parts else half.model_card(harness.elbo_of(folder), source=name)
        write_text(folder / CARD_NAME, card)


def rounded(model: Any) -> Any:
    """The model with each number rounded to bfloat16, and kept as float32."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
    return model


def _save(model: SavedModel, folder: Path, *, in_half: bool) -> None:
    """Write a model whose numbers are all of bfloat16 in two bytes each, or in four."""
    shutil.rmtree(folder, ignore_errors=True)  # figures beside a model tell of the one that was there
    folder.parent.mkdir(parents=True, exist_ok=True)
    (copy.deepcopy(model).bfloat16() if in_half else model).save_pretrained(folder)


def _train(run: Path, part: str, *options: object) -> None:
    """Train unless that is done, or go on."""
    if not (run / part / "config.json").exists():
        resume: Sequence[object] = ["--resume"] if (run / "state").exists() else options
        harness.train(run, *resume, threads=1, quiet=False)
