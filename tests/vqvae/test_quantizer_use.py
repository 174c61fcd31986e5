"""Quantizers in use: their options, inside a model, compiled, and what they refuse and warn of."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lanes import some
from quantizer_worlds import KINDS, MEMBERS, PARAMS, ema, features, grouped, learned, multiscale, residual, trained

from safefolder.configured import concrete
from vqvae import VQVAE
from vqvae.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    MASKED,
    EMAVectorQuantizer,
    GroupedQuantizer,
    GumbelQuantizer,
    MultiScaleQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)
from vqvae.quantizers.positionwise import PositionwiseQuantizer

ALL_KINDS = [kind.Config for kind in concrete(Quantizer) if kind.__module__.startswith("vqvae.")]


@pytest.fixture(params=PARAMS)
def name(request):
    return request.param


@pytest.fixture
def member(name):
    return MEMBERS[name]


@pytest.fixture
def quantizer(name):
    return trained(name)


# --- configs and models -----------------------------------------------------------------------------------------------


def test_all_kinds_are_members():
    assert {type(member.config) for member in MEMBERS.values()} == set(ALL_KINDS)
    assert len(KINDS) == len({type(config) for config in KINDS.values()}) == len(ALL_KINDS) == 14


def tiny(member) -> VQVAE.Config:
    return VQVAE.Config(image_size=10, downsampling=2, width=8, num_blocks=0, quantizer=member.config)


def test_config_survives_json(member):
    plain = json.loads(json.dumps(tiny(member).to_plain()))
    assert VQVAE.Config.from_plain(plain) == tiny(member)


def test_model_trains_and_round_trips(member, tmp_path):
    torch.manual_seed(0)
    model = tiny(member).build()
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


# --- compiling --------------------------------------------------------------------------------------------------------


def compile_in_processes(names: list[str], *options: str, num: int = 2) -> None:
    """Away from the type checker's hook, which torch.compile cannot trace; in a few processes at a time."""
    script = Path(__file__).with_name("quantizer_compile.py")
    running = [
        subprocess.Popen([sys.executable, str(script), *options, *part], stderr=subprocess.PIPE, text=True)
        for part in (names[i::num] for i in range(num))
        if part
    ]
    errors = [process.communicate()[1] for process in running]
    failed = [error for process, error in zip(running, errors, strict=True) if process.returncode]
    assert not failed, "\n".join(error[-6000:] for error in failed)


@pytest.mark.slow
def test_kinds_compile_and_export_whole():
    compile_in_processes(list(KINDS))


@pytest.mark.slow
def test_members_compile_and_export_whole():
    compile_in_processes([name for name in MEMBERS if name not in KINDS])


@pytest.mark.slow
def test_compiles_with_the_default_backend():
    compile_in_processes(["residual ema"], "--inductor")


# --- what is refused, and what is warned of ---------------------------------------------------------------------------


def test_bad_features_are_a_sentence(member, quantizer, untyped):
    dim = quantizer.dim
    with pytest.raises(ValueError, match=f"d = {dim} last"):
        quantizer(torch.zeros(2, 5, 5, dim + 1))
    with pytest.raises(ValueError, match="got shape"):
        quantizer(torch.zeros(dim))
    with pytest.raises(ValueError, match="floating-point"):
        quantizer(torch.zeros(2, 5, 5, dim, dtype=torch.int64))
    for mask in (torch.ones(3, dtype=torch.bool), torch.ones(2, 5, 5)):
        with pytest.raises(ValueError, match="boolean mask of shape"):
            quantizer(torch.zeros(2, 5, 5, dim), mask)
    if not quantizer.positionwise:
        with pytest.raises(ValueError, match="features must be 5x5"):
            quantizer(torch.zeros(2, 4, 5, dim))


