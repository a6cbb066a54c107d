"""The Hugging Face hub: a repository's files in the local cache, a folder in a repository, and one line for an error.

HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN are read by huggingface_hub, which each function imports when it is called.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOG_IN = "log in (`hf auth login`, or HF_TOKEN)"


def is_repository(name: str) -> bool:
    """Whether that is a repository's name: owner/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def check_repository(name: str, key: str) -> None:
    """Raise a ValueError that names `key` unless `name` is a repository's."""
    if not is_repository(name):
        raise ValueError(f"{key}: {name!r} is not a repository; allowed: owner/name")


def fetched(source: str, patterns: Sequence[str], *, key: str, revision: str | None = None) -> Path:
    """The cached folder of the repository's files that match, at a branch, tag or commit; missing files are downloaded.

    Raises a one-line ValueError that names `key`, the repository and the reason.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError

    try:
        place = dict(revision=revision, endpoint=constants.ENDPOINT, cache_dir=constants.HF_HUB_CACHE)
        return Path(snapshot_download(source, allow_patterns=list(patterns), **place))
    except (HTTPError, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ValueError(f"{key}: {source!r} is no folder, and as a hub id{at}: {reason(error)}") from error


def upload(
    folder: Path,
    repository: str,
    *,
    message: str,
    key: str,
    private: bool | None = None,
    revision: str | None = None,
    space: bool = False,
) -> str:
    """Upload the folder to the repository, which is created if it does not exist, and return the commit's address.

    private: for a new repository. revision: the branch, which must exist. space: it is a Space of the Gradio SDK, not a
    model. Raises a one-line RuntimeError if it fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    check_repository(repository, key)
    try:
        api = HfApi()
        kind: dict[str, Any] = {"repo_type": "space"} if space else {}
        sdk: dict[str, Any] = {"space_sdk": "gradio"} if space else {}
        api.create_repo(repository, private=private, exist_ok=True, **kind, **sdk)
        options = dict(revision=revision, commit_message=message, **kind)
        return str(api.upload_folder(folder_path=folder, repo_id=repository, **options))
    except (HTTPError, OSError, ValueError) as error:
        raise RuntimeError(f"{key}: {repository} was not uploaded to: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What went wrong and what to do, on one line."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: accept its terms on its page of the hub, then {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository, or it is private: {LOG_IN}"
    if status in (401, 403):
        return f"the hub does not allow it with this token: {LOG_IN}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return f"it is not in the cache, and {_unreachable(error.__cause__)}"
    return _first_line(error)


def _unreachable(error: BaseException) -> str:
    from huggingface_hub.errors import OfflineModeIsEnabled

    offline = isinstance(error, OfflineModeIsEnabled)
    return "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
