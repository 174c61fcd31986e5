"""Files of other projects: checkpoints, their yamls, folders of diffusers and transformers."""

import argparse
import collections
import functools
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml
from fuzz_files import Kind
from torch import Tensor

from priors.llama import LlamaPrior
from priors.llama_folder import load_llama, save_llama
from vqvae.interop import export_diffusers, import_diffusers, import_tokenizer
from vqvae.interop.pickles import read_pickle
from vqvae.interop.taming import LAYOUT, _check, _params
from vqvae.interop.weight_names import NEAREST, sizes, to_diffusers
from vqvae.quantizers import VectorQuantizer
from vqvae.vqgan import VQGAN

# What stands beside a file of each kind, by its name.
beside: dict[str, dict[str, bytes]] = {}


@functools.cache
def taming_weights() -> dict[str, Tensor]:
    """Of one level of 32 channels, which is the least that the groups of a norm allow."""
    generator = torch.Generator().manual_seed(0)
    names = {"encoder": ("down.0.block.0",), "decoder": ("up.0.block.0", "up.0.block.1")}
    norms, convs = [], {"quant_conv": (4, 4, 1), "post_quant_conv": (4, 4, 1)}
    for net, levels in names.items():
        into, out = (3, 4) if net == "encoder" else (4, 3)
        convs |= {f"{net}.conv_in": (32, into, 3), f"{net}.conv_out": (out, 32, 3)}
        blocks = [f"{net}.{block}" for block in ("mid.block_1", "mid.block_2", *levels)]
        norms += [f"{net}.norm_out", *(f"{block}.norm{number}" for block in blocks for number in "12")]
        convs |= {f"{block}.conv{number}": (32, 32, 3) for block in blocks for number in "12"}
    made = {f"{name}.weight": torch.randn(a, b, n, n, generator=generator) for name, (a, b, n) in convs.items()}
    made |= {f"{name}.bias": torch.zeros(out) for name, (out, *_) in convs.items()}
    made |= {f"{name}.{leaf}": torch.ones(32) for name in norms for leaf in ("weight", "bias")}
    return {**made, "quantize.embedding.weight": torch.randn(8, 4, generator=generator)}


def checkpoints(zipped: bool) -> Callable[[Path], Sequence[bytes]]:
    """Files of torch's, most of them small, so that damage is done to what they say and not to numbers."""

    def good(folder: Path) -> list[bytes]:
        shared = torch.arange(12.0).view(3, 4)
        some: list[Any] = [
            {"state_dict": taming_weights(), "epoch": 3},
            {"state_dict": {"first_stage_model.encoder.conv_in.weight": shared, "betas": shared[1:, ::2]}},
            {
                "args": argparse.Namespace(lr=1e-3, names=["a"]),
                "best": np.float64(0.5),
                "step": np.int64(3),
                "n": 2**70,
            },
            collections.OrderedDict(a=torch.ones(2, dtype=torch.int64), b=torch.nn.Parameter(torch.ones(1))),
            {"model": {"x": torch.ones(2).half()}, "milestones": collections.Counter({1: 2}), "shape": shared.shape},
        ]
        found = []
        # Without checksums, so that what is damaged is looked at.
        torch.serialization.set_crc32_options(False)
        for number, held in enumerate(some):
            path = folder / f"{number}.pt"
            torch.save(held, path, _use_new_zipfile_serialization=zipped)
            found.append(path.read_bytes())
        torch.serialization.set_crc32_options(True)
        return found

    return good


def read_checkpoint(path: Path) -> object:
    read_pickle(path)
    return import_tokenizer(path, image_size=8)


def read_pickle_alone(path: Path) -> object:
    """A pickle as a checkpoint has it, with one storage, so that damage is done to nothing else."""
    with zipfile.ZipFile(path.with_suffix(".pt"), "w") as archive:
        archive.writestr("a/data.pkl", path.read_bytes())
        for number in range(3):
            archive.writestr(f"a/data/{number}", bytes(96))
    return read_pickle(path.with_suffix(".pt"))


