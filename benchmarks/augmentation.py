"""What random crops and flips do to held-out photographs, at equal time: PSNR, and bits under the whole model.

    python -m benchmarks augmentation --folder photographs [--num-steps 3000] [--crops 0.3 0.5 0.8]

Each is trained by `train.py`, the preset `folder`, for as many seconds as `num_steps` steps take without augmentation:
a fifth of the steps are timed first, once of each. Test images are the middle of what was held out, whatever was shown
in training. What stands after `--` goes to `train.py`. Without a folder, 200 pictures are made here, of blurred noise,
which says nothing of photographs.
"""

import csv
import tempfile
from pathlib import Path

from tyro.conf import Positional

from benchmarks import harness
from benchmarks.loader import make_folder

QUICK = "--num-steps 5 --crops 0.5 --num-pictures 30 -- --model.image-size 16 --model.width 8 --model.num-blocks 1"


def main(
    options: Positional[tuple[str, ...]] = (),
    /,
    folder: Path | None = None,
    num_steps: int = 3000,
    crops: tuple[float, ...] = (0.3, 0.5, 0.8),
    seeds: tuple[int, ...] = (0,),
    num_pictures: int = 200,
) -> None:
    """Train each once a seed. num_pictures: that are made here."""
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder = Path(scratch) / "pictures"
            make_folder(folder, ".jpg", num_pictures, 300, 200)
        first = ("--preset", "folder", "--data.source", folder.resolve(), *options)
        flip = "--data.augment.flip"
        ways: dict[str, tuple[object, ...]] = {"none": (), "flip": (flip,)}
        ways |= {f"crop {crop:g}, flip": ("--data.augment.crop", crop, flip) for crop in crops}
        table = harness.Table(
            "shown", "seed", "steps", "seconds", "PSNR (dB)", "bits/dim", "distortion (nats)", "rate (nats)"
        )
        seconds: dict[str, float] = {}
        for name, words in ways.items():
            run = Path(scratch) / f"timed {name}"
            steps = ("--codebook-fit.num-steps", max(1, num_steps // 5))
            harness.train(run, *first, *words, "--stage", "codebook", *steps)
            seconds[name] = _seconds(run) / max(1, num_steps // 5)
        for seed in seeds:
            for name, words in ways.items():
                run = Path(scratch) / f"{name} {seed}"
                steps = max(1, round(num_steps * seconds["none"] / seconds[name]))
                how = ("--seed", seed, *harness.steps(steps, max(1, num_steps // 2)))
                harness.train(run, *first, *words, *how)
                found = harness.elbo_of(run)
                figures = (f"{found['psnr']:.2f}", f"{found['bits_per_dim']:.4f}", f"{found['distortion']:.0f}")
                rate = f"{found['rate']['transformer']:.0f}"
                table.row(name, seed, steps, f"{_seconds(run):.0f}", *figures, rate)


def _seconds(run: Path) -> float:
    """What the codebook of a run took to train."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "codebook" and row["name"] == "seconds"]
    return float(rows[-1]["value"])
