"""`train.py` as a user runs it: what it reaches, how long it takes and what memory it needs.

    python -m benchmarks main_job -- --preset fashion-mini
    python -m benchmarks main_job --device cuda -- --preset fashion-mini
    python -m benchmarks main_job -- --preset fashion-mnist --data.root FOLDER_WITH_THE_IDX_FILES

What stands after `--` goes to `train.py`. The time is that of the whole process, its start and the pictures included;
the memory is the largest resident set of any of its processes, as the operating system accounts it.
"""

import tempfile
from pathlib import Path

from tyro.conf import Positional

from benchmarks import harness

QUICK = "-- --codebook-fit.num-steps 4 --prior-fit.num-steps 2"


def main(options: Positional[tuple[str, ...]] = (), /, run: Path | None = None, device: harness.Device = "cpu") -> None:
    """Run it once, in a temporary folder unless --run is given."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = run or Path(scratch) / "run"
        took = harness.train(folder, "--accelerator", device, *options, threads=None, quiet=False)
        result = harness.elbo_of(folder)
    rate = result["rate"]
    table = harness.Table("", "")
    table.row("test images", result["images"])
    nats = " / ".join(f"{nats:.1f}" for nats in rate.values())
    table.row(f"rate, prior {' / '.join(rate)} (nats)", nats)
    table.row("transformer under unigram", f"{1 - rate['transformer'] / rate['unigram']:.1%}")
    table.row("distortion (nats)", f"{result['distortion']:.1f}")
    table.row("negative ELBO (bits/dim)", f"{result['bits_per_dim']:.4f}")
    table.row("usage, perplexity", f"{result['usage']:.1%}, {result['perplexity']:.0f}")
    table.row("PSNR of reconstructions (dB)", f"{result['psnr']:.2f}")
    table.row("time, whole process (s)", f"{took.wall:.0f}")
    table.row("peak memory (GiB)", f"{took.peak:.2f}")
