"""A page to try a tokenizer and its prior on: demo."""

import os
import signal
import tempfile
import threading
from pathlib import Path

from vqvae.cli.common import Model
from vqvae.cli.demo.service import Service


def demo(
    run_or_model: Model = "fashion-28",
    *,
    prior: str | None = None,
    any_order: str | None = None,
    data: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
) -> None:
    """Serve a page to try a tokenizer and its prior on.

    Six tabs: reconstruct, sample, inpaint, compress, dream, and look at codes.

    The page is for this machine alone unless --host says otherwise, keeps what it makes in a temporary folder until it
    ends, and asks nothing of the network. Ctrl-C ends it. Its functions can be called by gradio_client, too.

    Example: vqvae demo runs/fashion-mini --port 7000

    Args:
        run_or_model: a run's folder, a tokenizer's folder or hub id together with --prior, or a packaged model.
        prior: folder or hub id of the prior; the run's own unless given.
        any_order: folder or hub id of a prior in any order, for inpainting; the packaged one where it fits.
        data: images for the examples and the codebook; the run's own unless given.
        host: the address to listen at; 0.0.0.0 lets others in.
        port: the port; the first free one from 7860 on unless given.
    """
    if port is not None and not 0 < port < 65_536:
        raise ValueError(f"--port must lie in [1, 65535], got {port}")
    service = Service(run_or_model, prior=prior, any_order=any_order, data=data)
    with tempfile.TemporaryDirectory(prefix="vqvae-demo-") as scratch:
        # Before Gradio is imported, which reads these once.
        os.environ |= {"GRADIO_TEMP_DIR": scratch, "GRADIO_ANALYTICS_ENABLED": "False"}
        try:
            from vqvae.cli.demo import page
        except ModuleNotFoundError as error:
            if error.name not in ("gradio",):
                raise
            raise ValueError("the page needs Gradio: pip install 'vqvae-priors[demo]'") from error
        blocks = page.Page(service, Path(scratch)).blocks()
        address = page.launch(blocks, Path(scratch), host=host, port=port)
        signal.signal(signal.SIGTERM, _stop)
        print(f"{address} shows {run_or_model}; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            blocks.close(verbose=False)


def _stop(*_: object) -> None:
    """As Ctrl-C does, which a shell keeps from what it runs in the background."""
    raise KeyboardInterrupt
