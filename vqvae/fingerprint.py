"""Which weights a file belongs to: SHA-256 over class, config and tensors of one module after another."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Digest(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes, /) -> None: ...


def add(digest: Digest, module: nn.Module, config: Mapping[str, Any]) -> None:
    """Put a module's class, config and tensors into a digest; the tensors by name, wherever they lie."""
    _add(digest, module, config, module.state_dict())


def of_tokenizer(model: Any) -> str:
    """The 64 hexadecimal digits that tell a tokenizer from all that give other codes.

    It covers what images are encoded with: the class, the size and channels of images, the quantizer's config, and the
    weights of encoder and quantizer. A decoder that is trained on, or another likelihood, leaves codes what they are.
    Of a model that is not made of an encoder and a quantizer it covers everything.
    """
    config, tensors = model.config.to_plain(), model.state_dict()
    if all(isinstance(getattr(model, part, None), nn.Module) for part in ("encoder", "quantizer")):
        config = {name: config[name] for name in ("image_size", "num_channels", "quantizer")}
        tensors = {name: each for name, each in tensors.items() if name.startswith(("encoder.", "quantizer."))}
    digest = hashlib.sha256()
    _add(digest, model, config, tensors)
    return digest.hexdigest()


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


def _add(digest: Digest, module: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    digest.update(json.dumps([type(module).__name__, config], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            raise ValueError(f"{name} of {type(module).__name__} is on the device meta, which holds no numbers")
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
