"""Which weights a file belongs to: SHA-256 over class, options and tensors of one model after another."""

import json
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Digest(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes, /) -> None: ...


def add(digest: Digest, model: Any) -> None:
    """Put a model's class, options and tensors into a digest; the tensors by name, wherever they lie."""
    add_parts(digest, model, options_of(model), model.state_dict())


def options_of(model: Any) -> dict[str, Any]:
    """The options that tell a model from others, as data; without those of its class's `later_options` that it lacks.

    So a model of before an option was there is told by what it was told by then: files and priors of it stay valid.
    """
    later = getattr(type(model), "later_options", {})
    return {name: value for name, value in model.config.to_plain().items() if name not in later or value != later[name]}


def add_parts(digest: Digest, module: Any, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put a module's class, and some of its options and tensors, into a digest."""
    digest.update(json.dumps([type(module).__name__, config], sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta:
            raise ValueError(f"{name} of {type(module).__name__} is on the device meta, which holds no numbers")
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
