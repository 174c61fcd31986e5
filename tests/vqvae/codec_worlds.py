"""Tiny models whose images are worth compressing: they are drawn from the models themselves."""

import torch

from priors import TransformerPrior, UniformPrior, UnigramPrior
from vqvae import VQVAE
from vqvae.codec import Archive, DamagedFile, Mode, recover
from vqvae.codec.block import BlockContent
from vqvae.codec.container import pack
from vqvae.codec.tiles import Tiling
from vqvae.likelihoods import Categorical, LocalContext, LogisticMixture, Normal
from vqvae.quantizers import FSQ, GumbelQuantizer, ResidualQuantizer, StochasticVectorQuantizer, VectorQuantizer

LIKELIHOODS = {
    "mixture": (1, LogisticMixture.Config(num_components=2)),
    "mixture with zero": (1, LogisticMixture.Config(num_components=2, zero_component=True)),
    "colour mixture": (3, LogisticMixture.Config(num_components=2)),
    "colour mixture with zero": (3, LogisticMixture.Config(num_components=2, zero_component=True)),
    "categorical": (1, Categorical.Config()),
    "normal": (1, Normal.Config(scale=30.0)),
    "colour normal": (3, Normal.Config(scale=30.0)),
    "local context": (1, LocalContext.Config(num_components=2, zero_component=True, width=8, num_blocks=2)),
    "colour local context": (3, LocalContext.Config(num_components=2, width=8, num_blocks=1)),
}
VQ = VectorQuantizer.Config(num_codes=8, dim=4)
QUANTIZERS = {
    "vq": VQ,
    "two codes": VectorQuantizer.Config(num_codes=2, dim=4),
    "fsq": FSQ.Config(levels=(3, 3)),
    "residual": ResidualQuantizer.Config(quantizer=VQ, depth=2),
}
POSTERIORS = {
    "gumbel": (GumbelQuantizer.Config(num_codes=8, dim=4), None),
    "stochastic": (StochasticVectorQuantizer.Config(num_codes=8, dim=4), None),
    "prior in the loop": (VQ, 1.0),
}


def model_of(likelihood="mixture", quantizer=VQ, beta=None, seed=0, size=8) -> VQVAE:
    """A model with random weights, large enough that its pixels depend on its codes."""
    torch.manual_seed(seed)
    channels, config = LIKELIHOODS[likelihood]
    model = VQVAE(
        image_size=size, num_channels=channels, width=8, num_blocks=1, likelihood=config, quantizer=quantizer, beta=beta
    )
    for name, parameter in model.named_parameters():
        if name.startswith(("decoder", "likelihood")) and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4 / parameter[0].numel() ** 0.5)
    # Each pixel's distribution is narrow, and depends on the codes a little: an encoder with random weights does not
    # find the codes that an image was drawn from.
    bias = model.decoder.layers[-1].bias
    with torch.no_grad():
        torch.nn.init.normal_(bias, std=5.0 if isinstance(config, Categorical.Config) else 0.5)
        if isinstance(config, LogisticMixture.Config | LocalContext.Config):
            k = config.num_components
            start = k + int(config.zero_component) + channels * k
            bias.view(-1, model.likelihood.num_features)[:, start : start + channels * k] -= 3
    return model.eval()


def model_with_posterior(kind) -> VQVAE:
    quantizer, beta = POSTERIORS[kind]
    model = model_of(quantizer=quantizer, beta=beta)
    if beta is not None:
        model.quantizer.error.fill_(1.0)
    return model


def transformer_of(model, num_classes=None, seed=1) -> TransformerPrior:
    torch.manual_seed(seed)
    config = TransformerPrior.Config(
        num_codes=model.num_codes, grid=model.grid, num_classes=num_classes, width=24, depth=2, num_heads=2
    )
    prior = config.build().eval()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return prior


def unigram_of(model) -> UnigramPrior:
    torch.manual_seed(2)
    codes = torch.randint(0, model.num_codes, (50, *model.grid)) % max(2, model.num_codes // 2)
    return UnigramPrior(num_codes=model.num_codes, grid=model.grid).fit(codes)


def uniform_of(model) -> UniformPrior:
    return UniformPrior(num_codes=model.num_codes, grid=model.grid)


def images_of(model, num, seed=3):
    """Images that the model would make: some pixels drawn, some not."""
    torch.manual_seed(seed)
    codes = torch.randint(0, model.num_codes, (num, *model.grid))
    return model.decode(codes, sample=True, generator=torch.Generator().manual_seed(seed))


def contents_of(codec, data):
    """What is in each block of a file."""
    with Archive.from_bytes(data) as archive:
        contents = [archive.content(i) for i in range(len(archive.blocks))]
    return [BlockContent.unpack(content, codec.coder.num_channels, codec.coder.size) for content in contents]


def rescued(codec, data):
    """The blocks of a damaged file that are whole and decode to what went in, and what is damaged."""
    found = recover(data)
    mode = None if found.header is None else found.header.mode
    blocks, damage = [], list(found.damage)
    for number, (_, content) in enumerate(found.blocks):
        try:
            blocks.append(codec.decoder.decode_alone(number, content, mode))
        except DamagedFile as error:
            damage.append(error.args[0])
    return blocks, damage


def claiming(codec, num, *, shape=(1, 8, 8), stream=b"", mode=Mode.LOSSLESS, has_labels=False, num_blocks=1):
    """The bytes of a file whose blocks claim so many images each, whatever their stream holds."""
    tiling = Tiling(shape=shape, num_channels=codec.coder.num_channels, size=codec.coder.size)
    kinds = [0] * (num * tiling.num_tiles)
    content = BlockContent(
        tilings=[tiling] * num, kinds=kinds, has_labels=has_labels, check=0, stream=stream, stored=b"", names=None
    )
    return pack(codec.header(mode), [(num, content.pack())] * num_blocks)