def test_bad_codes_are_a_sentence(quantizer, untyped):
    codes = torch.zeros(2, *quantizer.code_grid((5, 5)), dtype=torch.int64)
    for wrong in (quantizer.num_codes, MASKED - 1):
        spoiled = codes.clone()
        spoiled.reshape(-1)[-1] = wrong
        with pytest.raises(ValueError, match="must lie in"):
            quantizer.decode(spoiled)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match="integers"):
            quantizer.decode(codes.to(dtype))
    if quantizer.code_axes or not quantizer.positionwise:
        with pytest.raises(ValueError, match="expected codes"):
            quantizer.decode(torch.cat([codes, codes], dim=-1))
    with pytest.raises(ValueError, match="expected codes"):
        quantizer.decode(torch.tensor(0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (residual(learned(normalize=True)), "ProjectedQuantizer"),
        (residual(ema(normalize=True)), "no unit vector"),
        (residual(grouped(ema(dim=3, normalize=True))), "no unit vector"),
        (residual(multiscale(ema())), "put a ResidualQuantizer inside it instead|cannot stand inside"),
        (grouped(multiscale(ema())), "cannot stand inside"),
        (grouped(residual(multiscale(ema()))), "cannot stand inside"),
        (multiscale(ema(normalize=True)), "ProjectedQuantizer"),
        (multiscale(grouped(ema(dim=3))), "one code a position"),
        (multiscale(residual(ema())), "one code a position"),
        (multiscale(multiscale(ema())), "one code a position"),
        (MultiScaleQuantizer.Config(scales=()), "growing scales"),
        (MultiScaleQuantizer.Config(scales=(0, 2)), "growing scales"),
        (MultiScaleQuantizer.Config(scales=(1, 3, 3)), "growing scales"),
        (MultiScaleQuantizer.Config(scales=(3, 2)), "growing scales"),
        (ResidualQuantizer.Config(depth=0), "depth of at least 1"),
        (ResidualQuantizer.Config(dropout=2.0), r"dropout in \[0, 1\]"),
        (ResidualQuantizer.Config(dropout=-0.1), r"dropout in \[0, 1\]"),
        (GroupedQuantizer.Config(num_groups=0), "at least one group"),
        (FSQ.Config(levels=(8, 1)), "at least 2 levels"),
        (FSQ.Config(levels=()), "at least 2 levels"),
        (FSQ.Config(levels=(2**16,) * 4), "fewer than 2\\^63"),
        (LFQ.Config(num_bits=0), "1 to 20 bits"),
        (LFQ.Config(num_bits=21), "BSQ does without"),
        (BSQ.Config(num_bits=63), "GroupedQuantizer"),
        (BSQ.Config(temperature=0.0), "temperature above 0"),
        (ema(decay=1.0), "decay"),
        (ema(decay=-0.1), "decay"),
        (GumbelQuantizer.Config(temperature=0.05), "final_temperature <= temperature"),
        (GumbelQuantizer.Config(final_temperature=0.0), "0 < final_temperature"),
        (GumbelQuantizer.Config(anneal_steps=0), "anneal_steps >= 1"),
        *(
            (kind(**sizes), "at least one")
            for kind in (
                VectorQuantizer.Config,
                EMAVectorQuantizer.Config,
                SimVQ.Config,
                IBQ.Config,
                GumbelQuantizer.Config,
            )
            for sizes in ({"num_codes": 0}, {"dim": 0})
        ),
    ],
    ids=repr,
)
def test_what_cannot_work_is_refused_with_a_sentence(config, message, untyped):
    with pytest.raises(ValueError, match=message) as caught:
        config.build()
    assert len(str(caught.value)) > 30


@pytest.mark.parametrize("kind", [learned, ema])
def test_an_unknown_revival_is_refused_with_a_sentence(kind, untyped):
    with pytest.raises(ValueError, match="unknown revival 'x', expected one of dead, clustered, off"):
        kind(revival="x").build()


def test_a_model_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="features must be 5x5"):
        VQVAE(image_size=28, quantizer=multiscale(ema()))


def num_collapse_warnings(quantizer, z_e: torch.Tensor, updates: int) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(updates):
            quantizer(z_e)
            quantizer.update()
    for warning in caught:
        assert issubclass(warning.category, UserWarning)
        assert "has collapsed" in str(warning.message)
    remedies = {module.remedy for module in quantizer.modules() if isinstance(module, PositionwiseQuantizer)}
    assert all(any(remedy in str(warning.message) for remedy in remedies) for warning in caught)
    return len(caught)


COLLAPSING = [name for name in KINDS if not name.startswith(("grouped", "multiscale"))]


@pytest.mark.parametrize("name", some([*COLLAPSING, "learned, no revival", "gumbel, soft", "multiscale fsq"]))
def test_collapse_is_warned_of_once(name, quantizer):
    """A codebook each is worth a warning; a constant that fills a posterior leaves nothing to draw."""
    constant = torch.full((16, *MEMBERS[name].grids[:2][-1], quantizer.dim), 100.0)
    num_codebooks = sum(isinstance(module, PositionwiseQuantizer) for module in quantizer.modules())
    assert num_collapse_warnings(quantizer, constant, 200) == num_codebooks
    assert num_collapse_warnings(quantizer, constant, 50) == 0


@pytest.mark.parametrize("name", some(KINDS))
def test_a_healthy_codebook_is_not_warned_of(name):
    quantizer = MEMBERS[name].config.build()
    for step in range(150):
        quantizer(features(quantizer.dim, 2, 5, 5, seed=step % 10))
        quantizer.update()
