"""What transformers over codes do beside their equations: names of weights, gradients, learning."""

import math

import pytest
import torch
from prior_worlds import every_grid, make_next_scale, make_transformer, some_codes

from priors import NextScalePrior, Sampling, TransformerPrior


def test_the_names_of_weights_stay_so_that_saved_priors_load() -> None:
    prior = make_transformer(num_codes=4, grid=(2, 3), depth=2)
    layer = ["attention.qkv", "attention.out", "mlp.gate_and_value", "mlp.out"]
    blocks = [f"trunk.trunk.blocks.{i}.{part}.weight" for i in range(2) for part in layer]
    outside = ["start.embedding.weight", "code.weight", "trunk.target"]
    assert list(prior.state_dict()) == [*outside, *blocks, "logits.weight"]
    sizes = ["num_codes", "grid", "num_classes", "width", "depth", "num_heads"]
    options = ["dropout", "label_dropout", "code_noise", "checkpointing"]
    assert sorted(prior.config.to_plain()) == sorted([*sizes, *options])


def test_gradients_are_those_of_finite_differences() -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2), depth=1).double()
    codes = every_grid(prior)[::7]
    prior(codes).sum().backward()
    for weight in prior.parameters():
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
        sides = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                weight.add_(direction, alpha=step)
                sides.append(prior(codes).sum().item())
                weight.sub_(direction, alpha=step)
        slope = (sides[0] - sides[1]) / 2e-5
        assert slope == pytest.approx((weight.grad * direction).sum().item(), rel=1e-6, abs=1e-8)


def test_a_share_of_the_labels_is_dropped_in_training() -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2), num_classes=2, label_dropout=0.3)
    num = 2000
    codes, labels = torch.ones(num, 2, 2, dtype=torch.int64), torch.ones(num, dtype=torch.int64)
    with torch.no_grad():
        with_label, without = prior(codes[:1], labels[:1]), prior(codes[:1])
        torch.manual_seed(0)
        trained = prior.train()(codes, labels)
    is_dropped = (trained - without).abs() < 1e-4
    assert ((trained - with_label).abs() < 1e-4).logical_xor(is_dropped).all()
    assert abs(is_dropped.float().mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / num)


def test_a_fresh_prior_is_nearly_uniform() -> None:
    torch.manual_seed(0)
    prior = TransformerPrior(num_codes=64, grid=(4, 4))
    per_position = -prior(some_codes(prior, 16)).mean().item() / 16
    assert abs(per_position - math.log(64)) < 0.1


def test_it_learns_what_labels_and_positions_determine() -> None:
    torch.manual_seed(0)
    sizes = {"num_classes": 2, "width": 32, "depth": 1, "num_heads": 2, "label_dropout": 0.5}
    prior = TransformerPrior(num_codes=4, grid=(3, 3), **sizes)
    optimiser = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    patterns = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 0], [3, 3, 1, 1, 2, 2, 0, 0, 3]])
    labels = torch.arange(64) % 2
    codes = patterns[labels].reshape(64, 3, 3)
    for _ in range(120):
        optimiser.zero_grad()
        (-prior(codes, labels).mean()).backward()
        optimiser.step()
    prior.eval()
    # The class is worth ln 2 nats, and without a label nothing more is left to say.
    assert prior(codes, labels).min() > -0.2
    assert (prior(codes) + math.log(2)).abs().max() < 0.4
    assert torch.equal(prior.sample(64, labels, Sampling(temperature=0.0)), codes)


def test_a_prior_in_bfloat16_gathers_in_float32() -> None:
    prior = make_next_scale(num_codes=4, scales=(1, 2, 3))
    assert not {"gathering", "scale_of"} & set(prior.state_dict())
    exact = prior.gathering.clone()
    low = prior.bfloat16()
    assert low.gathering.dtype == torch.float32
    assert torch.equal(low.gathering, exact)
    assert low.log_conditionals(torch.randint(4, (2, 14))).dtype == torch.float32
    assert low.sample(2).shape == (2, 14)


def test_the_grid_follows_from_the_scales() -> None:
    assert NextScalePrior.Config(num_codes=4).grid == (79,)
    assert NextScalePrior.Config(num_codes=4, scales=[1, 2], grid=[5]) == NextScalePrior.Config(
        num_codes=4, scales=(1, 2)
    )
