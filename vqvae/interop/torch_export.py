"""Tokenizers as programs of `torch.export`, which plain torch runs without this library.

    import torch
    encode = torch.export.load("encoder.pt2").module()
    codes = encode(images)          # uint8 "b c h w" -> int64 "b *grid", any batch

The files were made on a CPU; `torch.export.passes.move_to_device_pass` takes a loaded program elsewhere.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqvae.interop.exported import Form, Program, write_folder
from vqvae.model import VQVAE

USAGE = """
import torch
encode = torch.export.load("encoder.pt2").module()
decode = torch.export.load("decoder.pt2").module()
codes = encode(images)
images = decode(codes)
"""


def export_program(model: VQVAE, folder: str | Path) -> None:
    """Write `encoder.pt2`, `decoder.pt2` and `tokenizer.json` into a folder of their own, atomically.

    The model stays as it is, its mode included. An earlier export in the folder is replaced.

    Raises:
        ValueError: as `vqvae.interop.exported.write_folder`.
    """
    write_folder(model, Path(folder), FORM)


def traced_program(program: Program) -> torch.export.ExportedProgram:
    """One of the two graphs, for any batch."""
    batch = torch.export.Dim("batch")
    with torch.no_grad():  # a part that switches gradients off would become a graph of its own
        exported = torch.export.export(program.module, (program.example,), dynamic_shapes=({0: batch},))
    for part in exported.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it names folders of this machine
    return exported


class _Writing(io.FileIO):
    """A file whose first failure is kept: raised within torch's writer, it would end the process."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while self.failure is None and rest:
            try:
                rest = rest[super().write(rest) or 0 :]
            except OSError as error:
                self.failure = error
        return size


def _save(program: Program, path: Path) -> None:
    with _Writing(path, "wb") as file:
        torch.export.save(traced_program(program), file, extra_files=program.metadata)
        if file.failure is not None:
            raise file.failure


def _load(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


FORM = Form(name="torch.export", suffix=".pt2", usage=USAGE, beside=(), save=_save, load=_load)
