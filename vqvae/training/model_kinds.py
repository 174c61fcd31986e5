"""The kinds of model, quantizer and likelihood that a run can train, by the names of the command line."""

from safefolder.configured import concrete
from safefolder.options import option_fields
from vqvae import VQVAE, Autoencoder, GaussianVAE
from vqvae.likelihoods import Categorical, Likelihood, LocalContext, LogisticMixture, Normal
from vqvae.quantizers import Quantizer

QUANTIZERS: dict[str, type[Quantizer]] = {kind.__name__: kind for kind in concrete(Quantizer)}
LATENTS: dict[str, type[Autoencoder]] = {"codes": VQVAE, "gaussian": GaussianVAE}
LIKELIHOODS: dict[str, type[Likelihood]] = {
    kind.__name__: kind for kind in (LogisticMixture, LocalContext, Categorical, Normal)
}


def with_latents(model: Autoencoder.Config, kind: type[Autoencoder]) -> Autoencoder.Config:
    """The sizes and the likelihood of one kind of model, for another."""
    if issubclass(model.owner, kind):
        return model
    shared = {each.name for each in option_fields(kind.Config)} & {each.name for each in option_fields(type(model))}
    return kind.Config(**{name: getattr(model, name) for name in shared - {"quantizer", "dim", "beta"}})


def quantizer_named(path: str) -> Quantizer.Config:
    """The default options of a kind, and of the kinds inside it: "ResidualQuantizer/FSQ"."""
    config = None
    for kind in reversed(path.split("/")):
        if kind not in QUANTIZERS:
            raise ValueError(
                f"unknown quantizer {kind!r}, expected one of {', '.join(QUANTIZERS)}, or two with a slash"
            )
        if config is None:
            config = QUANTIZERS[kind].Config()
        elif "quantizer" in {each.name for each in option_fields(QUANTIZERS[kind].Config)}:
            config = QUANTIZERS[kind].Config(quantizer=config)
        else:
            raise ValueError(f"{kind} has no quantizer inside, got {path!r}")
    assert config is not None
    return config


def quantizer_name(config: Quantizer.Config) -> str:
    """What the command line calls a kind, with those inside it."""
    kind = config.owner.__name__
    inner = getattr(config, "quantizer", None)
    return kind if inner is None else f"{kind}/{quantizer_name(inner)}"
