"""What may be opened of a folder that others have filled: plain files, whole lines, names that UTF-8 can hold.

A link to a device, a pipe or a line without end would stop or fill the process that reads it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from typing import BinaryIO

MAX_TEXT_BYTES = 2**20  # of one caption, one label, or one line of a file of texts
UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # controls, turns of direction, halves of pairs


def open_plain(path: str | os.PathLike) -> BinaryIO:
    """The file at that path, links followed, opened for reading; ValueError where it is a folder, a device or a pipe, OSError as from open()."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer does not block
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ValueError("is no plain file")
    return os.fdopen(number, "rb")


def read_text(path: str | os.PathLike, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a small UTF-8 file, without a byte-order mark; ValueError says what else it is."""
    with open_plain(path) as file:
        return as_utf8(file.read(limit + 1), limit)


def as_utf8(content: bytes, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of those bytes, without a byte-order mark; ValueError where they are not UTF-8 or more than `limit`."""
    if len(content) > limit:
        raise ValueError(f"has more than {limit} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {content[error.start]:#04x} at {error.start})") from None


def lines_of(path: str | os.PathLike) -> Iterator[str]:
    """The lines of a UTF-8 file, without a byte-order mark or line ends; ValueError names file and line where it is something else."""
    number = 0
    try:
        with open_plain(path) as file:
            while line := file.readline(MAX_TEXT_BYTES + 1):
                number += 1
                yield as_utf8(line).rstrip("\r\n")
    except (OSError, ValueError) as error:
        where = f"{path}:{number}" if number else path
        raise ValueError(f"{where}: {getattr(error, 'strerror', None) or error}") from error


def shown(name: str) -> str:
    """The name as UTF-8 can hold it and a terminal shows it in place: bytes that are not UTF-8, and control characters, as escapes."""
    return UNSHOWN.sub(lambda found: _escape(found[0]), name)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
