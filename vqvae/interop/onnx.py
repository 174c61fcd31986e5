"""Tokenizers as ONNX, which onnxruntime and many other engines run.

    import onnxruntime
    encode = onnxruntime.InferenceSession("encoder.onnx")
    [codes] = encode.run(["codes"], {"images": images})      # numpy uint8 "b c h w" -> int64 "b *grid", any batch

Weights above 2 GB, more than a file of ONNX can hold, lie beside it as `encoder.onnx.data`. The model's sizes and its
fingerprint are in the files' metadata too.
"""

import contextlib
import logging
from collections.abc import Callable, Generator
from pathlib import Path

import torch
from torch import Tensor

from vqvae.interop.exported import Form, Program, write_folder
from vqvae.interop.torch_export import traced_program
from vqvae.model import VQVAE

# A file of ONNX is one protobuf message, at most 2 GiB: so many bytes of weights leave the rest for the graph.
MOST_BYTES = 2**31 - 2**27

USAGE = """
import onnxruntime
encode = onnxruntime.InferenceSession("encoder.onnx")
decode = onnxruntime.InferenceSession("decoder.onnx")
[codes] = encode.run(["codes"], {"images": images})
[images] = decode.run(["images"], {"codes": codes})
"""


def export_onnx(model: VQVAE, folder: str | Path) -> None:
    """Write `encoder.onnx`, `decoder.onnx` and `tokenizer.json` into a folder of their own, atomically.

    The model stays as it is, its mode included. An earlier export in the folder is replaced.

    Raises:
        ValueError: as `vqvae.interop.exported.write_folder`, or the packages of the extra `onnx` are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"an export to ONNX needs {error.name}, which is not installed: pip install 'vqvae-priors[onnx]'"
        ) from error
    write_folder(model, Path(folder), FORM)


def _save(program: Program, path: Path) -> None:
    with _quiet():
        made = torch.onnx.export(
            traced_program(program),
            dynamo=True,
            input_names=[program.input],
            output_names=[program.output],
            verbose=False,
        )
    assert made is not None
    graph = made.model.graph
    # The axis has the name of torch's symbol.
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        value.shape[0] = "batch"
    # The exporter's notes for those who debug it: larger than the graph, and with names of this machine's folders.
    noted = [graph, *graph.inputs, *graph.initializers.values(), *graph.all_nodes()]
    for part in (*noted, *(value for node in graph.all_nodes() for value in node.outputs)):
        part.metadata_props.clear()
        part.doc_string = None
    made.model.metadata_props.update(program.metadata)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in program.module.state_dict().values())
    made.save(path, external_data=num_bytes > MOST_BYTES)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without a line for each operator of several results: onnxscript warns that it computes none in advance."""
    logger = logging.getLogger("onnxscript.optimizer._constant_folding")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _load(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [wanted], [output] = session.get_inputs(), session.get_outputs()

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run([output.name], {wanted.name: x.numpy()})[0])

    return run


FORM = Form(name="onnx", suffix=".onnx", usage=USAGE, beside=(".data",), save=_save, load=_load)
