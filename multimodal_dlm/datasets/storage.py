"""Where shards and manifests lie: folders of this machine, or addresses that fsspec reads.

A remote file is read by byte ranges, so a sample costs one request once the index is here. Commands
(`pipe:`) and protocols that are not in `PROTOCOLS` are refused by name; nothing is executed.
"""

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from multimodal_dlm.errors import DataError, unknown_name

PROTOCOLS = ("abfs", "file", "gs", "hf", "http", "https", "memory", "s3")
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(.*)", re.DOTALL)


@dataclass(frozen=True)
class RemotePath:
    """A file or folder that fsspec reads; has what `pathlib.Path` has, as far as it is needed.

    Args:
        url: `protocol://...`.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        """Last part."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        """Everything but the last part."""
        return RemotePath(self.url.rstrip("/").rpartition("/")[0])

    def with_name(self, name: str) -> "RemotePath":
        """Another file of the same folder."""
        return self.parent / name

    def is_file(self) -> bool:
        """True when it can be read."""
        try:
            return self._try("info").get("type") == "file"
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return int(self._try("size") or 0)

    def read_range(self, offset: int, size: int) -> bytes:
        """Bytes offset..offset + size - 1."""
        data = bytes(self._try("cat_file", start=offset, end=offset + size)) if size else b""
        if len(data) > size:
            raise DataError(
                f"`{self.url}` must be served by byte ranges; the server sent {len(data)} bytes for"
                f" {size}. Use a server that answers range requests, or copy the shards.",
                reason="unreachable",
            )
        return data

    def read_bytes(self) -> bytes:
        """The whole file."""
        return bytes(self._try("cat_file"))

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file, for reading."""
        del mode
        return cast(BinaryIO, self._try("open", "rb"))

    def _try(self, operation: str, *args: Any, **options: Any) -> Any:
        # Filesystems are cached by fsspec and made anew after a fork; never kept here.
        try:
            files, path = fsspec.url_to_fs(self.url)
            return getattr(files, operation)(path, *args, **options)
        except Exception as error:  # Filesystems raise errors of their own.
            kind = type(error).__name__
            raise DataError(
                f"`{self.url}` must be readable; got {kind}: {error}. Check the address, the access"
                " and that fsspec's package for the protocol is installed"
                " (`pip install 'multimodal-dlm[remote]'`).",
                reason="unreachable",
            ) from error


AnyPath = Path | RemotePath


def as_path(place: "str | AnyPath") -> AnyPath:
    """A local path, or an address of a known protocol.

    Raises:
        DataError: When the protocol is not one of `PROTOCOLS`, or it is a command.
    """
    if isinstance(place, Path | RemotePath):
        return place
    found = _ADDRESS.fullmatch(place)
    if found is None:
        return Path(place)
    protocol = found[1].lower()
    if protocol == "pipe":
        raise DataError(
            f"`{place[:200]}`: `pipe:` runs a command and is never read. Give a folder or an"
            f" address ({', '.join(PROTOCOLS)}).",
            reason="protocol",
        )
    if protocol not in PROTOCOLS or not found[2].startswith("//"):
        raise DataError(
            f"{unknown_name('protocol', protocol, PROTOCOLS)} Give a folder or"
            f" `protocol://...`; got `{place[:200]}`.",
            reason="protocol",
        )
    return RemotePath(place)


def file_size(path: AnyPath) -> int:
    """Size of a file in bytes."""
    return path.num_bytes if isinstance(path, RemotePath) else path.stat().st_size


class RangeReader:
    """Byte ranges of some files; the last few local ones stay open.

    Args:
        most_open: Files kept open.
    """

    def __init__(self, most_open: int = 32) -> None:
        self.most_open = most_open
        self._files: dict[Path, int] = {}

    def read(self, path: AnyPath, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`."""
        if isinstance(path, RemotePath):
            return path.read_range(offset, size)
        if path not in self._files:
            while len(self._files) >= self.most_open:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[path] = os.open(path, os.O_RDONLY)
        return os.pread(self._files[path], size, offset)

    def close(self) -> None:
        """Close every file."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, object]:
        return {"most_open": self.most_open, "_files": {}}

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()


def open_range(path: AnyPath) -> BinaryIO:
    """A file for scanning from its start to its end."""
    if isinstance(path, RemotePath):
        return io.BufferedReader(cast(Any, path.open()), 2**20)
    return path.open("rb")
