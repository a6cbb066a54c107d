"""The contents of a folder of pictures: pictures, class folders and captions. All else is skipped and counted by
reason.

Hidden files and folders, and those of operating systems, are skipped. Links to folders are followed, loops are not.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

from flowmap.data.safe_files import printable
from flowmap.data.sources import SUFFIXES

METADATA = ("metadata.csv", "metadata.jsonl")
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
UNREAD_SUFFIXES = tuple(
    (
        ".heic .heif .hif .jxl .jp2 .psd .svg .eps .ppm .pgm .pnm .tga .ico .exr .hdr "
        ".dng .nef .cr2 .cr3 .arw .raw .orf"
    ).split()
)
NOT_REGULAR = "not regular files"
LOOP, UNREADABLE = "links to a parent folder", "unreadable folders"


class Tally(dict):
    """Counts by reason with the first three names of each, as plain values: {reason: {"count": 2, "first": [...]}}."""

    def note(self, reason: str, name: str) -> None:
        one = self.setdefault(reason, {"count": 0, "first": []})
        one["count"] += 1
        if len(one["first"]) < 3:
            one["first"].append(printable(name))

    def lines(self) -> list[str]:
        """ "2 hidden: a, b", a line for each reason."""
        more = {reason: ", ..." if one["count"] > len(one["first"]) else "" for reason, one in self.items()}
        return [f"{one['count']} {reason}: {', '.join(one['first'])}{more[reason]}" for reason, one in self.items()]


@dataclass
class Listing:
    """All names are relative to the root, with "/". classes: class folders in the order of their labels, [] without
    classes.

    texts: the name of a .txt without its suffix, as `normalized_name` returns it, -> the .txt. skipped: what is neither
    picture, caption nor metadata.
    """

    pictures: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    skipped: Tally = field(default_factory=Tally)


def listing(root: str) -> Listing:
    """The contents of the folder, pictures sorted by the parts of their names. Raises ValueError without such a folder.

    With pictures in two subfolders or more, every subfolder is a class but those that have only other files; an empty
    one keeps its label.
    """
    found, pictorial, other, empty = Listing(), set(), set(), []
    for name, kind in walk(root, found.skipped):
        top, slash, _ = name.partition("/")
        suffix = os.path.splitext(name)[1].lower()
        if kind == "folder":
            if name == top:
                empty.append(name)
            continue
        if kind == UNREADABLE or (slash and kind != LOOP and suffix in (*SUFFIXES, *UNREAD_SUFFIXES)):
            pictorial.add(top)
        else:
            other.add(top)
        if suffix == ".txt":  # a pipe too: a caption that cannot be read leaves its picture out
            found.texts[normalized_name(os.path.splitext(name)[0])] = name
        elif os.path.basename(name).lower() in METADATA:
            found.metadata.append(name)
        elif kind != "file":
            found.skipped.note(kind, name)
        elif suffix in SUFFIXES:
            found.pictures.append(name)
        else:
            known = re.fullmatch(r"\.[a-z][a-z0-9]{0,7}", suffix)  # not the ending of every numbered file
            found.skipped.note(f"unsupported files ({suffix})" if known else "unsupported files", name)
    found.pictures.sort(key=lambda name: name.split("/"))
    found.metadata.sort(key=lambda name: (name.count("/"), name))
    found.classes = _in_order(
        [*pictorial, *(name for name in empty if name not in pictorial | other)] if len(pictorial) > 1 else []
    )
    return found


def walk(root: str, skipped: Tally) -> Iterator[tuple[str, str]]:
    """(name from the root, "file" | "folder" | NOT_REGULAR | LOOP | UNREADABLE) of every entry; hidden ones go to
    `skipped`.
    """
    if not os.path.isdir(root):
        raise ValueError(f"data.root: {root}: there is no such folder")
    ahead: list[tuple[str, tuple[tuple[int, int], ...]]] = [
        ("", ())
    ]  # names, and the device and inode of what each lies in
    while ahead:
        inside, above = ahead.pop()
        try:
            state = os.stat(os.path.join(root, inside))
            here = (state.st_dev, state.st_ino)
            if here in above:
                yield inside.rstrip("/"), LOOP
                continue
            with os.scandir(os.path.join(root, inside)) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise ValueError(f"data.root: {root}: cannot be listed: {error.strerror}") from error
            yield inside.rstrip("/"), UNREADABLE
            continue
        folders: list[tuple[str, tuple[tuple[int, int], ...]]] = []
        for entry in found:
            name, is_folder = inside + entry.name, _is_folder(entry)
            if is_hidden(entry.name):
                if is_folder or os.path.splitext(name)[1].lower() in SUFFIXES:
                    skipped.note("hidden", name)
            elif is_folder:
                folders.append((f"{name}/", (*above, here)))
                yield name, "folder"
            else:
                yield name, "file" if _is_file(entry) else NOT_REGULAR
        ahead += reversed(folders)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is hidden, or left behind by an operating system."""
    return (name.startswith(".") and name not in (".", "..")) or name in SYSTEM_FOLDERS


def normalized_name(name: str) -> str:
    """The name in one spelling on all systems: composed (NFC), with `/`, and `.` and `..` resolved where possible."""
    return os.path.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def _in_order(names: list[str]) -> list[str]:
    """By number where all are numbers, else as text."""
    numbers = all(name.isascii() and name.isdecimal() for name in names)
    return sorted(names, key=lambda name: (int(name), name)) if numbers else sorted(names)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
