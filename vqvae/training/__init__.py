"""Training a codebook and a prior; `vqvae.training.command` says what is where."""
