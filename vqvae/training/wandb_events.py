"""Figures and pictures as Weights & Biases shows them (`--logger wandb`, extra `wandb`).

One run there for one here, over all of its stages and all the times that it is resumed: its id is kept in
state/wandb.json. Each stage has steps of its own, as `codebook/step`. What was sent cannot be taken back: a run that
goes on from a checkpoint sends the steps after it again. Without a network or a key, `WANDB_MODE=offline` keeps all of
it in the run's folder, for `wandb sync`.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

import safefolder


def wandb_module() -> ModuleType:
    """The library. ValueError where it is not installed."""
    try:
        import wandb  # pyrefly: ignore  (an extra)
    except ImportError as error:
        raise ValueError(
            f"--logger wandb needs the extra wandb ({error}): pip install 'vqvae-priors[wandb]', or leave it out"
        ) from error
    return wandb


class WandbEvents:
    """A run there.

    Args:
        folder: of the run here.
        options: of the run here, as plain data, to look them up there.

    Raises:
        ValueError: the library is not there, or has no account to write to.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]):
        self._wandb: Any = wandb_module()
        path = folder / "state" / "wandb.json"
        known = safefolder.tensors.read_json(path).get("id") if path.is_file() else None
        try:
            self._run = self._wandb.init(
                project="vqvae",
                name=folder.resolve().name,
                id=known if isinstance(known, str) else None,
                resume=None if known is None else "allow",
                dir=str(folder.resolve()),
                config=dict(options),
                settings=self._wandb.Settings(console="off"),
            )
        except Exception as error:  # of its own many kinds, of which some are no errors of its package
            text = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"wandb cannot be written to: {text}; log in by `wandb login`, or keep it here by WANDB_MODE=offline"
            ) from error
        safefolder.files.write_text(path, json.dumps({"id": self._run.id}) + "\n")
        for stage in ("codebook", "prior"):
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def add(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """Figures of a step, by name."""
        named = {f"{stage}/{name}": value for name, value in figures.items()}
        self._run.log({f"{stage}/step": step, **named})

    def picture(self, stage: str, step: int, name: str, png: bytes) -> None:
        """One picture, of the bytes of a PNG file."""
        with Image.open(io.BytesIO(png)) as opened:
            image = self._wandb.Image(opened.convert("RGB"))
        self._run.log({f"{stage}/step": step, f"{stage}/{name}": image})

    def close(self) -> None:
        """All of it is sent, or kept for later."""
        self._run.finish()
