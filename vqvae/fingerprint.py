"""Which tokenizer codes belong to."""

import hashlib
from typing import Any

from torch import nn

from safefolder.fingerprint import add_parts, options_of


def of_tokenizer(model: Any, *, any_size: bool = False) -> str:
    """The 64 hexadecimal digits that tell a tokenizer from all that give other codes.

    It covers what images are encoded with: the class, the size and channels of images, the quantizer's config, and the
    weights of encoder and quantizer. A decoder that is trained on, or another likelihood, leaves codes what they are.
    Of a model that is not made of an encoder and a quantizer it covers everything.

    Args:
        any_size: leave out the size of images, so that a model and what its `resized` gives have the same digits.
    """
    config, tensors = options_of(model), model.state_dict()
    if all(isinstance(getattr(model, part, None), nn.Module) for part in ("encoder", "quantizer")):
        config = {name: config[name] for name in ("image_size", "num_channels", "quantizer")}
        tensors = {name: each for name, each in tensors.items() if name.startswith(("encoder.", "quantizer."))}
    if any_size:
        config = {name: value for name, value in config.items() if name != "image_size"}
    digest = hashlib.sha256()
    add_parts(digest, model, config, tensors)
    return digest.hexdigest()


def check_same_codes(model: Any, decoder: Any, name: str) -> None:
    """Raise ValueError where a model, called `name`, is to decode the codes of another tokenizer."""
    if of_tokenizer(model) != of_tokenizer(decoder):
        raise ValueError(
            f"{name} is not a decoder of these codes, as its encoder or quantizer is another: train one by "
            "`vqvae train --stage codebook --train decoder --tokenizer RUN`"
        )


def check_trained_on(model: Any, prior: Any, name: str, advice: str) -> None:
    """Raise ValueError for a prior that was trained on latents of another tokenizer; one that does not say passes.

    Args:
        prior: `prior.trained_on` is None, or has the digest `tokenizer`.
        name: what the error calls the prior.
        advice: what it says to do.
    """
    if prior.trained_on is None:
        return
    found = of_tokenizer(model)
    if prior.trained_on.tokenizer != found:
        raise ValueError(
            f"{name} was trained on the codes of another tokenizer ({prior.trained_on.tokenizer[:12]}, this one is "
            f"{found[:12]}), and its bits and samples would be wrong: {advice}"
        )
