"""Models that come with the package, by their names: no network, no download.

They lie in the folder `models/` beside this file, each as a run has its models: `codebook/`, `prior/`. Their weights
are stored in bfloat16, and read as the float32 numbers that those are. `models/README.md` says what they are.
"""

import difflib
from pathlib import Path

FOLDER = Path(__file__).parent / "models"


def names() -> list[str]:
    """The names of the packaged models."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def find(source: str | Path) -> Path | None:
    """The folder of the packaged model of that name; None where there is none, or a folder of that name is here."""
    if not isinstance(source, str) or source not in names() or Path(source).exists():
        return None
    return FOLDER / source


def is_packaged(folder: Path) -> bool:
    """Whether a folder is that of a packaged model, or a part of it."""
    return FOLDER.resolve() in folder.resolve().parents


def advice(source: str | Path) -> str:
    """What to say of a name that no folder has: which packaged models there are, if it looks like the name of one."""
    name = str(source)
    if Path(name).name != name:
        return ""
    like = difflib.get_close_matches(name, names(), 1)
    return f"; perhaps you meant {like[0]}" if like else f"; packaged models are {', '.join(names())}"
