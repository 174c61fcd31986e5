"""What imported models are compared by."""

import pytest
import torch

from vqvae.interop.code_agreement import compare_codes


def check_equal(model, images, codes, decode):
    """Codes of the images equal `codes` but for ties, and both decoders give the same picture for them."""
    agreement = compare_codes(model, images, codes)
    assert agreement.num_codes_compared == codes.numel()
    assert agreement.num_wrong == 0
    assert agreement.num_ties <= 1e-3 * codes.numel() + 1
    assert len(codes.unique()) > 8  # else there would be nothing to tell apart
    with torch.no_grad():
        features = model.decoder(model.vectors(codes[:4]))
        theirs = decode(codes[:4])
    assert theirs.std() > 0.05
    torch.testing.assert_close(features, theirs, rtol=0, atol=1e-4)
    assert torch.equal(model.decode(codes[:4]), (127.5 * (1 + features)).round().clamp(0, 255).to(torch.uint8))


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def some_fast(names, fast):
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]
