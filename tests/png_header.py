"""An image of any size in a few bytes."""

import struct
import zlib
from pathlib import Path


def header_only(path: Path, width: int, height: int) -> None:
    """Write a PNG that promises grey pixels and has none."""
    parts = [(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)),
             (b'IDAT', zlib.compress(b'\0' * 100)), (b'IEND', b'')]
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + kind + data
        + struct.pack('>I', zlib.crc32(kind + data)) for kind, data in parts))
