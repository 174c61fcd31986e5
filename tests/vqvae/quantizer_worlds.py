"""Quantizers of every kind and every sensible composition, small, and features for them."""

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vqvae.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    EMAVectorQuantizer,
    GroupedQuantizer,
    GumbelQuantizer,
    MultiScaleQuantizer,
    ProjectedQuantizer,
    Quantized,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    SoftEMVectorQuantizer,
    StochasticVectorQuantizer,
    VectorQuantizer,
)
from vqvae.quantizers.categorical import CategoricalQuantizer
from vqvae.quantizers.codebook import CodebookQuantizer

GRIDS = ((), (7,), (4, 5), (2, 3, 4))
SCALES = (1, 2, 3, 5)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A quantizer under the contract.

    Attributes:
        config: its options.
        grids: grids of features that it takes.
        extra: what others test too, in another composition; left to the slow tests.
        random: its training forward draws.
        soft: its training forward gives mixtures of codes.
    """

    config: Quantizer.Config
    grids: tuple[tuple[int, ...], ...] = GRIDS
    extra: bool = False
    random: bool = False
    soft: bool = False
    grid = (5, 5)  # one that a VQVAE could have


def learned(**options) -> VectorQuantizer.Config:
    return VectorQuantizer.Config(**{"num_codes": 16, "dim": 6, **options})


def ema(**options) -> EMAVectorQuantizer.Config:
    return EMAVectorQuantizer.Config(**{"num_codes": 16, "dim": 6, **options})


def soft_em(**options) -> SoftEMVectorQuantizer.Config:
    return SoftEMVectorQuantizer.Config(**{"num_codes": 16, "dim": 6, **options})


def residual(quantizer: Quantizer.Config, **options) -> ResidualQuantizer.Config:
    return ResidualQuantizer.Config(**{"depth": 3, "quantizer": quantizer, **options})


def grouped(quantizer: Quantizer.Config) -> GroupedQuantizer.Config:
    return GroupedQuantizer.Config(num_groups=2, quantizer=quantizer)


def projected(quantizer: Quantizer.Config) -> ProjectedQuantizer.Config:
    return ProjectedQuantizer.Config(dim=6, quantizer=quantizer)


def multiscale(quantizer: Quantizer.Config) -> MultiScaleQuantizer.Config:
    return MultiScaleQuantizer.Config(scales=SCALES, quantizer=quantizer)


SIMVQ = SimVQ.Config(num_codes=16, dim=6, rotation=False)
IBQ_SMALL = IBQ.Config(num_codes=16, dim=6)
GUMBEL = GumbelQuantizer.Config(num_codes=16, dim=6)
SQVAE = StochasticVectorQuantizer.Config(num_codes=16, dim=6, hard=True)
FSQ_SMALL = FSQ.Config(levels=(5, 4, 3))
LFQ_SMALL = LFQ.Config(num_bits=5)
BSQ_SMALL = BSQ.Config(num_bits=10)

KINDS = {
    "learned": learned(),
    "ema": ema(),
    "soft em": soft_em(),
    "simvq": SIMVQ,
    "ibq": IBQ_SMALL,
    "gumbel": GUMBEL,
    "sqvae": SQVAE,
    "fsq": FSQ_SMALL,
    "lfq": LFQ_SMALL,
    "bsq": BSQ_SMALL,
    "projected learned": projected(learned(dim=3, normalize=True)),
    "grouped ema": grouped(ema(dim=3)),
    "residual ema": residual(ema()),
    "multiscale ema": multiscale(ema()),
}

_CONFIGS = {
    **KINDS,
    "learned, normalised": learned(normalize=True),
    "learned, rotation": learned(rotation=True),
    "learned, clustered": learned(revival="clustered"),
    "learned, no revival": learned(revival="off"),
    "ema, normalised": ema(normalize=True),
    "ema, rotation": ema(rotation=True),
    "ema, normalised, rotation": ema(normalize=True, rotation=True),
    "ema, clustered": ema(revival="clustered"),
    "ema, one code": ema(num_codes=1),
    "soft em, one sample": soft_em(num_samples=1),
    "simvq, rotation": SimVQ.Config(num_codes=16, dim=6, rotation=True),
    "gumbel, soft": GumbelQuantizer.Config(num_codes=16, dim=6, hard=False),
    "sqvae, soft": StochasticVectorQuantizer.Config(num_codes=16, dim=6),
    "fsq, even": FSQ.Config(levels=(8, 4)),
    "fsq, two levels": FSQ.Config(levels=(2, 2, 5)),
    "bsq, 36 bits": BSQ.Config(num_bits=36),
    "projected fsq": projected(FSQ_SMALL),
    "projected lfq": projected(LFQ_SMALL),
    "projected residual": projected(residual(ema(dim=3), depth=2)),
    "grouped, rotation": grouped(ema(dim=3, rotation=True)),
    "grouped lfq": grouped(LFQ_SMALL),
    "grouped residual": grouped(residual(ema(dim=3), depth=2)),
    "residual, shared": residual(ema(), shared=True),
    "residual, dropout": residual(ema(), dropout=0.5),
    "residual, shared, dropout": residual(learned(), shared=True, dropout=0.5),
    "residual, rotation": residual(ema(rotation=True)),
    **{f"residual {name}": residual(KINDS[name]) for name in ("learned", "soft em", "ibq", "gumbel", "sqvae")},
    **{f"residual {name}": residual(KINDS[name]) for name in ("fsq", "lfq", "bsq")},
    "grouped sqvae": grouped(StochasticVectorQuantizer.Config(num_codes=16, dim=3, hard=True)),
    "residual grouped": residual(grouped(ema(dim=3)), depth=2),
    "residual projected": residual(projected(learned(dim=3, normalize=True)), depth=2),
    "multiscale fsq": multiscale(FSQ_SMALL),
}


EXTRA = {"ema, normalised, rotation", "fsq, two levels", "grouped, rotation", "residual, shared, dropout"}


def _member(name: str, config: Quantizer.Config, extra: bool) -> Member:
    return Member(
        config=config,
        extra=extra,
        grids=((5, 5),) if "multiscale" in name else GRIDS,
        random=any(word in name for word in ("gumbel", "sqvae", "soft em", "dropout")),
        soft="soft" in name,
    )


MEMBERS = {name: _member(name, config, name in EXTRA) for name, config in _CONFIGS.items()}
# One inside another inside another, with a random depth inside, and with kinds that gather statistics.
DEEP = {
    name: _member(name, config, extra=True)
    for name, config in {
        "grouped residual dropout": grouped(residual(ema(dim=3), dropout=0.5)),
        "residual residual dropout": residual(residual(ema(), depth=2, dropout=0.5), depth=2),
        "projected grouped residual": projected(grouped(residual(learned(dim=2), depth=2))),
        "residual projected ibq dropout": residual(projected(IBQ_SMALL), depth=2, dropout=0.5),
        "grouped projected lfq": grouped(projected(LFQ_SMALL)),
        "residual grouped gumbel": residual(grouped(GumbelQuantizer.Config(num_codes=16, dim=3)), depth=2),
        "projected residual sqvae dropout": projected(residual(SQVAE, depth=2, dropout=0.5)),
        "residual soft em dropout": residual(soft_em(), dropout=0.5),
        "projected multiscale": projected(multiscale(ema())),
        "multiscale projected gumbel": multiscale(projected(GUMBEL)),
    }.items()
}
ALL = {**MEMBERS, **DEEP}
PARAMS = [pytest.param(name, marks=pytest.mark.slow if MEMBERS[name].extra else ()) for name in MEMBERS]
ALL_PARAMS = [*PARAMS, *(pytest.param(name, marks=pytest.mark.slow) for name in DEEP)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(dim: int, *shape: int, seed: int = 1) -> Tensor:
    """Normal features `"*shape dim"`."""
    return torch.randn(*shape, dim, generator=generator(seed))


def objective(q: Quantized) -> Tensor:
    """Something to train on: a task of the vectors, and the terms."""
    weights = torch.linspace(-1, 1, q.z_q.shape[-1], dtype=q.z_q.dtype, device=q.z_q.device)
    return (q.z_q * weights).sum(-1).sin().sum() + sum(q.auxiliary.values())


def take_step(quantizer: Quantizer, z_e: Tensor) -> Quantized:
    """A step of training: gradient descent on the parameters that have one, then `update`."""
    q = quantizer(z_e)
    parameters = list(quantizer.parameters())
    if parameters:
        gradients = torch.autograd.grad(objective(q) / len(z_e), parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter -= 0.02 * gradient
    quantizer.update()
    return q


@functools.cache
def _trained(name: str) -> Quantizer:
    torch.manual_seed(0)
    quantizer = ALL[name].config.build()
    for step in range(4):
        take_step(quantizer, features(quantizer.dim, 4, *ALL[name].grid, seed=100 + step))
    return quantizer


def trained(name: str) -> Quantizer:
    """The member after a few steps, in training mode; a copy of its own for each caller."""
    return copy.deepcopy(_trained(name))


def state_of(quantizer: Quantizer) -> dict[str, Tensor]:
    """A copy of all that is saved."""
    return {name: tensor.detach().clone() for name, tensor in quantizer.state_dict().items()}


def unchanged(quantizer: Quantizer, before: dict[str, Tensor]) -> bool:
    """Whether all that is saved is as before; a posterior's number of updates is a clock, which goes on."""
    clocks = {
        f"{path}.num_updates".lstrip(".")
        for path, module in quantizer.named_modules()
        if isinstance(module, CategoricalQuantizer)
    }
    now = quantizer.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now.keys() - clocks)


_DRAWS = {
    (owner, name): getattr(owner, name)
    for owner, name in ((torch, "rand"), (torch, "randint"), (torch, "multinomial"), (Tensor, "exponential_"))
}


def steady_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on each call draws by a seed of its own, so that a longer batch draws the same for its first rows."""
    calls = itertools.count()

    def steady(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **options: original(*args, **{**options, "generator": generator(next(calls))})

    for (owner, name), original in _DRAWS.items():
        monkeypatch.setattr(owner, name, steady(original))


def codebooks(quantizer: Quantizer) -> list[CodebookQuantizer]:
    """The listed codebooks inside."""
    return [module for module in quantizer.modules() if isinstance(module, CodebookQuantizer)]
