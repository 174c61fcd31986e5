"""`python -m vqvae` is the `vqvae` command."""

from vqvae.cli import main

if __name__ == "__main__":
    main()
