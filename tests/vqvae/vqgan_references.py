"""Tokenizers of other projects, written from their published layouts, with their names of weights and random numbers.

taming-transformers and LlamaGen cannot be installed beside this library. What stands here for them is plain functions
over a dict of weights, and shares no code with `vqvae`. Diffusers is installed; its models come from itself.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqvae import load_images

LDM: dict[str, Any] = {
    "block_out_channels": (128, 256, 512),
    "latent_channels": 3,
    "num_vq_embeddings": 8192,
    "vq_embed_dim": 3,
    "sample_size": 256,
}
# Released configs, by what their files say; what is not here is `VQModel`'s default.
RELEASED: dict[str, dict[str, Any]] = {
    "amused": {
        "block_out_channels": (128, 256, 256, 512, 768),
        "latent_channels": 64,
        "num_vq_embeddings": 8192,
        "mid_block_add_attention": False,
        "lookup_from_codebook": True,
        "force_upcast": True,
    },
    "kandinsky-movq": {
        "block_out_channels": (128, 256, 256, 512),
        "attention": (3,),
        "latent_channels": 4,
        "vq_embed_dim": 4,
        "num_vq_embeddings": 16384,
        "norm_type": "spatial",
    },
    "ldm-celebahq": LDM,
    "ldm-super-resolution-4x-openimages": LDM | {"scaling_factor": 1.0},
    "vq-diffusion-ithq": {
        "block_out_channels": (128, 128, 256, 512),
        "attention": (3,),
        "latent_channels": 256,
        "num_vq_embeddings": 4096,
        "vq_embed_dim": 256,
    },
    # None of these has its codes narrower than its latents.
    "narrow-codes": {
        "block_out_channels": (64, 128),
        "attention": (0,),
        "latent_channels": 16,
        "vq_embed_dim": 4,
        "norm_num_groups": 16,
        "num_vq_embeddings": 512,
        "layers_per_block": 1,
    },
}


def vq_model(name: str, *, shrink: int = 1, seed: int = 0) -> Any:
    """A `VQModel` of a released config with random weights; widths are divided by `shrink`, a multiple of 32 kept."""
    import diffusers

    config = dict(RELEASED[name])
    channels = config["block_out_channels"] = tuple(max(32, c // shrink) for c in config["block_out_channels"])
    attention = config.pop("attention", ())
    config.setdefault("layers_per_block", 2)
    config["down_block_types"] = tuple(
        "AttnDownEncoderBlock2D" if level in attention else "DownEncoderBlock2D" for level in range(len(channels))
    )
    config["up_block_types"] = tuple(
        "AttnUpDecoderBlock2D" if level in attention else "UpDecoderBlock2D" for level in reversed(range(len(channels)))
    )
    torch.manual_seed(seed)
    model = diffusers.VQModel(**config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases begin at 1 and 0, where a mistake would not show
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        features = model.encode(pictures(24, 32) / 127.5 - 1).latents
        model.quantize.embedding.weight.copy_(codebook_like(features, len(model.quantize.embedding.weight)))
    return model


def codebook_like(features: Tensor, num_codes: int, seed: int = 0) -> Tensor:
    """Codes "k d" about where features "b d h w" are, in many channels closer, so that many are used in any width."""
    generator = torch.Generator().manual_seed(seed)
    vectors = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    noise = torch.randn(num_codes, vectors.shape[1], generator=generator)
    picked = vectors[torch.randint(len(vectors), (num_codes,), generator=generator)]
    return picked + min(0.5, 2 / vectors.shape[1] ** 0.5) * noise * vectors.std(0)


@functools.cache
def pictures(num: int, size: int) -> Tensor:
    """Half of them photographs of clothes in grey, half random levels; uint8 "n 3 size size"."""
    grey = load_images("fashion-mini", "test").images[: num - num // 2].float()
    real = F.interpolate(grey, size=(size, size), mode="bilinear").round().to(torch.uint8).repeat(1, 3, 1, 1)
    random = torch.randint(0, 256, (num // 2, 3, size, size), generator=torch.Generator().manual_seed(7))
    return torch.cat([real, random.to(torch.uint8)])


# Names of the parts: of level i of the encoder, of level i of the decoder (both from the finest), of the middle.
TAMING = {"down": "encoder.down.{i}", "up": "decoder.up.{i}", "block": "block", "attn": "attn"}
LLAMAGEN = {"down": "encoder.conv_blocks.{i}", "up": "decoder.conv_blocks.{r}", "block": "res", "attn": "attn"}
MIDDLE = {"taming": ("block_1", "attn_1", "block_2"), "llamagen": ("0", "1", "2")}


class Reference:
    """A VQGAN with the layout of "taming" or "llamagen", its weights random under the names they are first asked for.

    Args:
        attention: levels with attention, from the finest.
        gumbel: codes are the largest logits.
    """

    def __init__(
        self,
        layout: str,
        *,
        ch: int,
        ch_mult: tuple[int, ...],
        attention: tuple[int, ...],
        z_channels: int,
        embed_dim: int,
        n_embed: int,
        gumbel: bool = False,
    ):
        self.layout, self.names = layout, TAMING if layout == "taming" else LLAMAGEN
        self.widths = [ch * factor for factor in ch_mult]
        self.attention, self.num_blocks, self.gumbel = attention, 2, gumbel
        self.embed_dim, self.z_channels, self.num_codes = embed_dim, z_channels, n_embed
        self.weights: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(ch)
        codes = codebook_like(self.encode(pictures(24, 32)), n_embed)
        if gumbel:
            self.weights["quantize.embed.weight"] = codes
            self.weights["quantize.proj.weight"] = codes.flip(0)[:, :, None, None]
            self.weights["quantize.proj.bias"] = -codes.flip(0).square().sum(1) / 2
        else:
            self.weights["quantize.embedding.weight"] = codes
        self.decode(torch.zeros(1, 2, 2, dtype=torch.int64))

    def _place(self, part: str, i: int) -> str:
        return self.names[part].format(i=i, r=len(self.widths) - 1 - i)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def _conv(self, name: str, x: Tensor, out: int, size: int, **options: Any) -> Tensor:
        if f"{name}.weight" not in self.weights:
            into = x.shape[1]
            self.weights[f"{name}.weight"] = self._draw(out, into, size, size) / math.sqrt(into * size**2)
            self.weights[f"{name}.bias"] = 0.3 * self._draw(out)
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **options)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" not in self.weights:
            self.weights[f"{name}.weight"] = 1 + 0.3 * self._draw(x.shape[1])
            self.weights[f"{name}.bias"] = 0.3 * self._draw(x.shape[1])
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6)

    def _resnet(self, name: str, x: Tensor, out: int) -> Tensor:
        h = self._norm(f"{name}.norm1", x)
        h = self._conv(f"{name}.conv1", h * h.sigmoid(), out, 3, padding=1)
        h = self._norm(f"{name}.norm2", h)
        h = self._conv(f"{name}.conv2", h * h.sigmoid(), out, 3, padding=1)
        return h + (x if x.shape[1] == out else self._conv(f"{name}.nin_shortcut", x, out, 1))

    def _attend(self, name: str, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        normed = self._norm(f"{name}.norm", x)
        q, k, v = (self._conv(f"{name}.{part}", normed, c, 1).reshape(b, c, h * w) for part in "qkv")
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k) * c**-0.5, dim=2)  # b, places of q, places of k
        mixed = torch.bmm(v, weights.transpose(1, 2)).reshape(b, c, h, w)
        return x + self._conv(f"{name}.proj_out", mixed, c, 1)

    def _mid(self, net: str, x: Tensor) -> Tensor:
        first, middle, last = (f"{net}.mid.{name}" for name in MIDDLE[self.layout])
        x = self._attend(middle, self._resnet(first, x, self.widths[-1]))
        return self._resnet(last, x, self.widths[-1])

    def _level(self, part: str, i: int, num: int, x: Tensor) -> Tensor:
        place = self._place(part, i)
        for j in range(num):
            x = self._resnet(f"{place}.{self.names['block']}.{j}", x, self.widths[i])
            if i in self.attention:
                x = self._attend(f"{place}.{self.names['attn']}.{j}", x)
        return x

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 "b 3 h w" to features "b d h w"."""
        x = self._conv("encoder.conv_in", images / 127.5 - 1, self.widths[0], 3, padding=1)
        for i, width in enumerate(self.widths):
            x = self._level("down", i, self.num_blocks, x)
            if i < len(self.widths) - 1:
                x = self._conv(f"{self._place('down', i)}.downsample.conv", F.pad(x, (0, 1, 0, 1)), width, 3, stride=2)
        x = self._norm("encoder.norm_out", self._mid("encoder", x))
        x = self._conv("encoder.conv_out", x * x.sigmoid(), self.z_channels, 3, padding=1)
        return self._conv("quant_conv", x, self.embed_dim, 1)

    @torch.no_grad()
    def codes(self, features: Tensor) -> Tensor:
        """ "b d h w" to "b h w"."""
        b, _, h, w = features.shape
        if self.gumbel:
            return self._conv("quantize.proj", features, self.num_codes, 1).argmax(1)
        vectors, table = features.permute(0, 2, 3, 1).reshape(-1, self.embed_dim), self._table()
        if self.layout == "llamagen":
            vectors = F.normalize(vectors, dim=-1)
        distances = vectors.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * vectors @ table.T
        return distances.argmin(1).reshape(b, h, w)

    def _table(self) -> Tensor:
        table = self.weights["quantize.embed.weight" if self.gumbel else "quantize.embedding.weight"]
        return F.normalize(table, dim=-1) if self.layout == "llamagen" else table

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """ "b h w" to "b 3 H W", about −1 to 1."""
        x = self._conv("post_quant_conv", self._table()[codes].permute(0, 3, 1, 2), self.z_channels, 1)
        x = self._mid("decoder", self._conv("decoder.conv_in", x, self.widths[-1], 3, padding=1))
        for i in reversed(range(len(self.widths))):
            x = self._level("up", i, self.num_blocks + 1, x)
            if i:
                doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self._conv(f"{self._place('up', i)}.upsample.conv", doubled, self.widths[i], 3, padding=1)
        x = self._norm("decoder.norm_out", x)
        return self._conv("decoder.conv_out", x * x.sigmoid(), 3, 3, padding=1)


# By name: layout, options; those that all share are said below.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "taming-f16-1024": ("taming", {"n_embed": 1024}),
    "taming-f16-16384": ("taming", {}),
    "taming-gumbel-f8": ("taming", {"ch_mult": (1, 1, 2, 4), "attention": (3,), "n_embed": 8192, "gumbel": True}),
    "llamagen-vq16": ("llamagen", {"embed_dim": 8}),
    "llamagen-vq8": ("llamagen", {"ch_mult": (1, 2, 2, 4), "attention": (3,), "embed_dim": 8}),
}
F16 = {"ch_mult": (1, 1, 2, 2, 4), "attention": (4,), "z_channels": 256, "embed_dim": 256, "n_embed": 16384}


def published(name: str, ch: int = 128) -> Reference:
    """One of these with random weights; 128 is the width of all that were released."""
    layout, options = PUBLISHED[name]
    return Reference(layout, ch=ch, **{**F16, **options})
