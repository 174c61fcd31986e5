"""Which weights a file belongs to: SHA-256 over class, config and tensors of one module after another."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn


@runtime_checkable
class Digest(Protocol):
    """What `hashlib` makes."""

    def update(self, data: bytes, /) -> None: ...


def add(digest: Digest, module: nn.Module, config: Mapping[str, Any]) -> None:
    """Put a module's class, config and tensors into a digest; the tensors by name, wherever they lie."""
    digest.update(json.dumps([type(module).__name__, config], sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())


def of_tokenizer(model: Any) -> str:
    """The 64 hexadecimal digits that tell a tokenizer from all others."""
    digest = hashlib.sha256()
    add(digest, model, model.config.to_plain())
    return digest.hexdigest()
