"""What every model here is that can be saved: its options, one way to save, load, push and describe it.

model.save_pretrained(folder)            # config.json and model.safetensors, whole or not at all
Kind.from_pretrained(folder_or_hub_id)   # a Kind, or one of its subclasses, whichever was saved
model.push_to_hub("owner/name")          # with its card
model.fingerprint()                      # tells it from all others, by class, options and weights
"""

import abc
import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Unpack

from torch import nn

from safefolder import cards, fingerprint
from safefolder.building import build
from safefolder.configured import Configured, concrete
from safefolder.files import write_text
from safefolder.folder import CARD_NAME, load, push, save
from safefolder.hub import HubOptions

AnyModel = TypeVar("AnyModel", bound="SavedModel")


class SavedModel(nn.Module, Configured):
    """Abstract: a module that is saved as its options and its weights.

    Attributes:
        run_part: the folder in which a run has such a model, for `from_pretrained` of a run.
        keeps_half: weights in half precision come as they were saved; else as float32.
        card_name: what the lines of its card call it.
        later_options: options that came when there were files of such models, each with the value that stands for none.
        summary, pipeline_tag: what its card says, and the hub's search finds.
    """

    run_part: ClassVar[str | None] = None
    keeps_half: ClassVar[bool] = True
    card_name: ClassVar[str] = "model"
    later_options: ClassVar[Mapping[str, Any]] = {}
    summary: ClassVar[str] = "A model of vqvae-priors."
    pipeline_tag: ClassVar[str | None] = None
    # What config.json has beside the options.
    _noted: ClassVar[tuple[str, ...]] = ()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors; an earlier model is replaced whole, and anything else refused."""
        config = {"class": type(self).__name__, **self.config.to_plain(), **self._notes()}
        save(Path(folder), config, dict(self.state_dict()))

    @classmethod
    def from_pretrained(cls: type[AnyModel], source: str | Path, **hub: Unpack[HubOptions]) -> AnyModel:
        """Read a model from its folder, from that of a run, or from a hub id: `cls` or a subclass, whichever was saved.

        It comes in evaluation mode, on the CPU, in float32 unless it was saved in another precision (half precision:
        as `keeps_half` says); nothing else that the caller has set plays a part.

        Args:
            hub: which revision, which folder inside, and how it is fetched: `safefolder.HubOptions`.

        Raises:
            ValueError: missing, corrupt, of another kind, or with weights that do not fit.
        """
        config, tensors = load(source, part=cls.run_part, **hub)
        kinds = {kind.__name__: kind for kind in concrete(cls)}
        kind = kinds.get(config["class"]) if isinstance(config["class"], str) else None
        if kind is None:
            expected = " or ".join(sorted(kinds, key=lambda name: (name != cls.__name__, name)))
            found = str(config["class"])[:100]
            raise ValueError(f"{source} holds a {found}, expected a {expected}; import it, if it is a class of yours")
        options = {name: config[name] for name in config if name not in ("format", "class", *kind._noted)}
        model = build(
            lambda: kind.Config.from_plain(options).build(), kind.__name__, tensors, source, keep_type=cls.keeps_half
        )
        try:
            model.check_loaded()
            model._read_notes({name: config[name] for name in kind._noted if name in config})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        figures: Mapping[str, Any] | None = None,
    ) -> str:
        """Put the model and its card on the hub, in one commit, and say where; see `safefolder.push`."""
        card = self.model_card(figures, source=repo_id, revision=revision)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            self.save_pretrained(folder)
            write_text(folder / CARD_NAME, card)
            return push(folder, repo_id, private=private, revision=revision, token=token)

    def model_card(
        self, figures: Mapping[str, Any] | None = None, *, source: str = "owner/name", revision: str | None = None
    ) -> str:
        """The README.md of the model on the hub at `source`, with figures where some were measured, as in elbo.json."""
        kind, lines = type(self), self.usage_lines()
        torch = ["import torch", ""] if any("torch." in line for line in lines) else []
        loaded = f"{self.card_name} = {cards.loading(kind, source, revision=revision)}"
        return cards.card(
            title=source.rpartition("/")[2],
            summary=self.summary,
            facts=self.card_facts(),
            usage=cards.python(*torch, cards.import_line(kind), "", loaded, *lines),
            tags=self.card_tags(),
            figures=figures,
            data=cards.data_of(figures),
            pipeline_tag=self.pipeline_tag,
        )

    @abc.abstractmethod
    def usage_lines(self) -> list[str]:
        """Lines of Python that use the model, for its card."""

    def card_tags(self) -> list[str]:
        """What the hub's search finds it by."""
        return []

    def card_facts(self) -> dict[str, object]:
        """What a model card says that it is made of."""
        return cards.model_facts(self)

    def fingerprint(self) -> str:
        """64 hexadecimal digits that tell the model from all others: SHA-256 of its class, options and weights."""
        digest = hashlib.sha256()
        fingerprint.add(digest, self)
        return digest.hexdigest()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """In evaluation mode inside; after it every part is in the mode that it was in. Not for several threads."""
        training = [part for part in self.modules() if part.training]
        try:
            for part in training:
                part.training = False
            yield
        finally:
            for part in training:
                part.training = True

    def check_loaded(self) -> None:
        """ValueError where tensors of the right shapes, read from a file, are none that this model could have saved."""

    def _notes(self) -> dict[str, Any]:
        """What config.json is to have beside the options, by the names in `_noted`."""
        return {}

    def _read_notes(self, notes: Mapping[str, Any]) -> None:
        """Take what a config.json had beside the options. ValueError for what `_notes` never wrote."""
