"""Files that are whole or not there: written to a temporary name beside the target, then renamed.

A FIFO or a character device, such as /dev/stdout, is written to as it is; so is the file that stdout goes to. Whether
a target can be written is asked before hours of work, not after.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Of atomic_path: the target's stem and suffix around the writer's process.
_TEMPORARY = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.tmp(\.[^.]*)?")
# Longer than any file takes to be written, on this machine or on another one that shares the folder.
_LEFT_AFTER_S = 3600


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in ``path``'s folder that becomes ``path`` when the block ends, and is removed when it raises.

    The temporary name is hidden and keeps the suffix (some writers choose their format by it). Readers, and whoever
    comes after a kill or a power cut, see the old file or the new one, never a part. The folder must exist. A link is
    followed and stays. A FIFO or a character device is not replaced: there the temporary path is ``path`` itself. Nor
    is the file that stdout goes to (`own_output`): it is written to where stdout stands.

    Raises:
        IsADirectoryError, FileExistsError: ``path`` is a folder, or a block device or a socket.
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
    output, stream, target = own_output(path), _is_stream(path), _followed(path)
    name = f".{target.stem}.{os.getpid()}-{secrets.token_hex(4)}.tmp{target.suffix}"
    folder = Path(tempfile.gettempdir()) if output is not None else target.parent
    temporary = path if stream else folder / name
    try:
        yield temporary
        if output is not None:
            for printed in filter(None, (sys.stdout, sys.stderr)):
                printed.flush()
            with open(output, "wb", closefd=False) as file:
                file.write(temporary.read_bytes())
            temporary.unlink()
        elif not stream:
            with temporary.open("rb") as file:
                # Without this, some file systems bring back an empty file after a power cut: the rename outran the
                # data.
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except BaseException as error:
        if not stream:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)) and error.filename2 is None:
            error.filename = str(path)
        raise


def _is_stream(path: Path) -> bool:
    """Whether ``path`` is written to as it is: a FIFO or a character device. Raises where it is no file either."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path}: expected a file to write; found a folder")
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise FileExistsError(f"{path}: expected a file to write; found a block device or a socket")
    return not stat.S_ISREG(mode)


def own_output(path: str | Path) -> int | None:
    """Which of stdout (1) and stderr (2) goes to a regular file that is ``path``, such as /dev/stdout under ``>> log``.

    Whoever opens it anew loses what was written there before, or what comes next.
    """
    with suppress(OSError):
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            return next((output for output in (1, 2) if os.path.samestat(found, os.fstat(output))), None)
    return None


def _followed(path: Path) -> Path:
    """Where a link leads to; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically; see `atomic_path`. Names of files in it need not be UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def read_json(path: str | Path, error: type[Exception]) -> dict[str, Any]:
    """The object in a JSON file; ``error``, naming the file, where there is none in it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as problem:
        raise error(f"{path}: expected JSON; found: {problem}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object; found {type(value).__name__}")
    return value


@contextmanager
def locked(folder: str | Path, busy: Exception, wait_s: float = 0.0) -> Iterator[None]:
    """Keep other processes out of a folder; the kernel releases the lock however this one ends.

    Raises ``busy`` where another process holds the lock for longer than ``wait_s``.
    """
    handle = os.open(folder, os.O_RDONLY)
    deadline = time.monotonic() + wait_s
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise busy from None
                time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of killed writers from a folder that nobody else is writing to."""
    for path in Path(folder).glob(".*.tmp*"):
        path.unlink(missing_ok=True)


def remove_leftovers_of(targets: Iterable[Path]) -> None:
    """Remove the temporary files that killed writers of these files left an hour ago or more."""
    names: dict[Path, set[str]] = {}
    for target in targets:
        names.setdefault(target.parent, set()).add(target.name)
    for folder, wanted in names.items():
        for name in os.listdir(folder) if folder.is_dir() else ():
            found = _TEMPORARY.fullmatch(name)
            if found and found[1] + (found[2] or "") in wanted:
                with suppress(FileNotFoundError):
                    if time.time() - (folder / name).stat().st_mtime > _LEFT_AFTER_S:
                        (folder / name).unlink()


def expect_folder(path: str | Path) -> None:
    """Raise FileNotFoundError where ``path`` has no folder to lie in, PermissionError where that cannot be written."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder to write it into; found none")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: expected a folder that can be written; found one that cannot")


def expect_file_or_nothing(path: str | Path) -> None:
    """Raise where `atomic_path` would: what `expect_folder` raises too, for the file that a link leads to."""
    if own_output(path) is not None:
        return
    if not _is_stream(Path(path)):
        expect_folder(_followed(Path(path)))
    elif not os.access(path, os.W_OK):
        raise PermissionError(f"{path}: expected a file that can be written; found one that cannot")


def expect_folder_or_nothing(path: str | Path) -> None:
    """Raise NotADirectoryError where ``path`` is a file, or below one: no folder can be made there."""
    file = next((p for p in (Path(path), *Path(path).parents) if p.exists() and not p.is_dir()), None)
    if file is not None:
        found = "a file" if file == Path(path) else f"the file {file}"
        raise NotADirectoryError(f"{path}: expected a folder; found {found}")
