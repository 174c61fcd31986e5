"""What commands share: models, priors and codecs from what the user names, and lines for the user."""

import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

import safefolder
from priors import ContinuousPrior, Prior
from priors.grid import GridModel
from vqvae import Autoencoder
from vqvae.codec import Codec, Mode
from vqvae.data import Images, batches, load_images
from vqvae.fingerprint import check_same_codes, check_trained_on

_SIDES = re.compile(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?")
MODES = {"lossless": Mode.LOSSLESS, "lossy": Mode.LOSSY, "bits-back": Mode.BITS_BACK}

Model = Annotated[str, tyro.conf.Positional]
File = Annotated[Path, tyro.conf.Positional]
Output = Annotated[Path, tyro.conf.arg(aliases=["-o"])]


def sides_of(text: str, option: str) -> int | tuple[int, int]:
    """The size of images from one word: a side, as 256, or height and width, as 192x256.

    One word, as a command that took two would take what comes after them, too.
    """
    found = _SIDES.fullmatch(text)
    if found is None:
        raise ValueError(
            f"got {option} {printable(text)!r:.80}, expected a side in pixels, as 256, or height and width, as 192x256"
        )
    return int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))


def at_least_one(value: int, name: str) -> None:
    """ValueError unless an option's value is positive."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def device_of(name: str) -> torch.device:
    """The device of that name; of "auto" a GPU if there is one.

    Raises:
        ValueError: there is none, or it cannot compute, as meta; with what there is.
    """
    there = _devices()
    expected = (
        f"this machine has {len(there) - 1} GPU(s) that torch can use; expected auto, or one of {', '.join(there)}"
    )
    name = there[-1] if name == "auto" else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that torch is to give up
            device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"--device must be auto, cpu, cuda or cuda:NUMBER, got {printable(name)!r}; {expected}"
        ) from error
    reason = ""
    if device.type in {torch.device(each).type for each in there} and (device.type != "cpu" or not device.index):
        try:
            # Made and read for real: a driver too old, or a GPU that others have filled, shows only so.
            if (torch.arange(3, device=device) + 1).sum().item() == 6:
                return device
        except Exception as error:  # torch has many kinds for this, and so have drivers
            reason = f" ({(str(error).strip() or type(error).__name__).splitlines()[0][:200]})"
    raise ValueError(f"got --device {printable(name)}; {expected}{reason}")


def _devices() -> list[str]:
    """The names of the devices that torch knows here; what is taken unless one is named comes last."""
    there = ["cpu"]
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None:
        there += [f"{found.type}:{number}" for number in reversed(range(torch.accelerator.device_count()))]
    return there


def has_prior(source: str) -> bool:
    """Whether what is named is a run, here or on the hub, with a prior of its own."""
    return safefolder.folder.has_part(source, "prior")


def load_pair(source: str, prior: str | None) -> tuple[Autoencoder, Prior | ContinuousPrior]:
    """The model of a run or of a folder, and the prior that is named, or else the run's own.

    Raises:
        ValueError: either is missing or damaged, or they do not belong together.
    """
    model, found = Autoencoder.from_pretrained(source), load_prior(source, prior)
    check_pair(model, found, source, prior)
    return model, found


def check_pair(model: Autoencoder, found: GridModel, source: str, prior: str | None = None) -> None:
    """ValueError where a prior was trained on the codes of another tokenizer."""
    if prior is None:
        name, advice = f"the prior of {source}", f"train it again by `vqvae train --resume --run {source}`"
    else:
        name, advice = (
            prior,
            f"take the tokenizer that it is of, or train one by `vqvae train --tokenizer {source} --stage prior`",
        )
    check_trained_on(model, found, name, advice)


def load_prior(source: str, prior: str | None) -> Prior | ContinuousPrior:
    """The prior that is named, or else the run's own."""
    if prior is not None:
        found = GridModel.from_pretrained(prior)
    elif has_prior(source):
        found = GridModel.from_pretrained(source, subfolder="prior")
    else:
        raise ValueError(
            f"{source} has no prior; train one by `vqvae train --resume --run {source}`, or name one with --prior"
        )
    assert isinstance(found, Prior | ContinuousPrior)
    return found


def load_decoder(model: Autoencoder, decoder: str | None) -> Autoencoder:
    """What makes images of a model's codes: the model that --decoder names, else the model itself.

    Raises:
        ValueError: it is not of these codes.
    """
    if decoder is None:
        return model
    found = Autoencoder.from_pretrained(decoder)
    check_same_codes(model, found, f"--decoder {decoder}")
    return found


def load_codec(source: str, prior: str | None, decoder: str | None = None) -> tuple[Codec, int]:
    """The codec of a run, or of a model and a prior, and how many bytes their weights are."""
    # The kinds are checked by Codec, which names what does not fit.
    model, known = load_pair(source, prior)
    tensors = [*model.state_dict().values(), *known.state_dict().values()]
    shown = None if decoder is None else load_decoder(model, decoder)
    return Codec(model, known, decoder=shown), sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # pyrefly: ignore


def load_test_images(source: str, data: str | None, model: Autoencoder, split: str = "test") -> Images:
    """The images that are named, or else the run's own, at the model's size."""
    options: dict[str, Any] = {
        "size": model.size,
        "channels": model.config.num_channels,
    }
    if data is not None:
        return load_images(data, split, **options)
    name, root = images_of_run(source)
    return load_images(name, split, root=root, **options)


def images_of_run(source: str) -> tuple[str, str | None]:
    """The images that a run was trained on, and the folder that holds their files, as `load_images` takes them."""
    path = Path(source) / "state" / "run.json"
    if safefolder.packaged.find(source) is not None:  # they are of the whole set, of which this part is packaged, too
        return "fashion-mini", None
    if not path.is_file():
        raise ValueError(f"{source} does not say which images it is for; name some with --data")
    try:
        run = safefolder.tensors.read_json(path)["data"]
        return run["source"], run["root"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); name images with --data") from error


def codes_of_run(source: str) -> Path | None:
    """The tokenized set that a run's prior was trained on; None where it was on images, or no run is named."""
    path = Path(source) / "state" / "run.json"
    codes = safefolder.tensors.read_json(path).get("codes") if path.is_file() else None
    return Path(codes) if isinstance(codes, str) else None


def first_images(images: Images, num: int) -> UInt8[Tensor, "b c h w"]:
    """The first `num` images that can be read; unreadable ones are named on stderr."""
    found: list[Tensor] = []
    for batch in batches(images, min(num, 100)):
        for name, reason in batch.skipped:
            tell(f"skipped {name}: {reason}")
        found.append(batch.images)
        if sum(map(len, found)) >= num:
            break
    return torch.cat(found)[:num]


def printable(name: str) -> str:
    """A name as it may be shown on a terminal: one line, no commands to it."""
    return "".join(character if character.isprintable() else "?" for character in name)


def tell(text: str) -> None:
    """A line on stderr, clear of a progress bar."""
    tqdm.write(text, file=sys.stderr)


def speed(num: int, seconds: float) -> str:
    """How long so many images took."""
    return f"{seconds:.1f} s, {num / max(seconds, 1e-9):.1f} img/s"
