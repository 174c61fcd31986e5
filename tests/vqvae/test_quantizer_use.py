"""Quantizers in use: inside a model, compiled, and what they refuse and warn of."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lanes import some
from quantizer_worlds import KINDS, MEMBERS, ema, features, grouped, learned, multiscale, residual, trained

from safefolder.configured import concrete
from vqvae import VQVAE
from vqvae.quantizers import (
    BSQ,
    FSQ,
    LFQ,
    MASKED,
    GroupedQuantizer,
    GumbelQuantizer,
    MultiScaleQuantizer,
    Quantizer,
    ResidualQuantizer,
)
from vqvae.quantizers.positionwise import PositionwiseQuantizer

ALL_KINDS = [kind.Config for kind in concrete(Quantizer) if kind.__module__.startswith("vqvae.")]


def test_all_kinds_are_members():
    assert {type(config) for config in KINDS.values()} == set(ALL_KINDS)
    assert len(KINDS) == len(ALL_KINDS) == 14


@pytest.mark.parametrize("name", [*KINDS, "residual, dropout", "grouped residual"])
def test_model_trains_and_round_trips(name, tmp_path):
    torch.manual_seed(0)
    config = MEMBERS[name].config
    model = VQVAE(image_size=10, downsampling=2, width=8, num_blocks=0, quantizer=config)
    y = torch.randint(0, 256, (3, 1, 10, 10), dtype=torch.uint8)
    model(y)
    model.quantizer.update()
    out = model(y)
    (out.distortion.mean() + sum(out.quantized.auxiliary.values())).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.parameters())
    model.quantizer.update()
    model.eval()
    codes = model.encode(y)
    assert tuple(codes.shape[1:]) == model.grid
    assert torch.equal(model.decode(codes), model.reconstruct(model(y)))
    model.save_pretrained(tmp_path / "model")
    twin = VQVAE.from_pretrained(tmp_path / "model")
    assert twin.config == model.config
    assert torch.equal(twin.encode(y), codes)
    assert torch.equal(twin.decode(codes), model.decode(codes))


COMPOSITIONS = [name for name in MEMBERS if name not in KINDS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "names"), [("aot_eager", [*KINDS, *COMPOSITIONS[::4]]), ("inductor", ["residual ema"])]
)
def test_kinds_compile_and_export_whole(backend, names):
    """Away from the type checker's hook, which torch.compile cannot trace; in two processes."""
    command = [sys.executable, str(Path(__file__).with_name("quantizer_compile.py")), backend]
    parts = [names[::2], names[1::2]]
    running = [subprocess.Popen([*command, *part], stderr=subprocess.PIPE, text=True) for part in parts]
    errors = [process.communicate()[1] for process in running]
    assert not any(process.returncode for process in running), "\n".join(error[-6000:] for error in errors)


