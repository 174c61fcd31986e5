"""Run `train.py` as a user would, and say what it reached, how long it took and what memory it needed.

    python benchmarks/main_job.py -- --preset fashion-mini
    python benchmarks/main_job.py -- --preset fashion-mnist --data.root FOLDER_WITH_THE_IDX_FILES

What stands after `--` goes to `train.py`. The time is that of the whole process, its start and the pictures included;
the memory is the largest resident set of any of its processes, as the operating system accounts it.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="keep the run in this folder")
    parser.add_argument("args", nargs="*", help="options of train.py, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.run or Path(scratch) / "run"
        began = time.monotonic()
        command = [sys.executable, str(ROOT / "train.py"), *options.args, "--run", str(folder)]
        subprocess.run(command, check=True)
        seconds = time.monotonic() - began
        result = json.loads((folder / "elbo.json").read_text())
    # Linux counts in KiB.
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    rate = result["rate"]
    rows = {
        "test images": result["images"],
        "rate, uniform / unigram / transformer prior (nats)": " / ".join(f"{nats:.1f}" for nats in rate.values()),
        "transformer under unigram": f"{1 - rate['transformer'] / rate['unigram']:.1%}",
        "distortion (nats)": f"{result['distortion']:.1f}",
        "negative ELBO (bits/dim)": f"{result['bits_per_dim']:.4f}",
        "usage, perplexity": f"{result['usage']:.1%}, {result['perplexity']:.0f}",
        "PSNR of reconstructions (dB)": f"{result['psnr']:.2f}",
        "time, whole process (s)": f"{seconds:.0f}",
        "peak memory (GiB)": f"{memory:.2f}",
    }
    print("| | |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