def pickles(folder: Path) -> list[bytes]:
    found = []
    for data in checkpoints(True)(folder)[1:]:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            [info] = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
        start = data.index(b"\x80\x02", info.header_offset)
        found.append(data[start : start + info.file_size])
    return found


def yamls(folder: Path) -> list[bytes]:
    networks = {"double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32}
    networks |= {"ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    params = {"embed_dim": 4, "n_embed": 8, "ddconfig": networks, "kl_weight": 1e-8}
    whole = {"model": {"base_learning_rate": 4.5e-6, "target": "taming.models.vqgan.VQModel", "params": params}}
    values = "&x [1, 2.5, .inf, 0x1F, 1:30, 2001-01-01, ~, yes, !!binary aGk=, !!set {a, b}]"
    odd = f"a: {values}\nb: [*x, *x]\nc: {{<<: &y {{d: 1}}, e: !!int 3}}"
    ours = f"model: {{target: VQModel, params: {{ddconfig: {{ch: 32, ch_mult: {values}, z_channels: *x}}}}}}"
    return [text.encode() for text in (yaml.safe_dump(whole), json.dumps(whole), odd, ours)]


def read_yaml_of_taming(path: Path) -> object:
    named = to_diffusers(taming_weights(), lambda name: LAYOUT.name(name, 1), NEAREST, path, "VQGAN")
    return _check(_params(path), {**sizes(named, path), "num_codes": 8, "dim": 4}, path)


def diffusers_configs(folder: Path) -> list[bytes]:
    torch.manual_seed(0)
    quantizer = VectorQuantizer.Config(num_codes=4, dim=2, revival="off")
    config = VQGAN.Config(
        image_size=8, channels=(2,), num_blocks=1, latent_channels=2, num_groups=2, quantizer=quantizer
    )
    export_diffusers(config.build().eval(), folder / "0")
    weights = "diffusion_pytorch_model.safetensors"
    beside["diffusers"] = {weights: (folder / "0" / weights).read_bytes()}
    import_diffusers(folder / "0")  # the first time, torch imports much
    return [(folder / "0" / "config.json").read_bytes()]


def llama_folder(folder: Path) -> None:
    """In two shards."""
    torch.manual_seed(0)
    prior = LlamaPrior(num_codes=4, grid=(2, 2), num_classes=2, width=4, depth=2, num_heads=1)
    save_llama(prior, folder / "llama")
    weights = safetensors.torch.load_file(folder / "llama" / "model.safetensors")
    places = {}
    for number, part in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), 1):
        name = f"model-{number:05}-of-00002.safetensors"
        safetensors.torch.save_file({each: weights[each] for each in part}, folder / name)
        places |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_bytes((folder / "llama" / "config.json").read_bytes())
    beside["llama"] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    load_llama(folder)


def llama(name: str) -> Kind:
    """A Llama's folder, of which one file is damaged."""

    def good(folder: Path) -> list[bytes]:
        llama_folder(folder)
        return [beside["llama"][name]]

    return Kind(good=good, read=in_place("llama", load_llama), name=name, is_json=name.endswith(".json"))


def in_place(files: str, read: Callable[[Path], object]) -> Callable[[Path], object]:
    """Reads the folder of a file, beside which the others are put."""

    def read_folder(path: Path) -> object:
        for name, data in beside[files].items():
            if not (other := path.parent / name).exists():
                other.write_bytes(data)
        return read(path.parent)

    return read_folder


KINDS = {
    "ckpt": Kind(good=checkpoints(True), read=read_checkpoint, name="model.ckpt"),
    "pt-legacy": Kind(good=checkpoints(False), read=read_checkpoint, name="model.pt"),
    "ckpt-pickle": Kind(good=pickles, read=read_pickle_alone, name="data.pkl"),
    "yaml": Kind(good=yamls, read=read_yaml_of_taming, name="model.yaml"),
    "foreign-config": Kind(
        good=diffusers_configs, read=in_place("diffusers", import_diffusers), name="config.json", is_json=True
    ),
    "llama-config": llama("config.json"),
    "shards": llama("model.safetensors.index.json"),
    "shard": llama("model-00002-of-00002.safetensors"),
}
