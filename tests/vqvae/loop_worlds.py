"""A prior and its loop on a world of 81 grids of codes, with the posterior written out."""

import itertools

import torch
from quantizer_worlds import generator
from torch import Tensor
from torch.nn import functional as F

from priors import Prior, TransformerPrior
from vqvae.quantizers.codebook import CodebookQuantizer
from vqvae.quantizers.prior_in_loop import Chosen, PriorInTheLoop, step_by_step

NUM_CODES, GRID, POSITIONS = 3, (2, 2), 4
# Every grid of codes, "81 2 2".
GRIDS = torch.tensor(list(itertools.product(range(NUM_CODES), repeat=POSITIONS))).reshape(-1, *GRID)
BETAS = (0.3, 1.0, 2.5)


def make_prior(num_codes: int = NUM_CODES, grid: tuple[int, ...] = GRID, num_classes: int | None = None) -> Prior:
    """A small transformer that is far from uniform, in float64."""
    torch.manual_seed(7)
    config = TransformerPrior.Config(
        num_codes=num_codes, grid=grid, num_classes=num_classes, width=16, depth=1, num_heads=2
    )
    prior = config.build()
    with torch.no_grad():
        for weight in prior.parameters():
            weight.mul_(0.3 / weight.std())
    return prior.double().eval()


def make_loop(prior: Prior, num: int, beta: float = 1.0, num_iterations: int | None = None) -> PriorInTheLoop:
    return PriorInTheLoop(
        log_conditionals=prior.log_conditionals,
        relaxed_log_conditionals=prior.relaxed_log_conditionals,
        walk=lambda chooser: prior.walk(num, chooser),
        beta=beta,
        num_iterations=num_iterations,
    )


def make_costs(num: int = 5) -> Tensor:
    return 3 * torch.rand(num, *GRID, NUM_CODES, generator=generator(3), dtype=torch.float64)


def distances_in_nats(quantizer: CodebookQuantizer, z_e: Tensor) -> Tensor:
    """c of each vector and code, "b *grid k", written out: σ² is four times the mean error."""
    projected = F.normalize(z_e, dim=-1) if quantizer.normalize else z_e
    squares = (projected[..., None, :] - quantizer.table).square().sum(-1)
    return squares / (2 * 4 * quantizer.error)


def written_out(prior: Prior, costs: Tensor, beta: float, labels: Tensor | None = None) -> Tensor:
    """ln P_enc of every grid, "b 81": the product of softmax(ln P(. | before) - c / beta) over the positions."""
    rows = []
    for index, cost in enumerate(costs):
        known = None if labels is None else labels[index].expand(len(GRIDS))
        steps = prior.log_conditionals(GRIDS, known) - cost / beta
        logs = steps - steps.logsumexp(-1, keepdim=True)
        rows.append(sum(logs[:, i, j].gather(1, GRIDS[:, i, j, None])[:, 0] for i in range(2) for j in range(2)))
    return torch.stack(rows).detach()


def forcing(grids: Tensor, num_codes: int = NUM_CODES) -> Tensor:
    """Noise that makes these the draws, whatever the posterior."""
    return 1e9 * F.one_hot(grids, num_codes).double()


def every_draw(prior: Prior, cost: Tensor, beta: float) -> Chosen:
    """What `step_by_step` says of every grid, for one image."""
    costs = cost.expand(len(GRIDS), *cost.shape)
    chosen = step_by_step(costs, make_loop(prior, len(GRIDS), beta), forcing(GRIDS))
    assert torch.equal(chosen.codes, GRIDS)
    return chosen
