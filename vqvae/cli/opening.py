"""What the user names as a run or a model, opened: the tokenizer and its priors, of a run also while it trains."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import safefolder
from priors import ContinuousPrior, DraftHead, Prior
from priors.grid import GridModel
from vqvae import VQVAE, Autoencoder
from vqvae.cli.common import check_pair, load_prior, tell
from vqvae.evaluation import images_at_once
from vqvae.training.prior_kinds import name_of, untrained


class Opened:
    """A tokenizer by the name of a run's folder, of a model's, or of either on the hub.

    Of a run that is still training, or was stopped, it is that of the last checkpoint, and so is the prior; a line on
    stderr says so.

    Attributes:
        source: the name.
        model: the tokenizer.
        notes: what was said of it on stderr.

    Raises:
        ValueError: there is none, or it is damaged.
    """

    def __init__(self, source: str):
        self.source = source
        self.notes: list[str] = []
        self._codebook = None
        if _is_begun(source, "codebook"):
            # Here, as it brings along what only training needs.
            from vqvae.training.unfinished import unfinished_codebook

            self._codebook = unfinished_codebook(Path(source))
        if self._codebook is not None and self._codebook.model is not None:
            self._note(f"{source} is not finished: {self._codebook}")
            self.model = self._codebook.model
        else:
            self.model = Autoencoder.from_pretrained(source)
            if newer := _trains_on(source, "codebook"):
                self._note(f"{source} trains on: the model is its finished one, and {newer}")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        tell(f"note: {text}")

    @property
    def has_loop(self) -> bool:
        """Whether a prior has a say in the codes of an image."""
        return isinstance(self.model, VQVAE) and self.model.config.beta is not None

    @functools.cached_property
    def own_prior(self) -> Prior | ContinuousPrior | None:
        """The prior of the run, if it has one by now.

        Raises:
            ValueError: it is damaged, or of another tokenizer.
        """
        found = self._own_prior()
        if found is not None:
            check_pair(self.model, found, self.source)
        return found

    def _own_prior(self) -> Prior | ContinuousPrior | None:
        if self._codebook is not None:  # a folder prior/ is of another
            return self._codebook.prior
        if safefolder.folder.has_part(self.source, "prior"):
            if newer := _trains_on(self.source, "prior"):
                self._note(f"{self.source} trains on: the prior is its finished one, and {newer}")
            return load_prior(self.source, None)
        if not _is_begun(self.source, "prior"):
            return self._loop_prior()
        from vqvae.training.unfinished import unfinished_prior

        begun = unfinished_prior(Path(self.source), self.model)
        if begun is None:
            return None
        self._note(f"{self.source} is not finished: {begun}")
        return begun.prior

    def _loop_prior(self) -> Prior | ContinuousPrior | None:
        """Of a run whose codebook is finished and whose prior has not begun, the prior that was in the loop."""
        folder = Path(self.source) / "state" / "loop"
        if not self.has_loop or not folder.is_dir():
            return None
        self._note(f"{self.source} is not finished: its prior is that in the loop of the codebook")
        found = GridModel.from_pretrained(folder)
        assert isinstance(found, Prior | ContinuousPrior)
        return found

    def prior(self, named: str | None) -> Prior | ContinuousPrior:
        """The prior that is named, or else the run's own.

        Raises:
            ValueError: there is none, or it is of another tokenizer.
        """
        if named is None and self.own_prior is not None:
            return self.own_prior
        if named is None and self._codebook is not None:
            raise ValueError(
                f"{self.source} has no prior yet, only the {self._codebook}: go on with `vqvae train --resume --run "
                f"{self.source}`, or name one with --prior"
            )
        found = load_prior(self.source, named)
        check_pair(self.model, found, self.source, named)
        return found

    def draft(self, named: str | None, prior: Prior) -> Any:
        """What proposes codes to a prior: the prior or head that is named, or else the run's own, if the prior is.

        Raises:
            ValueError: there is none by that name, or it is for another prior.
        """
        if named == "none":
            return None
        if named is None:
            if self._codebook is not None or prior is not self.own_prior:
                return None
            if not safefolder.folder.has_part(self.source, "draft"):
                return None
            found = DraftHead.from_pretrained(self.source)
        else:
            has_head = safefolder.folder.has_part(named, "draft")
            has_head = has_head or safefolder.folder.load(named, part="prior")[0]["class"] == "DraftHead"
            found = DraftHead.from_pretrained(named) if has_head else load_prior(self.source, named)
            if isinstance(found, ContinuousPrior):
                raise ValueError(f"--draft {named} is a prior over vectors, expected one over codes, or a draft head")
        found.check_fits(prior)
        return found

    def priors(self, named: str | None) -> dict[str, Prior | ContinuousPrior]:
        """The priors of a run by name, those of a model without one; that of the bound, which may be named, is last."""
        priors = untrained(self.model)
        for name in ("unigram", "ngram"):
            if self._codebook is None and safefolder.folder.has_part(self.source, name):
                found = GridModel.from_pretrained(self.source, subfolder=name)
                assert isinstance(found, Prior)
                check_pair(self.model, found, self.source)
                priors[name] = found
        if named is not None or self.own_prior is not None:
            last = self.prior(named)
            priors.pop(name_of(last), None)
            priors[name_of(last)] = last
        return priors

    def reconstructed(self, images: Tensor, shown: Autoencoder | None = None) -> Tensor:
        """Images to codes, through the prior in the loop of a run that has one, and back.

        Args:
            shown: whose decoder makes the images; the model's own unless given.
        """
        encoder = self.model
        # One that is not finished is looked at only where it has a say.
        if (self.has_loop or not _is_begun(self.source, "prior")) and self.own_prior is not None:
            encoder = self.model.through(self.own_prior)
        parts = images.split(images_at_once(*self.model.size))
        return torch.cat([(shown or self.model).decode(encoder.encode(part)) for part in parts])


def _is_begun(source: str, stage: str) -> bool:
    """Whether what is named is a run here whose stage has begun and made no model yet."""
    begun = (Path(source) / "state" / f"{stage}.ckpt").is_file()
    return begun and not safefolder.folder.has_part(source, stage)


def _trains_on(source: str, stage: str) -> str | None:
    """Of a run here whose stage is finished and goes on for more steps, how far it is; None where it does not."""
    path, made = Path(source) / "state" / f"{stage}.ckpt", Path(source) / stage / "model.safetensors"
    try:
        if path.stat().st_mtime_ns <= made.stat().st_mtime_ns:
            return None
    except OSError:
        return None
    from vqvae.training.options import load_run
    from vqvae.training.run_folder import checkpoint

    try:
        run, step = load_run(Path(source)), checkpoint(path)["step"]
    except ValueError:
        return None  # the models are whole, and all that is asked for
    wanted = getattr(run, f"{stage}_fit").num_steps
    return None if step >= wanted else f"the checkpoint of step {step:,} of {wanted:,} is not looked at"
