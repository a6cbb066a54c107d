"""Download two sets of emoji as a folder of pictures with captions: `python -m flowmap.data.fetch emoji`.

Sources, from the npm registry: emoji-datasource-google (Apache-2.0) and emoji-datasource-twitter (CC-BY 4.0), 16.0.0,
64x64 RGBA. Flags and skin tones are left out: 1,636 names in each set. It writes out/emoji: <category>/<set>-<code>.png
on white and metadata.jsonl with captions.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

SETS = ("google", "twitter")
VERSION = "16.0.0"
LEFT_OUT = ("Flags", "Component")


def fetch_emoji(out: Path) -> Path:
    """The folder out/emoji, whole; ValueError, with what to do instead, where npm cannot bring it."""
    folder = out / "emoji"
    if (folder / "metadata.jsonl").is_file():
        print(f"{folder}: complete, nothing to do")
        return folder
    if shutil.which("npm") is None:
        raise ValueError(f"this machine has no npm to fill {folder} with: install Node.js and try again")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".fetch-") as scratch:
        captions = [
            line for name in SETS for line in _one_set(name, _pack(name, Path(scratch)), Path(scratch) / "emoji")
        ]
        (Path(scratch) / "emoji" / "metadata.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in captions), encoding="utf-8"
        )
        os.replace(Path(scratch) / "emoji", folder)
    print(f"{folder}: {len(captions)} pictures with captions")
    return folder


def _pack(name: str, scratch: Path) -> Path:
    package = f"emoji-datasource-{name}@{VERSION}"
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=scratch, capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(
            f"npm pack {package} failed: {' '.join(done.stderr.split())[:300] or f'exit {done.returncode}'}"
        )
    return scratch / f"emoji-datasource-{name}-{VERSION}.tgz"


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo | str) -> bytes:
    """The contents of a file in the archive."""
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


def _one_set(name: str, archive: Path, folder: Path) -> list[dict[str, str]]:
    """Writes that set's pictures below the folder; a line of metadata for each."""
    with tarfile.open(archive) as tar:
        names = {
            entry["image"]: entry
            for entry in json.loads(_bytes(tar, "package/emoji.json"))
            if entry["category"] not in LEFT_OUT
        }
        lines = []
        for member in tar.getmembers():
            path = Path(member.name)
            if path.parent.as_posix() != f"package/img/{name}/64" or path.name not in names:
                continue
            entry = names[path.name]
            place = Path(re.sub(r"[^a-z]+", "-", entry["category"].lower())) / f"{name}-{path.name}"
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            picture = Image.open(io.BytesIO(_bytes(tar, member))).convert("RGBA")
            Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB").save(folder / place)
            lines.append(
                {"file_name": place.as_posix(), "text": f"{entry['name'].lower()}, {entry['category'].lower()}, {name}"}
            )
    return lines
