"""Figures and pictures as TensorBoard reads them."""

import struct
import time
from pathlib import Path
from typing import Any

# How long figures may wait for the disk.
FLUSH_SECONDS = 10.0
# Where a PNG file has its width and height, after its signature and the length and name of its first chunk.
_SIZE_AT = 16


class Events:
    """A file of TensorBoard events in a folder, from a step on: what older files there hold of later steps is dropped.

    It is written here and now. The library's `SummaryWriter` has a thread for that, which a full disk ends with a
    traceback, and for which a run would then wait without end.

    Raises:
        OSError: the folder cannot be written to; so do `add`, `picture` and `close`.
    """

    def __init__(self, folder: Path, step: int):
        # Here and not above: together they take a second to import.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.summary import scalar

        self._event: Any = event_pb2.Event  # pyrefly: ignore  (made when it is imported)
        self._summary: Any = summary_pb2.Summary  # pyrefly: ignore  (made when it is imported)
        self._scalar = scalar
        self._flushed = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{step}")
        self._writer.write_event(self._event(wall_time=time.time(), step=step + 1, session_log={"status": "START"}))

    def add(self, step: int, name: str, value: float) -> None:
        """One figure."""
        self._add(step, self._scalar(name, value))

    def picture(self, step: int, name: str, png: bytes) -> None:
        """One picture, of the bytes of a PNG file in colour."""
        width, height = struct.unpack_from(">II", png, _SIZE_AT)
        image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._add(step, self._summary(value=[self._summary.Value(tag=name, image=image)]))

    def _add(self, step: int, summary: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """All of it is on the disk."""
        self._writer.close()
