"""Uploads an exported folder to the Hugging Face hub, only on request."""

from __future__ import annotations

import re
from pathlib import Path


def check_repository(name: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"--push: {name!r} is not a repository; allowed: owner/name")


def push(folder: Path, repository: str) -> str:
    """Upload the folder to the repository, which is created if it does not exist, and return its address.

    Raises a RuntimeError with the reason if that fails.
    """
    from huggingface_hub import create_repo, upload_folder
    from huggingface_hub.errors import HfHubHTTPError

    check_repository(repository)
    try:
        create_repo(repository, exist_ok=True)
        return str(upload_folder(folder_path=folder, repo_id=repository, commit_message="flowmap export"))
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(f"--push: {repository} was not written ({reason}); the export is in {folder}") from error