@pytest.mark.parametrize("name", KINDS)
def test_bad_features_and_codes_are_a_sentence(name, untyped):
    quantizer = trained(name)
    dim = quantizer.dim
    good, codes = torch.zeros(2, 5, 5, dim), torch.zeros(2, *quantizer.code_grid((5, 5)), dtype=torch.int64)
    for wrong, message in (
        (torch.zeros(2, 5, 5, dim + 1), f"d = {dim} last"),
        (torch.zeros(dim), "got shape"),
        (good.long(), "floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            quantizer(wrong)
    for mask in (torch.ones(3, dtype=torch.bool), torch.ones(2, 5, 5)):
        with pytest.raises(ValueError, match="boolean mask of shape"):
            quantizer(good, mask)
    if not quantizer.positionwise:
        with pytest.raises(ValueError, match="features must be 5x5"):
            quantizer(good[:, 1:])
    for wrong in (quantizer.num_codes, MASKED - 1):
        spoiled = codes.clone()
        spoiled.reshape(-1)[-1] = wrong
        with pytest.raises(ValueError, match="must lie in"):
            quantizer.decode(spoiled)
    with pytest.raises(ValueError, match="integers"):
        quantizer.decode(codes.float())
    if quantizer.code_axes or not quantizer.positionwise:
        with pytest.raises(ValueError, match="expected codes"):
            quantizer.decode(torch.cat([codes, codes], dim=-1))
    with pytest.raises(ValueError, match="expected codes"):
        quantizer.decode(torch.tensor(0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (residual(learned(normalize=True)), "ProjectedQuantizer"),
        (residual(grouped(ema(dim=3, normalize=True))), "no unit vector"),
        (residual(multiscale(ema())), "cannot stand inside a ResidualQuantizer"),
        (grouped(residual(ema(), dropout=2.0)), r"dropout in \[0, 1\]"),
        (grouped(multiscale(ema())), "cannot stand inside a GroupedQuantizer"),
        (multiscale(ema(normalize=True)), "ProjectedQuantizer"),
        (multiscale(grouped(ema(dim=3))), "one code a position"),
        (multiscale(multiscale(ema())), "one code a position"),
        (MultiScaleQuantizer.Config(scales=()), "growing scales"),
        (MultiScaleQuantizer.Config(scales=(0, 2)), "growing scales"),
        (MultiScaleQuantizer.Config(scales=(1, 3, 3)), "growing scales"),
        (ResidualQuantizer.Config(depth=0), "depth of at least 1"),
        (GroupedQuantizer.Config(num_groups=0), "at least one group"),
        (FSQ.Config(levels=(8, 1)), "at least 2 levels"),
        (FSQ.Config(levels=()), "at least 2 levels"),
        (FSQ.Config(levels=(2**16,) * 4), "fewer than 2\\^63"),
        (LFQ.Config(num_bits=0), "1 to 20 bits"),
        (LFQ.Config(num_bits=21), "BSQ does without"),
        (BSQ.Config(num_bits=63), "GroupedQuantizer"),
        (BSQ.Config(temperature=0.0), "temperature above 0"),
        (ema(decay=1.0), "decay"),
        (ema(dim=0), "at least one"),
        (learned(num_codes=0), "at least one"),
        (GumbelQuantizer.Config(temperature=0.05), "final_temperature <= temperature"),
        (GumbelQuantizer.Config(final_temperature=0.0), "0 < final_temperature"),
        (GumbelQuantizer.Config(anneal_steps=0), "anneal_steps >= 1"),
    ],
    ids=repr,
)
def test_what_cannot_work_is_refused_with_a_sentence(config, message, untyped):
    with pytest.raises(ValueError, match=message) as caught:
        config.build()
    assert len(str(caught.value)) > 30


def test_an_unknown_revival_and_a_model_of_another_grid_are_refused(untyped):
    with pytest.raises(ValueError, match="unknown revival 'x', expected one of dead, clustered, off"):
        ema(revival="x").build()
    with pytest.raises(ValueError, match="features must be 5x5"):
        VQVAE(image_size=28, quantizer=multiscale(ema()))


def collapse_warnings(quantizer: Quantizer, z_e: torch.Tensor, updates: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(updates):
            quantizer(z_e)
            quantizer.update()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", ["ema", "learned, no revival", "gumbel", "fsq", "residual ema"])
def test_collapse_is_warned_of_once(name):
    """A codebook each is worth a warning; a constant that fills a posterior leaves nothing to draw."""
    quantizer = trained(name)
    constant = torch.full((16, 7, quantizer.dim), 100.0)
    books = [module for module in quantizer.modules() if isinstance(module, PositionwiseQuantizer)]
    told = collapse_warnings(quantizer, constant, 200)
    assert len(told) == len(books)
    assert all("has collapsed" in message and books[0].remedy in message for message in told)
    assert not collapse_warnings(quantizer, constant, 50)


@pytest.mark.parametrize("name", some(KINDS))
def test_a_healthy_codebook_is_not_warned_of(name):
    quantizer = MEMBERS[name].config.build()
    for step in range(150):
        quantizer(features(quantizer.dim, 2, 5, 5, seed=step % 10))
        quantizer.update()
