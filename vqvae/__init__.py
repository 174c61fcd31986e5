"""A VQ-VAE that takes its ELBO seriously: images to codes and back, in bits that are counted honestly."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqvae.api import *  # noqa: F403
    from vqvae.api import __all__ as __all__
else:
    # They need torch, which takes seconds; `import vqvae` and what the command answers without it do not wait for that.
    def __getattr__(name: str) -> Any:
        """A public name, or a module of the package, loaded when it is first asked for."""
        if name.isidentifier() and importlib.util.find_spec(f"vqvae.{name}"):
            return importlib.import_module(f"vqvae.{name}")
        if not name.startswith("__") or name == "__all__":
            names = importlib.import_module("vqvae.api")
            if hasattr(names, name):
                globals()[name] = getattr(names, name)
                return globals()[name]
        raise AttributeError(f"module 'vqvae' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *importlib.import_module("vqvae.api").__all__})
