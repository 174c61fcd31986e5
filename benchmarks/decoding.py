"""How a level is found in a stream: by two tables of 16 entries, or by one of 256.

    python benchmarks/decoding.py

The pixels are drawn from random mixtures of five logistics with a point mass at 0, 64 images of 28x28, on one thread.
CPU time, interleaved, medians.
"""

import statistics
import time

import torch
from torch import Tensor

from vqvae.codec import tables
from vqvae.codec.coder import RangeReader, RangeWriter
from vqvae.likelihoods import LogisticMixture

NUM_IMAGES = 64
ROUNDS = 7


def main() -> None:
    """Print milliseconds an image and bytes of both ways."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    likelihood = LogisticMixture(zero_component=True).double()
    features = torch.randn(NUM_IMAGES, likelihood.num_features, 28, 28, dtype=torch.float64)
    images = likelihood.sample(features)
    parameters = likelihood.symbol_parameters(images, features).flatten(0, 3)
    offsets = torch.zeros(len(parameters), dtype=torch.int64)
    levels = images.flatten().long()

    def whole_widths() -> Tensor:
        points, _ = tables.rounded(parameters, offsets)
        ends, _ = tables.level_ends(likelihood.cdf, points, torch.arange(256).expand(len(points), -1))
        return torch.cat((torch.zeros_like(ends[:, :1]), ends), 1).diff(dim=1)

    def two_steps(stream: bytes) -> Tensor:
        found, reader = tables.LevelTables(likelihood.cdf, parameters, offsets), RangeReader(stream)
        high = torch.from_numpy(reader.get(found.high())).long()
        return high * tables.STEP + torch.from_numpy(reader.get(found.low(high)))

    def one_step(stream: bytes) -> Tensor:
        return torch.from_numpy(RangeReader(stream).get(whole_widths())).long()

    known = tables.level_intervals(likelihood.cdf, parameters, levels, offsets)
    widths = whole_widths()
    width = widths.gather(1, levels[:, None])[:, 0]
    whole = tables.Intervals(widths.cumsum(1).gather(1, levels[:, None])[:, 0] - width, width)
    ways = {"two tables of 16": (two_steps, [known.high, known.low]), "one table of 256": (one_step, [whole])}
    streams, seconds = {}, {name: [] for name in ways}
    for name, (_, symbols) in ways.items():
        writer = RangeWriter()
        for intervals in symbols:
            writer.put(intervals)
        streams[name] = writer.finish()
    for _ in range(ROUNDS):
        for name, (decode, _) in ways.items():
            start = time.process_time()
            assert torch.equal(decode(streams[name]), levels)
            seconds[name].append(time.process_time() - start)
    print("| | ms an image | bytes |\n|---|---|---|")
    for name in ways:
        print(f"| {name} | {1000 * statistics.median(seconds[name]) / NUM_IMAGES:.2f} | {len(streams[name]):,} |")


if __name__ == "__main__":
    main()
