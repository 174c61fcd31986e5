"""What a PixelCNN sees, and that it learns."""

import pytest
import torch
from prior_worlds import make_pixelcnn, offered, seeded, some_codes
from torch import Tensor

from priors import PixelCNNPrior


def reach(prior: PixelCNNPrior, position: int) -> Tensor:
    """Of which positions' codes the conditional of a position has gradients, bool "*grid"."""
    torch.manual_seed(0)
    weights = torch.randn(3, *prior.grid, prior.num_codes).double().softmax(-1).requires_grad_()
    log_probs = prior.relaxed_log_conditionals(weights).flatten(1, 2)[:, position]
    return torch.autograd.grad(log_probs.square().sum(), weights)[0].abs().sum((0, -1)) > 0


@pytest.mark.parametrize(("depth", "kernel_size"), [(5, 3), (3, 5)])
def test_no_blind_spot_and_nothing_ahead(depth: int, kernel_size: int) -> None:
    """Every position before, the corner at the right above included, and none at or after."""
    prior = make_pixelcnn(num_codes=3, grid=(4, 5), depth=depth, kernel_size=kernel_size).double()
    for position in range(prior.num_positions):
        assert reach(prior, position).flatten().tolist() == [before < position for before in range(prior.num_positions)]


@pytest.mark.parametrize(("depth", "kernel_size"), [(1, 3), (2, 3), (1, 5), (2, 5)])
def test_the_receptive_field_grows_by_half_a_kernel_a_layer(depth: int, kernel_size: int) -> None:
    prior = make_pixelcnn(num_codes=3, grid=(9, 13), depth=depth, kernel_size=kernel_size).double()
    row, column = 6, 6
    steps = depth * (kernel_size // 2)
    expected = torch.zeros(9, 13, dtype=torch.bool)
    expected[row, column - 1 - steps : column] = True
    # Above, the first row seen is the one that the shift has brought; sidewards the layers reach one step each.
    expected[row - 1 - steps : row, column - steps : column + steps + 1] = True
    assert torch.equal(reach(prior, row * 13 + column), expected)


@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (5, 1), (1, 1)])
def test_the_walk_goes_on_from_any_prefix(grid: tuple[int, int]) -> None:
    prior = make_pixelcnn(num_codes=3, grid=grid, num_classes=2, depth=3, kernel_size=5).double()
    flat, labels = some_codes(prior, 2).flatten(1), torch.tensor([0, 1])
    expected = prior.log_conditionals(flat.view(2, *grid), labels).flatten(1, 2)
    for known in range(prior.num_positions):
        got = offered(prior, flat[:, known:], labels, prefix=flat[:, :known])
        torch.testing.assert_close(got, expected[:, known:], atol=1e-11, rtol=0)


def test_it_learns_a_pattern() -> None:
    """Codes repeat the one at the left above, or start anew by the class: what each position needs is two back."""
    torch.manual_seed(0)
    prior = PixelCNNPrior(num_codes=4, grid=(4, 4), num_classes=2, width=32, depth=3)
    optimiser = torch.optim.Adam(prior.parameters(), lr=3e-3)

    def draw(num: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(2, (num,))
        codes = torch.randint(2, (num, 4, 4)) + 2 * labels[:, None, None]
        for row in range(1, 4):
            codes[:, row, 1:] = codes[:, row - 1, :-1]
        return codes, labels

    for _ in range(150):
        optimiser.zero_grad()
        codes, labels = draw(32)
        (-prior(codes, labels).mean()).backward()
        optimiser.step()
    codes, labels = draw(64)
    # Seven positions are coins, ln 2 each; the nine others follow from them, and the class from the label.
    rate = -prior.eval()(codes, labels).mean().item()
    assert 7 * 0.69 < rate < 7 * 0.6931 + 0.5
    samples = prior.sample(64, labels, generator=seeded())
    assert ((samples // 2) == labels[:, None, None]).float().mean() > 0.98
    assert (samples[:, 1:, 1:] == samples[:, :-1, :-1]).float().mean() > 0.95
