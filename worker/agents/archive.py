"""Pack and unpack an agent's memory: a tar.gz of files below its HOME.

The agent wrote these files, so an archive may be anything: links that lead out, or a few bytes that stand for
many. Only plain files and directories are unpacked, and no more than a limit.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

UNPACKED_LIMIT = 512 * 2**20  # bytes


def unpack(content: bytes, home: Path) -> None:
    """Unpack below `home`. Blocks. Raises tarfile.TarError if it would be over UNPACKED_LIMIT."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        for member in _plain(archive):
            # Only Python from 3.11.4 on has filters; there is nothing left for one to do.
            if hasattr(tarfile, "data_filter"):
                archive.extract(member, home, set_attrs=False, filter="data")
            else:
                archive.extract(member, home, set_attrs=False)


def plain(content: bytes) -> bytes:
    """The archive without what `unpack` leaves out. Blocks. Raises as `unpack`."""
    buffer = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive,
        tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as made,
    ):
        for member in _plain(archive):
            kept = tarfile.TarInfo(member.name)
            kept.type, kept.mode, kept.size = member.type, 0o700, member.size
            made.addfile(kept, archive.extractfile(member) if member.isfile() else None)
    return buffer.getvalue()


def _plain(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    size = 0
    for member in archive:
        size += member.size
        if size > UNPACKED_LIMIT:
            raise tarfile.TarError(f"the agent's memory has over {UNPACKED_LIMIT >> 20} MiB")
        parts = Path(member.name).parts
        if (member.isfile() or member.isdir()) and ".." not in parts and not member.name.startswith("/"):
            yield member


def pack(root: Path, below: Path, limit: int) -> bytes | None:
    """The plain files below `root`/`below`; None if they have over UNPACKED_LIMIT, or over `limit` packed.

    Blocks.
    """
    buffer = io.BytesIO()
    size = 0
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
        for path in sorted((root / below).rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            size += path.stat().st_size
            if size > UNPACKED_LIMIT or buffer.tell() > limit:
                return None
            archive.add(path, arcname=str(path.relative_to(root)), recursive=False)
    return buffer.getvalue() if buffer.tell() <= limit else None
