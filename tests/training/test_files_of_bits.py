"""From training to a file: a run with local context, whose archive is as long as its ELBO says."""

import json
import math

import pytest
import torch

from priors import Prior
from vqvae import VQVAE, load_images
from vqvae.codec import Codec
from vqvae.likelihoods import LocalContext


def test_a_run_with_local_context_is_a_codec(run, options, photos, tmp_path, capsys):
    context = ["--likelihood", "LocalContext", "--model.likelihood.width", "8", "--model.likelihood.num-blocks", "1"]
    run(*options, *context)
    assert "distortion, no context" in capsys.readouterr().out
    folder = tmp_path / "run"
    figures = json.loads((folder / "elbo.json").read_text())
    model = VQVAE.from_pretrained(folder / "codebook")
    prior = Prior.from_pretrained(folder / "prior")
    assert isinstance(model.likelihood, LocalContext)
    data = load_images(str(photos), "test", size=8, channels=1)
    batch = data.__getitems__(range(len(data)))

    with torch.no_grad():
        out = model(batch.images)
        alone = -model.likelihood.features_log_prob(batch.images, out.features).mean()
    assert figures["features_distortion"] == pytest.approx(float(alone), rel=1e-5)
    assert figures["distortion"] == pytest.approx(float(out.distortion.mean()), rel=1e-5)

    codec = Codec(model, prior)
    codes = codec.coder.encode(batch.images, batch.labels)
    plan, _ = codec.coder.settle(batch.images, codes, batch.labels)
    nats = (plan.rate() + plan.distortion() + codec.coder.label_bits).mean() * math.log(2)
    # Labels at even odds, codes given them, pixels: the negative ELBO that the run stated.
    assert float(nats) == pytest.approx(figures["negative_elbo"], rel=1e-4)
    assert torch.equal(codec.decompress(codec.compress(batch.images, batch.labels)), batch.images)
