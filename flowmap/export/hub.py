"""An exported folder to the hub: the one place that speaks to it, and only when asked."""

from __future__ import annotations

import re
from pathlib import Path


def check_repository(name: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"--push: {name!r} is not a repository; allowed: owner/name")


def push(folder: Path, repository: str) -> str:
    """Uploads the folder to that repository, which is made if it is not there, and gives its address. RuntimeError says why it did not."""
    from huggingface_hub import create_repo, upload_folder
    from huggingface_hub.errors import HfHubHTTPError

    check_repository(repository)
    try:
        create_repo(repository, exist_ok=True)
        return str(upload_folder(folder_path=folder, repo_id=repository, commit_message="flowmap export"))
    except (HfHubHTTPError, OSError) as error:
        raise RuntimeError(
            f"--push: {repository} was not written ({str(error).strip().splitlines()[0]}); the export is in {folder}"
        ) from error
