"""Ray itself: imported, joined or started, quiet, and ended. Needs the extra `ray`."""

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import Any

_CONNECT_SECONDS = 10.0
# Nothing is sent to Ray's makers. Its processes' own log of what they do goes to files only where it ends them: else it
# would tell on the terminal of each actor that may be started again.
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}


def import_ray() -> Any:
    """The `ray` module, with what is used of it. ValueError where the extra is missing."""
    try:
        with warnings.catch_warnings():
            # Ray tells of options that it will change; they are not ours.
            warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
            import ray
            import ray.data
            import ray.util.scheduling_strategies
    except ImportError as error:
        raise ValueError(f"the Ray engine needs more packages ({error}): pip install 'vqvae-priors[ray]'") from error
    return ray


class RaySession:
    """Ray, from when it is first needed until the block is left.

        with RaySession() as session:
            tokenize_on_ray(model, train, "codes/train", session=session)
            tokenize_on_ray(model, test, "codes/test", session=session)

    One that runs in this process already is used, and goes on running.

    Args:
        address: of a cluster (of its head node, or "auto"); None uses RAY_ADDRESS, else a cluster that was started on
            this machine, else starts Ray here.
    """

    def __init__(self, address: str | None = None):
        self.address = address
        self._ours = False

    def start(self) -> None:
        """Join or start Ray, unless it runs.

        Raises:
            ValueError: the extra is missing; no cluster at the address; an address, though Ray runs here already.
        """
        ray = import_ray()
        address = self.address
        if ray.is_initialized():
            if address is not None and not self._ours:
                raise ValueError(f"got address={address!r}, but Ray runs in this process already; expected no address")
            return
        try:
            host, _, port = (address or "").rpartition(":")
            if host and port.isdigit():
                # Ray itself tries for minutes.
                socket.create_connection((host, int(port)), timeout=_CONNECT_SECONDS).close()
            with environment(ENVIRONMENT), _stderr_without(b"Set ray log level from environment variable"):
                # Workers' own output would come between the lines of the caller's.
                ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError, OverflowError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"no Ray at {address or 'this machine'}: {reason}; expected the address of a running cluster "
                "(HOST:PORT of its head node), or none to start Ray here"
            ) from error
        self._ours = True

    def __enter__(self) -> "RaySession":
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self._ours = False
            import_ray().shutdown()


@contextmanager
def _stderr_without(text: bytes) -> Iterator[None]:
    """Lines on stderr come when the block is left, less those that hold `text`; also of what is no Python."""
    with TemporaryFile() as held:
        before = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            held.seek(0)
            for line in held:
                if text not in line:
                    os.write(2, line)


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    """Settings of the environment that are as said inside, unless the user has set them."""
    new = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


@contextmanager
def quiet(ray: Any) -> Iterator[None]:
    """Ray Data logs to its file alone; what goes wrong reaches the caller as an error."""
    # Of its handlers only the one for the terminal is a StreamHandler.
    handlers = [each for each in logging.getLogger("ray.data").handlers if isinstance(each, logging.StreamHandler)]
    before = [each.level for each in handlers]
    for each in handlers:
        each.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
            # Where little is left to do, fewer encoders have work; that is as it should be.
            warnings.filterwarnings("ignore", "The minimum number of concurrent actors")
            yield
    finally:
        for each, level in zip(handlers, before, strict=True):
            each.setLevel(level)
