"""Models in other projects' formats: export, and import."""

import os
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import tyro

from priors.llama_folder import PATTERNS, is_llama, load_llama, save_llama
from safefolder.files import check_replaceable
from safefolder.hub import download, is_hub_id
from safefolder.tensors import MOST_CONFIG_BYTES, is_file, read_json
from vqvae import VQVAE, Autoencoder
from vqvae.cli.common import Model, Output, check_pair, has_prior, load_prior, sides_of, tell
from vqvae.data import batches, load_images
from vqvae.interop import export_diffusers, export_onnx, export_program, fit_scale, import_tokenizer

# Images that a likelihood's scale, a number for each channel, is fitted to.
NUM_FITTED = 256

Source = tyro.conf.Positional[str]


def export(run_or_model: Model, to: Literal["onnx", "program", "diffusers", "llama"], output: Output) -> None:
    """Write a tokenizer, or a Llama prior, for other software.

    onnx: encoder.onnx and decoder.onnx, images to codes and codes to images, in batches of any size (extra `onnx`).
    program: the same as encoder.pt2 and decoder.pt2 of torch.export, which need PyTorch alone.
    diffusers: a folder for `diffusers.VQModel.from_pretrained`, of a VQGAN.
    llama: a folder for `transformers.LlamaForCausalLM.from_pretrained` and vLLM, of a prior of kind Llama.

    Example: vqvae export runs/fashion-mini --to onnx -o exported

    Args:
        run_or_model: a run's folder, a model's own folder, or a hub id.
        to: the format.
        output: the folder to write, which must not be there yet.
    """
    _check_free(output, run_or_model)
    if to == "llama":
        is_run = has_prior(run_or_model)
        prior = load_prior(run_or_model, None if is_run else run_or_model)
        if is_run:
            check_pair(Autoencoder.from_pretrained(run_or_model), prior, run_or_model)
        save_llama(prior, output)
        print(f"{output}: a LlamaForCausalLM of {prior.num_positions} codes a grid; its README.md says how to sample")
        return
    model = Autoencoder.from_pretrained(run_or_model)
    if not isinstance(model, VQVAE):
        raise ValueError(f"{run_or_model} holds a {type(model).__name__}, which has no codes; expected a VQVAE")
    write = {"onnx": export_onnx, "program": export_program, "diffusers": export_diffusers}[to]
    write(model, output)
    print(f"{output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


def import_(
    source: Source,
    output: Output,
    image_size: str | None = None,
    config: Path | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    data: str | None = None,
) -> None:
    """Read a public model, and write it as one of ours.

    Tokenizers: a VQModel of diffusers (folder or hub id), a .ckpt of taming-transformers, a .pt of LlamaGen, or a
    trainer's checkpoint with one of these two in it. Priors: a `LlamaForCausalLM` (folder or hub id) that was trained
    on codes. What is pickled is read without running what is in it.

    Example: vqvae import amused/amused-256 --subfolder vqvae -o runs/amused/codebook --data photos

    Args:
        source: folder, file or hub id.
        output: the folder to write, which must not be there yet.
        image_size: side in pixels, as 256, or height and width, as 192x256, any that the networks can halve; the
            source's own unless given.
        config: the yaml of a taming checkpoint, unless it lies beside it.
        revision: branch, tag or commit of a hub id.
        subfolder: where in the folder or repository the model is.
        data: images to fit the likelihood's scale to, without which distortion and bits mean nothing.
    """
    _check_free(output, source)
    if is_llama(_config(source, revision, subfolder)):
        given = {"image_size": image_size, "config": config, "data": data}
        if unknown := [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]:
            raise ValueError(f"{source} is a language model, for which there is no {', '.join(unknown)}: leave it out")
        prior = load_llama(_fetched(source, revision, subfolder, PATTERNS))
        prior.save_pretrained(output)
        print(f"{output}: a {type(prior).__name__} of {prior.num_codes} codes on a grid of {prior.grid}")
        return
    size = None if image_size is None else sides_of(image_size, "--image-size")
    model = import_tokenizer(source, config=config, image_size=size, revision=revision, subfolder=subfolder, tell=tell)
    if data is None:
        tell("the scale of its likelihood is not fitted, so that distortion and bits mean nothing yet: add --data")
    else:
        images = load_images(data, size=model.size, channels=model.config.num_channels)
        scale = fit_scale(model, next(batches(images, min(NUM_FITTED, len(images)), seed=0)).images)
        print(f"scale of the likelihood: {', '.join(f'{level:.1f}' for level in scale.tolist())} levels")
    model.save_pretrained(output)
    height, width = model.size
    print(f"{output}: {model.num_codes} codes, a grid of {model.grid} for images of {height} x {width}")


def _config(source: str, revision: str | None, subfolder: str | None) -> dict[str, Any]:
    """The config.json of a folder or a repository; none of a file, and of what has none."""
    path = _fetched(source, revision, subfolder, ("config.json",)) / "config.json"
    return read_json(path, most_bytes=MOST_CONFIG_BYTES) if is_file(path) else {}


def _fetched(source: str, revision: str | None, subfolder: str | None, patterns: tuple[str, ...]) -> Path:
    """The folder that is named, of which only these files are fetched where it is on the hub."""
    inside = PurePosixPath(subfolder or ".")
    folder = Path(source)
    if not folder.exists() and is_hub_id(source):
        folder = download(source, [str(inside / pattern) for pattern in patterns], revision=revision)
    elif folder.exists() and revision is not None:
        raise ValueError(f"{folder} is on this machine, where it has no revision {revision!r}; leave revision out")
    return folder / inside


def _check_free(output: Path, source: str) -> None:
    """Before what takes long: ValueError where something stands at the output, or nothing can be written there."""
    try:
        lost = [each for each in (output, *output.parents) if each.is_symlink() and not each.exists()]
        if lost:
            raise ValueError(f"{lost[0]} is a link that leads nowhere, expected the name of a new folder")
        if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
            raise ValueError(
                f"{output} is there already, expected the name of a new folder: remove it, or take another name"
            )
        check_replaceable(output, ())
        place = Path(os.path.realpath(output))
        if Path(source).is_dir() and place.is_relative_to(os.path.realpath(source)):
            raise ValueError(f"{output} is within {source}, which is read: take a folder outside of it")
        # What is there of the way to it; of a folder that is there, itself.
        there = next(folder for folder in (place, *place.parents) if os.path.lexists(folder))
    except OSError as error:
        raise ValueError(f"{output} cannot be written: {error.strerror or error}") from error
    if not there.is_dir():
        raise ValueError(f"{output} cannot be written: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{output} cannot be written: nothing may be written into {there}")
