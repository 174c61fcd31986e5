"""How a level is found in a stream: by two tables of 16 entries, or by one of 256.

    python -m benchmarks decoding

The pixels are drawn from random mixtures of five logistics with a point mass at 0, images of 28x28, on one thread.
CPU time, interleaved, medians.
"""

import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from vqvae.codec import integer_tables
from vqvae.codec.coder import RangeReader, RangeWriter
from vqvae.likelihoods import LogisticMixture

QUICK = "--num-images 4 --rounds 1"


def main(num_images: int = 64, rounds: int = 7) -> None:
    """Print milliseconds an image and bytes of both ways."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    likelihood = LogisticMixture(zero_component=True).double()
    features = torch.randn(num_images, likelihood.num_features, 28, 28, dtype=torch.float64)
    images = likelihood.sample(features)
    parameters = likelihood.symbol_parameters(images, features).flatten(0, 3)
    offsets = torch.zeros(len(parameters), dtype=torch.int64)
    levels = images.flatten().long()

    def whole_widths() -> Tensor:
        points, _ = integer_tables.rounded(parameters, offsets)
        ends, _ = integer_tables.level_ends(likelihood.cdf, points, torch.arange(256).expand(len(points), -1))
        return torch.cat((torch.zeros_like(ends[:, :1]), ends), 1).diff(dim=1)

    def two_steps(stream: bytes) -> Tensor:
        found, reader = integer_tables.LevelTables(likelihood.cdf, parameters, offsets), RangeReader(stream)
        high = torch.from_numpy(reader.get(found.high())).long()
        return high * integer_tables.STEP + torch.from_numpy(reader.get(found.low(high)))

    def one_step(stream: bytes) -> Tensor:
        return torch.from_numpy(RangeReader(stream).get(whole_widths())).long()

    def written(symbols: Sequence[integer_tables.Intervals]) -> bytes:
        writer = RangeWriter()
        for intervals in symbols:
            writer.put(intervals)
        return writer.finish()

    known = integer_tables.level_intervals(likelihood.cdf, parameters, levels, offsets)
    widths = whole_widths()
    width = widths.gather(1, levels[:, None])[:, 0]
    whole = integer_tables.Intervals(widths.cumsum(1).gather(1, levels[:, None])[:, 0] - width, width)
    streams = {"two tables of 16": written([known.high, known.low]), "one table of 256": written([whole])}
    ways = {"two tables of 16": two_steps, "one table of 256": one_step}
    for name, decode in ways.items():
        assert torch.equal(decode(streams[name]), levels)
    jobs = {name: partial(harness.timed, partial(decode, streams[name])) for name, decode in ways.items()}
    table = harness.Table("", "ms an image", "bytes")
    for name, spent in harness.interleaved(jobs, rounds).items():
        seconds = statistics.median(each.counted for each in spent)
        table.row(name, f"{1000 * seconds / num_images:.2f}", f"{len(streams[name]):,}")
