"""Tokenizers in and out of other projects' formats.

model = import_tokenizer("amused/amused-256", subfolder="vqvae")    # or a .ckpt of taming's, a .pt of LlamaGen's
export_onnx(model, "exported")                                      # images to codes, codes to images

detect.py       which of the formats a source is in; import_tokenizer
diffusers.py    VQModel, in and out
taming.py       taming-transformers' VQGAN and Gumbel VQGAN, in
llamagen.py     LlamaGen's tokenizers, in
pickles.py      PyTorch's pickled files, read without running what is in them
pickle_machine.py    what a pickle says, worked out without calling anything
plain_yaml.py   plain data out of a yaml that others wrote
state_dicts.py  which of the weights in a checkpoint are the tokenizer's
weight_names.py names of weights to those of `vqvae.vqgan`, and a model of them
scale.py        a likelihood's scale for models that were trained without one
onnx.py         ONNX, out
torch_export.py torch.export, out
exported.py     what both write, and how it is checked before it takes its place
traced.py       encode and decode in a form that can be traced
code_graphs.py  quantizers in that form
code_agreement.py    codes of two programs compared: equal, tied, wrong
precision.py    float32 without autocast and TF32, and models that are not in it
"""

from vqvae.interop.code_agreement import compare_codes
from vqvae.interop.detect import import_tokenizer
from vqvae.interop.diffusers import export_diffusers, import_diffusers
from vqvae.interop.llamagen import import_llamagen
from vqvae.interop.onnx import export_onnx
from vqvae.interop.scale import fit_scale
from vqvae.interop.taming import import_taming
from vqvae.interop.torch_export import export_program

__all__ = [
    "compare_codes",
    "export_diffusers",
    "export_onnx",
    "export_program",
    "fit_scale",
    "import_diffusers",
    "import_llamagen",
    "import_taming",
    "import_tokenizer",
]
