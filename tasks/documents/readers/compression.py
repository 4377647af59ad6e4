"""Files as streams of bytes: hashed while they are read, and decompressed if they are compressed.

A file is decompressed by what it holds if its suffix is wrong: a `.gz` that a browser has unpacked already, or a gzip
file without suffix. Formats: gzip, zstd, bzip2 and xz, with any number of members, frames or streams in a row. Memory:
what `COMPRESSED_AT_ONCE` unpacks to, at most 128 MB.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from typing import TYPE_CHECKING, Any

import zstandard

from eclectus.tasks.documents.fingerprints import ContentHash

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BUFFER = 2**20
# Suffix -> bytes to decompress at once, by the most that a byte of the format can unpack to.
COMPRESSED_AT_ONCE = {".gz": 32 * 2**10, ".zst": 4 * 2**10, ".zstd": 4 * 2**10, ".bz2": 2**10, ".xz": 4 * 2**10}
COMPRESSIONS = tuple(COMPRESSED_AT_ONCE)
MOST_MEMORY = 2**31
_MAGIC = {
    ".gz": (b"\x1f\x8b",),
    ".zst": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + each]) + b"\x2a\x4d\x18" for each in range(16))),
    ".bz2": (b"BZh",),
    ".xz": (b"\xfd7zXZ\0",),
}
_PLAIN = (b"{", b"[", b"\xef\xbb\xbf")


class DamagedArchive(Exception):
    """Compressed data that breaks off or cannot be decompressed. state: truncated, damaged or followed by other data"""

    def __init__(self, state: str, why: object) -> None:
        super().__init__(str(why))
        self.state = state


class HashedFile(io.RawIOBase):
    """A file, opened unbuffered, of which the bytes from `begin` up to `end` are read once, with their digest."""

    def __init__(self, file: io.FileIO, begin: int = 0, end: int | None = None) -> None:
        self._file = file
        self._hash = ContentHash()
        self._left = None if end is None else end - begin
        self.bytes = 0
        if begin:
            file.seek(begin)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")[: self._left]
        size = self._file.readinto(target) or 0
        self._hash.update(target[:size])
        self.bytes += size
        if self._left is not None:
            self._left -= size
        return size

    def digest(self) -> str:
        """The digest of all of these bytes; what was not read yet is read now."""
        space = bytearray(BUFFER)
        while self.readinto(space):
            pass
        return self._hash.digest()

    def close(self) -> None:
        self._file.close()
        super().close()


def decompressed(raw: io.BufferedReader, compression: str | None) -> io.BufferedReader:
    """The content of a file that stands at its beginning. compression: what its suffix says."""
    usual = compression_of(raw.peek(10), compression)
    return raw if usual is None else io.BufferedReader(_Decompressed(raw, usual), BUFFER)


def compression_of(start: bytes, compression: str | None) -> str | None:
    """How a file that begins so is compressed; None if it is not."""
    usual = ".zst" if compression == ".zstd" else compression
    if not (usual and start.startswith(_MAGIC[usual])):
        found = next((suffix for suffix, magic in _MAGIC.items() if start.startswith(magic)), None)
        if found and not (found == ".bz2" and start[4:10] != b"1AY&SY") and not (found == ".zst" and start[0] != 0x28):
            usual = found
        elif start.lstrip().startswith(_PLAIN):
            usual = None
    return usual


def _begin(compression: str) -> Any:
    """A decompressor with `decompress`, `eof` and `unused_data`."""
    if compression == ".gz":
        return zlib.decompressobj(wbits=31)
    if compression == ".zst":
        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
    return bz2.BZ2Decompressor() if compression == ".bz2" else lzma.LZMADecompressor(memlimit=MOST_MEMORY)


class _Decompressed(io.RawIOBase):
    """A stream of concatenated gzip members, zstd frames, bzip2 or xz streams.

    Python's gzip discards what it has unpacked of a truncated file, and zstandard's reader does not notice that
    it is truncated; this one gives every whole byte and then raises DamagedArchive.
    """

    def __init__(self, file: io.BufferedReader, compression: str) -> None:
        self._file = file
        self._compression = compression
        self._at_once = COMPRESSED_AT_ONCE[compression]
        self._member: Any = None
        self._members = 0
        self._ready = memoryview(b"")
        self.unpacked = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        target = memoryview(buffer).cast("B")
        while not self._ready:
            compressed = b""
            if self._member is not None and self._member.eof:
                # Zeros after a member pad it to a block, as on tapes.
                compressed, self._member = self._member.unused_data.lstrip(b"\0"), None
            compressed = compressed or self._file.read(self._at_once)
            if self._member is None and self._members:
                compressed = compressed.lstrip(b"\0")
                if not compressed and self._file.peek(1):
                    continue
            if not compressed:
                if self._member is not None:
                    raise DamagedArchive("truncated", "it ends in the middle of compressed data")
                return 0
            self._ready = memoryview(self._unpack(compressed))
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        self.unpacked += size
        return size

    def _unpack(self, compressed: bytes) -> bytes:
        begins = self._member is None
        if begins:
            self._member = _begin(self._compression)
            self._members += 1
        try:
            return self._member.decompress(compressed)
        except (EOFError, OSError, zlib.error, zstandard.ZstdError, lzma.LZMAError) as error:
            trailing = begins and self._members > 1
            raise DamagedArchive("followed by other data" if trailing else "damaged", error) from error
