"""Files that are whole or not there: written to a temporary name beside the target, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in ``path``'s folder that becomes ``path`` when the block ends, and is removed when it raises.

    The temporary name is hidden and keeps the suffix (some writers choose their format by it). Readers, and whoever
    comes after a kill or a power cut, see the old file or the new one, never a part. The folder must exist.

    Raises:
        OSError: as the block or the rename raised it, with ``filename`` set to ``path`` where it named no file (a full
            disk).

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> with atomic_path(Path(folder.name) / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> [p.name for p in Path(folder.name).iterdir()]
    ['a.txt']
    >>> folder.cleanup()
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            # Without this, some file systems bring back an empty file after a power cut: the rename outran the data.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)) and error.filename2 is None:
            error.filename = str(path)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically; see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of killed writers from a folder that nobody else is writing to."""
    for path in Path(folder).glob(".*.tmp*"):
        path.unlink(missing_ok=True)
