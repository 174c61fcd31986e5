"""Which model and prior a file belongs to."""

import hashlib
from typing import Any

from safefolder.fingerprint import add
from vqvae.codec.container import FINGERPRINT_BYTES


def fingerprint(model: Any, prior: Any) -> bytes:
    """8 bytes that tell a model and a prior from all others: SHA-256 of their configs and weights, cut short."""
    digest = hashlib.sha256()
    add(digest, model)
    add(digest, prior)
    return digest.digest()[:FINGERPRINT_BYTES]
