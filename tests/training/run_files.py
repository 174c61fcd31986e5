"""What tests read from a run's folder, and what they change of its options."""

from pathlib import Path

# 60 images of 8x8 and models to match, in seconds; pairs of an option and its value.
SMALL = [
    "--preset",
    "folder",
    "--model.image-size",
    "8",
    "--model.num-channels",
    "1",
    "--model.width",
    "8",
    "--model.num-blocks",
    "1",
    "--model.quantizer.num-codes",
    "8",
    "--model.quantizer.dim",
    "4",
    "--model.likelihood.num-components",
    "2",
    "--data.num-workers",
    "0",
    "--codebook-fit.num-steps",
    "8",
    "--codebook-fit.batch-size",
    "8",
    "--codebook-fit.num-warmup",
    "2",
    "--codebook-fit.save-every",
    "2",
    "--codebook-fit.validate-every",
    "4",
    "--prior.width",
    "16",
    "--prior.depth",
    "1",
    "--prior.num-heads",
    "2",
    "--prior.dropout",
    "0.1",
    "--prior-fit.num-steps",
    "6",
    "--prior-fit.batch-size",
    "8",
    "--prior-fit.num-warmup",
    "2",
    "--prior-fit.save-every",
    "2",
    "--prior-fit.validate-every",
    "3",
    "--precision",
    "32-true",
]


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every model of a run."""
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("*/model.safetensors"))}


def gaussian(options: list[str]) -> list[str]:
    """The small run's options for Gaussian latents, which have no quantizer."""
    pairs = zip(options[::2], options[1::2], strict=True)
    kept = [word for pair in pairs if not pair[0].startswith("--model.quantizer.") for word in pair]
    return [*kept, "--latents", "gaussian", "--model.dim", "3"]
