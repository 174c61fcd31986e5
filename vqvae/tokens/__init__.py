"""Tokenized sets of images: shards of codes that any program can read, made once and of any size.

    made = tokenize(model, images, "codes/train")               # goes on where a run before was stopped
    made = tokenize(model, images, "codes/train", Tokenizing(batch_size=32, num_workers=4))
    codes = CodeDataset("codes/train")                          # memory-mapped
    for batch in codes.batches(1024, seed=0):                   # without end; a `CodeBatch` each
        batch.codes                                             # int64 "b *grid"

    layout.py       the format: what a folder holds; Plan, which shard takes which images
    shards.py       one shard: written whole or not at all, and checked; the index written
    headers.py      the header of a shard read, and its checksums compared
    index.py        the index read
    plain.py        files and JSON that anybody may have written
    origins.py      where images and tokenizer came from, without telling where on a machine that is
    jobs.py         one job at a time writes a set
    pipeline.py     images to shards on one machine: tokenize, and its steps for other engines
    ray_engine.py   the same on a cluster: tokenize_on_ray (extra `ray`; imported only when needed)
    ray_session.py  Ray itself, joined or started: RaySession
    dataset.py      CodeDataset: shards to batches
    batch.py        CodeBatch
    buckets.py      CodeBuckets: sets of several sizes together
    table.py        one parquet file of it all (extra `parquet`; imported only when needed)

It knows a tokenizer by `num_codes`, `grid`, `config`, `encode` and its weights, and nothing of priors.
"""

from vqvae.tokens.batch import CodeBatch
from vqvae.tokens.buckets import CodeBuckets
from vqvae.tokens.dataset import CodeDataset, check_same_origin
from vqvae.tokens.layout import Tokenizing
from vqvae.tokens.pipeline import Tokenized, tokenize
from vqvae.tokens.ray_engine import TokenizingOnRay, tokenize_on_ray
from vqvae.tokens.shards import Summary
from vqvae.tokens.table import write_parquet

__all__ = [
    "CodeBatch",
    "CodeBuckets",
    "CodeDataset",
    "Summary",
    "Tokenized",
    "Tokenizing",
    "TokenizingOnRay",
    "check_same_origin",
    "tokenize",
    "tokenize_on_ray",
    "write_parquet",
]
