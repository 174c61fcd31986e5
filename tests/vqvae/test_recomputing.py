"""Activations that are computed again in the backward pass: the same gradients, to the bit, and less memory."""

import copy

import pytest
import torch
from test_any_size import KINDS, built, noise

from vqvae.networks.blocks import Recomputing


def step(model, images):
    out = model(images)
    (out.distortion.mean() / model.num_dims + sum(out.auxiliary.values())).backward()
    return out, {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_the_same(name):
    model = built(KINDS[name]).train()
    other = copy.deepcopy(model)
    parts = [part for part in other.modules() if isinstance(part, Recomputing)]
    assert len(parts) >= 4
    for part in parts:
        part.recomputes = True
    calls = []
    for part in parts:
        part.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    out, gradients = step(model, noise(8, 12))
    torch.manual_seed(0)
    again, others = step(other, noise(8, 12))
    assert len(calls) == 2 * len(parts)
    assert torch.equal(out.distortion, again.distortion)
    assert gradients.keys() == others.keys()
    for key, gradient in gradients.items():
        assert (gradient is None and others[key] is None) or torch.equal(gradient, others[key]), key


def test_what_is_kept_for_the_backward_pass_is_less():
    """Counted as torch saves it."""
    kept = []
    for recomputes in (False, True):
        model = built(KINDS["smooth"]).train()
        for part in model.modules():
            if isinstance(part, Recomputing):
                part.recomputes = recomputes
        sizes: list[int] = []

        def count(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            features = model.encoder(noise(64, 64))
        kept.append(sum(sizes))
        features.sum().backward()
    assert kept[1] < 0.6 * kept[0]


def test_evaluation_computes_once():
    model = built(KINDS["plain"])
    for part in model.modules():
        if isinstance(part, Recomputing):
            part.recomputes = True
    assert torch.equal(model.encode(noise(8, 12)), built(KINDS["plain"]).encode(noise(8, 12)))
