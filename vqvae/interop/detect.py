"""Which project's tokenizer a folder, a file or a hub id holds, told by what is in it; and one call that reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from vqvae.interop.diffusers import import_diffusers
from vqvae.interop.llamagen import llamagen_model
from vqvae.interop.state_dicts import Tell, find_weights, read_checkpoint
from vqvae.interop.taming import taming_model
from vqvae.vqgan import VQGAN

Format = Literal["diffusers", "taming", "llamagen"]
KIND = "a .ckpt of taming-transformers (encoder.down...) or a .pt of LlamaGen (encoder.conv_blocks...)"


def import_tokenizer(
    source: str | Path,
    *,
    config: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    tell: Tell | None = None,
) -> VQGAN:
    """A public tokenizer as a model of ours, in eval mode: `import_diffusers`, `import_taming` or `import_llamagen`.

    Args:
        source: a VQModel folder or hub id of diffusers, or a checkpoint of taming-transformers or LlamaGen: a pickled
            file or one of safetensors, the tokenizer's alone or a trainer's, in which it is a part.
        config: the yaml of a taming checkpoint that does not lie beside it.
        image_size: side, or height and width, in pixels, where the source's own is not wanted, or not known.
        revision, subfolder: of diffusers alone.
        tell: called with a sentence where the weights are not simply all that there is: where they were found, what was
            taken off their names, what was left out; e.g. `print`.

    Raises:
        ValueError: as they do; or options that the format has not.
    """
    path = Path(source)
    weights: dict[str, Tensor] = {}
    kind: Format = "diffusers"
    # What is there and no regular file is refused where it is read.
    if path.exists() and not path.is_dir():
        weights = find_weights(read_checkpoint(path), path, KIND, tell)
        kind = _format_of(weights, path)
    given = {"config": config, "revision": revision, "subfolder": subfolder}
    known = {"diffusers": {"revision", "subfolder"}, "taming": {"config"}, "llamagen": set()}[kind]
    if unknown := [name for name, value in given.items() if value is not None and name not in known]:
        raise ValueError(f"{source} is of {kind}, which has no {', '.join(unknown)}: leave it out")
    if kind == "diffusers":
        return import_diffusers(source, image_size=image_size, revision=revision, subfolder=subfolder, tell=tell)
    if kind == "taming":
        return taming_model(weights, path, config, image_size)
    return llamagen_model(weights, path, 256 if image_size is None else image_size)


def _format_of(weights: Mapping[str, Tensor], path: Path) -> Format:
    if any(name.startswith("encoder.conv_blocks.") for name in weights):
        return "llamagen"
    if any(name.startswith("encoder.down.") for name in weights):
        return "taming"
    if any(name.startswith("encoder.down_blocks.") for name in weights):
        raise ValueError(f"{path} holds weights of a VQModel of diffusers: name its folder, which has its config.json")
    raise ValueError(f"{path} holds no tokenizer that is known here: expected a VQModel folder of diffusers, {KIND}")
