"""What tests read from a run's folder."""

from pathlib import Path


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every model of a run."""
    return {path.parent.name: path.read_bytes() for path in sorted(folder.glob("*/model.safetensors"))}
