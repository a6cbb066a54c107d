"""Reading files that a user brings: regular files only, lines of bounded length, names that UTF-8 can encode.

A link to a device, a named pipe or an endless line would otherwise block the process or exhaust its memory.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

MAX_TEXT_BYTES = 2**20  # of one caption, one label, or one line of a file of texts
UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)  # control, bidirectional, surrogates


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """The file at that path, opened for reading; links are followed.

    Raises ValueError for a folder, a device or a pipe, and OSError as open() does.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a device is not even opened
        raise ValueError("is not a regular file")
    number = os.open(
        path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    )  # does not block on a pipe that took its place meanwhile
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise ValueError("is not a regular file")
    return os.fdopen(number, "rb")


class Positioned(io.RawIOBase):
    """The same bytes with a position of its own, in place of the one that the processes of a fork share."""

    def __init__(self, file: BinaryIO):
        self._file, self._at, self._size = file, 0, os.fstat(file.fileno()).st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if at < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        found = os.pread(self._file.fileno(), len(buffer), self._at)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        self._file.close()
        super().close()


def read_text(path: str | os.PathLike, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a small UTF-8 file, without a byte-order mark. Raises ValueError for any other file."""
    with open_regular(path) as file:
        return decode_utf8(file.read(limit + 1), limit)


def decode_utf8(content: bytes, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of those bytes, without a byte-order mark; ValueError where they are not UTF-8 or more than `limit`."""
    if len(content) > limit:
        raise ValueError(f"has more than {limit} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {content[error.start]:#04x} at {error.start})") from None


def lines_of(path: str | os.PathLike) -> Iterator[str]:
    """The lines of a UTF-8 file, without a byte-order mark or line ends. ValueError names the file and the line."""
    number = 0
    try:
        with open_regular(path) as file:
            while line := file.readline(MAX_TEXT_BYTES + 1):
                number += 1
                yield decode_utf8(line).rstrip("\r\n")
    except (OSError, ValueError) as error:
        where = f"{path}:{number}" if number else path
        reason = error.strerror if isinstance(error, OSError) else None
        raise ValueError(f"{where}: {reason or error}") from error


def printable(name: str) -> str:
    """The name with escapes in place of bytes that are not UTF-8, of control characters and of changes of direction."""
    return UNPRINTABLE.sub(lambda found: _escape(found[0]), name)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python keeps a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
