"""What `vqvae tokenize` wrote, read by programs that do not know this library: numpy and safetensors, or pyarrow.

vqvae tokenize RUN_OR_MODEL SOURCE -o codes [--parquet codes.parquet]
python examples/read_codes_without_us.py codes/train
python examples/read_codes_without_us.py codes.parquet
"""

import argparse
import json
from pathlib import Path

import numpy as np


def read_shards(folder: Path) -> None:
    """Each shard is a safetensors file; index.json says in which order they come, and what the codes are."""
    from safetensors.numpy import load_file

    index = json.loads((folder / "index.json").read_text())
    print(f"{index['num_rows']} rows of codes 0..{index['num_codes'] - 1}, grid {index['grid']}, {index['dtype']}")
    counts = np.zeros(index["num_codes"], np.int64)
    for shard in index["shards"]:
        tensors = load_file(folder / Path(shard["file"]).name)  # of this folder, whatever the index says
        counts += np.bincount(tensors["codes"].ravel(), minlength=index["num_codes"])
        ends = tensors["key_ends"]  # of each row's key among the bytes of all keys
        # A file's name may be bytes that are no UTF-8.
        first = tensors["key_bytes"][: ends[0]].tobytes().decode(errors="backslashreplace") if len(ends) else ""
        label = int(tensors["labels"][0]) if "labels" in tensors and len(ends) else None
        print(f"{shard['file']}: {tensors['codes'].shape}; first key {first!r}, label {label}")
    print(f"{(counts > 0).sum()} codes are in use")


def read_parquet(path: Path) -> None:
    """A row an image; the grid is in the schema's metadata, as codes lie flattened in raster order."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    grid = json.loads(file.schema_arrow.metadata[b"grid"])
    num_rows = 0
    for batch in file.iter_batches(batch_size=4096):
        codes = batch.column("codes").flatten().to_numpy(zero_copy_only=False).reshape(-1, *grid)
        if num_rows == 0:
            print(f"columns {batch.schema.names}, codes {codes.dtype} {codes.shape[1:]}")
            print(f"first key {batch.column('key')[0].as_py()!r}, codes {codes[0].ravel()[:8].tolist()} ...")
        num_rows += len(codes)
    print(f"{num_rows} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codes", type=Path)
    codes = parser.parse_args().codes
    if codes.is_dir():
        read_shards(codes)
    else:
        read_parquet(codes)


if __name__ == "__main__":
    main()
