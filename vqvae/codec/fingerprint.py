"""Which model and prior a file belongs to."""

import hashlib
import json
from typing import Any

import torch

from vqvae.codec.container import FINGERPRINT_BYTES


def fingerprint(model: Any, prior: Any) -> bytes:
    """8 bytes that tell a model and a prior from all others: SHA-256 of their configs and weights, cut short."""
    digest = hashlib.sha256()
    for part, config in ((model, model.config.to_plain()), (prior, prior.config_fields())):
        digest.update(json.dumps([type(part).__name__, config], sort_keys=True).encode())
        for name, tensor in sorted(part.state_dict().items()):
            plain = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()[:FINGERPRINT_BYTES]
