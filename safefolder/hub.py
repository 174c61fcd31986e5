"""To and from the Hugging Face hub, by huggingface_hub: files of a repository as a folder, and files as one commit.

Sent is by `HfApi.create_commit` and not by `upload_folder`, which may make several commits of a folder, and whoever
reads between two of them gets a new config with old weights. What goes wrong there has many unrelated types and tells
of many lines; here each is a ValueError of one line.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict


class HubOptions(TypedDict, total=False):
    """How a model is read from the Hugging Face hub; what every `from_pretrained` takes beside its source.

    A folder on this machine has no revision, token or cache: given with one they are a ValueError.

    Attributes:
        revision: a branch, a tag or a commit; a commit pins the model for good. The main branch unless given.
        subfolder: the folder of the model inside the source, e.g. "codebook" of a run.
        local_files_only: read the cache and ask no server, as HF_HUB_OFFLINE=1 does for all that a process reads.
        token: of an account that may read the model; the one that `hf auth login` kept unless given, False for none.
        cache_dir: where downloads are kept; where the Hugging Face libraries keep theirs unless given.
    """

    revision: str | None
    subfolder: str | None
    local_files_only: bool
    token: str | bool | None
    cache_dir: str | Path | None


def is_hub_id(source: str) -> bool:
    """Whether it can be an `owner/name` of the hub, and is no path of this machine."""
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and not source.startswith((".", "~")) and not Path(parts[0]).exists()


def download(
    hub_id: str,
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """A folder with the files of a repository that match, as they are at one commit.

    Raises:
        ValueError: there is no such repository or revision, or it cannot be reached and is not in the cache.
    """
    # Slow to import, and most models are read from a folder.
    import huggingface_hub
    from huggingface_hub import constants, errors

    check_token(token)
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=list(patterns),
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
        )
    except Exception as error:
        reason = _why(error, revision)
        if isinstance(error, errors.LocalEntryNotFoundError):
            if local_files_only or constants.HF_HUB_OFFLINE:
                reason = f"offline ({'local_files_only' if local_files_only else 'HF_HUB_OFFLINE'})"
            elif isinstance(error.__cause__, Exception):
                reason = f"the hub cannot be reached ({_why(error.__cause__, revision)})"
            at = "" if revision is None else f" at revision {revision!r}"
            reason = f"{reason}, and the cache does not hold all of it{at}; load it once while online"
        raise ValueError(f"{hub_id!r} is neither a folder nor a model on the hub that can be read: {reason}") from error
    return Path(folder)


def check_token(token: str | bool | None) -> None:
    """ValueError, which does not show it, for a token that no HTTP header can hold, as one read with its line's end."""
    if isinstance(token, str) and not re.fullmatch(r"[!-~]+", token):
        raise ValueError(
            "the token holds a line's end, a space or another character that no token has; pass it without, as "
            "path.read_text().strip()"
        )


def upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    message: str,
    replaces: Sequence[str] = (),
    private: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Put files into a repository in one commit; it, and the branch, are made where they are not there yet.

    Args:
        files: by their paths in the repository.
        repo_id: `owner/name`.
        message: of the commit.
        replaces: patterns of paths; what matches there and is not among the files is removed by the same commit.
        private: make the repository a private one.
        revision: the branch; main unless given.
        token: of an account that may write there; the one that `hf auth login` kept unless given.

    Returns:
        The address of the repository as it is at this commit, which ends in the revision to pin.

    Raises:
        ValueError: it could not be written to; or it is public already and was to be private.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import filter_repo_objects

    check_token(token)
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        raise ValueError(f"got revision {revision}, which is a commit; expected the name of a branch to push to")
    try:
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError("it is there already and is public; make it private on the hub first, or push elsewhere")
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, revision=revision) if replaces else []
        stale = [path for path in filter_repo_objects(there, allow_patterns=[*replaces]) if path not in files]
        operations: list[Any] = [CommitOperationDelete(path_in_repo=path) for path in stale]
        operations += [
            CommitOperationAdd(
                path_in_repo=path, path_or_fileobj=content if isinstance(content, bytes) else str(content)
            )
            for path, content in files.items()
        ]
        with warnings.catch_warnings():
            # How the library sends large files without hf_xet is deprecated by its own HTTP client.
            warnings.filterwarnings("ignore", "Use 'content=<...>'", DeprecationWarning)
            commit = api.create_commit(repo_id, operations=operations, commit_message=message, revision=revision)
    except Exception as error:
        raise ValueError(f"could not push to {repo_id!r}: {_why(error, revision)}") from error
    return f"{url}/tree/{commit.oid}"


def _why(error: Exception, revision: str | None) -> str:
    """In one line, what a failure of the hub's library comes down to."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "it is gated; accept its terms on its page, and log in by `hf auth login` or pass a token"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is none, or it is private and needs a token: log in by `hf auth login` or pass one"
    if status in (401, 403):
        return f"this token may not do that (status {status}); log in by `hf auth login`, or pass another"
    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):  # it names a file, its cause the reason
        return f"{error} {_why(error.__cause__, revision)}"
    text = re.sub(r"Bearer \S+", "Bearer ...", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
