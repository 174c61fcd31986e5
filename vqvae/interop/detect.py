"""Which project's tokenizer a folder, a file or a hub id holds, told by what is in it; and one call that reads it."""

from pathlib import Path
from typing import Literal

from vqvae.interop.diffusers import import_diffusers
from vqvae.interop.llamagen import import_llamagen
from vqvae.interop.pickles import read_pickle
from vqvae.interop.taming import import_taming
from vqvae.vqgan import VQGAN

Format = Literal["diffusers", "taming", "llamagen"]


def format_of(source: str | Path) -> Format:
    """What `import_tokenizer` takes a source for: a folder or hub id is diffusers', a file is told by its weights.

    Raises:
        ValueError: a file that cannot be read, or that is neither taming's nor LlamaGen's.
    """
    path = Path(source)
    if not path.is_file():
        return "diffusers"
    held = read_pickle(path)
    if isinstance(held, dict):
        for part in (held, *(inner for inner in held.values() if isinstance(inner, dict))):
            if any(str(name).startswith("encoder.conv_blocks.") for name in part):
                return "llamagen"
            if any(str(name).startswith("encoder.down.") for name in part):
                return "taming"
    raise ValueError(
        f"{path} holds no tokenizer that is known here: expected a VQModel folder of diffusers, a .ckpt of "
        "taming-transformers (encoder.down...) or a .pt of LlamaGen (encoder.conv_blocks...)"
    )


def import_tokenizer(
    source: str | Path,
    *,
    config: str | Path | None = None,
    image_size: int | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> VQGAN:
    """A public tokenizer as a model of ours, in eval mode: `import_diffusers`, `import_taming` or `import_llamagen`.

    Args:
        source: a VQModel folder or hub id of diffusers, or a checkpoint of taming-transformers or LlamaGen.
        config: the yaml of a taming checkpoint that does not lie beside it.
        image_size: height and width in pixels, where the source's own is not wanted, or not known.
        revision, subfolder: of diffusers alone.

    Raises:
        ValueError: as they do; or options that the format has not.
    """
    kind = format_of(source)
    given = {"config": config, "revision": revision, "subfolder": subfolder}
    known = {"diffusers": {"revision", "subfolder"}, "taming": {"config"}, "llamagen": set()}[kind]
    if unknown := [name for name, value in given.items() if value is not None and name not in known]:
        raise ValueError(f"{source} is of {kind}, which has no {', '.join(unknown)}: leave it out")
    if kind == "diffusers":
        return import_diffusers(source, image_size=image_size, revision=revision, subfolder=subfolder)
    if kind == "taming":
        return import_taming(Path(source), config, image_size=image_size)
    return import_llamagen(Path(source), **({} if image_size is None else {"image_size": image_size}))
