"""What lies in a folder of pictures: pictures, classes, texts beside them, and what is neither, counted by reason.

Hidden entries, and those that systems and tools leave behind, are passed over. Links to folders are followed, but never in a circle.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

from flowmap.data.plain import shown
from flowmap.data.sources import SUFFIXES

METADATA = ("metadata.csv", "metadata.jsonl")
LEFT_BEHIND = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
UNREAD = tuple(".heic .heif .hif .jxl .jp2 .psd .svg .eps .ppm .pgm .pnm .tga .ico .exr .hdr .dng .nef .cr2 .cr3 .arw .raw .orf".split())
NO_FILE = "no plain files"
CIRCLE, UNLISTED = "links to a folder above them", "folders that cannot be listed"


class Tally(dict):
    """Counts by reason with the first three names of each, as plain values: {reason: {"count": 2, "first": [...]}}."""

    def note(self, reason: str, name: str) -> None:
        one = self.setdefault(reason, {"count": 0, "first": []})
        one["count"] += 1
        if len(one["first"]) < 3:
            one["first"].append(shown(name))

    def lines(self) -> list[str]:
        """"2 hidden: a, b", a line for each reason."""
        more = {reason: ", ..." if one["count"] > len(one["first"]) else "" for reason, one in self.items()}
        return [f"{one['count']} {reason}: {', '.join(one['first'])}{more[reason]}" for reason, one in self.items()]


@dataclass
class Listing:
    """All names are from the root, with "/". classes: class folders in the order of their labels, [] where there are none.

    texts: name of a .txt without its suffix, as `plain_name` gives it, -> the .txt. passed_over: what is no picture, text or metadata.
    """

    pictures: list[str] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    metadata: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    passed_over: Tally = field(default_factory=Tally)


def listing(root: str) -> Listing:
    """The folder's; files are sorted by the parts of their names. ValueError where there is no such folder."""
    found, pictorial, other, empty = Listing(), set(), set(), []
    for name, kind in below(root, found.passed_over):
        top, slash, _ = name.partition("/")
        suffix = os.path.splitext(name)[1].lower()
        if kind == "folder":
            if name == top:
                empty.append(name)
            continue
        if kind == UNLISTED or (slash and kind != CIRCLE and suffix in (*SUFFIXES, *UNREAD)):
            pictorial.add(top)
        else:
            other.add(top)
        if suffix == ".txt":  # a pipe too: a caption that cannot be read leaves its picture out
            found.texts[plain_name(os.path.splitext(name)[0])] = name
        elif os.path.basename(name).lower() in METADATA:
            found.metadata.append(name)
        elif kind != "file":
            found.passed_over.note(kind, name)
        elif suffix in SUFFIXES:
            found.pictures.append(name)
        else:
            known = re.fullmatch(r"\.[a-z][a-z0-9]{0,7}", suffix)  # not the ending of every numbered file
            found.passed_over.note(f"files of other kinds ({suffix})" if known else "files of other kinds", name)
    found.pictures.sort(key=lambda name: name.split("/"))
    found.metadata.sort(key=lambda name: (name.count("/"), name))
    found.classes = _in_order([*pictorial, *(name for name in empty if name not in pictorial | other)] if len(pictorial) > 1 else [])
    return found


def below(root: str, passed_over: Tally) -> Iterator[tuple[str, str]]:
    """(name from the root, "file" | "folder" | NO_FILE | CIRCLE | UNLISTED) of what is not hidden; what is, is noted in passed_over."""
    if not os.path.isdir(root):
        raise ValueError(f"data.root: {root}: there is no such folder")
    ahead = [("", ())]
    while ahead:
        inside, above = ahead.pop()
        try:
            state = os.stat(os.path.join(root, inside))
            here = (state.st_dev, state.st_ino)
            if here in above:
                yield inside.rstrip("/"), CIRCLE
                continue
            with os.scandir(os.path.join(root, inside)) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not inside:
                raise ValueError(f"data.root: {root}: cannot be listed: {error.strerror}") from error
            yield inside.rstrip("/"), UNLISTED
            continue
        folders = []
        for entry in found:
            name, is_folder = inside + entry.name, _is_folder(entry)
            if is_hidden(entry.name):
                if is_folder or os.path.splitext(name)[1].lower() in SUFFIXES:
                    passed_over.note("hidden", name)
            elif is_folder:
                folders.append((f"{name}/", (*above, here)))
                yield name, "folder"
            else:
                yield name, "file" if _is_file(entry) else NO_FILE
        ahead += reversed(folders)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of that name is hidden, or left behind by a system or a tool."""
    return (name.startswith(".") and name not in (".", "..")) or name in LEFT_BEHIND


def plain_name(name: str) -> str:
    """A name as two systems would write it alike: composed (NFC), `/` between its parts, no `.` or `..` that can be resolved."""
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
