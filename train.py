"""Train a codebook, then a prior over its codes, and state what both are worth in bits: `vqvae train` in a clone.

    python train.py                                    # embedded images, a few minutes on two CPU cores
    python train.py --preset cifar10 --run runs/mine   # another preset, another folder
    python train.py --preset folder --data.source photos
    python train.py --resume                           # go on after Ctrl-C or a kill

A run is a folder. Stage `codebook` writes `codebook/`; `prior` reads it and writes `prior/`, `unigram/` and
`ngram/`; `evaluate` reads all of them and writes `elbo.json` and the pictures. `--stage all`, the default, does the
three in turn.
"""

from vqvae.training.command import main

if __name__ == "__main__":
    main()
