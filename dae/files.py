"""Files of a folder, and atomic writes: a file is written completely or not at all, even if a process is killed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dae.errors import UsageError, as_usage_error

TEMPORARY = ".partial-"


def files_in(folder: Path, without: Path | None = None, _within: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the files in `folder` and its subfolders, sorted; hidden ones and the folder `without` are left out.

    Links are followed, but not to a folder that contains them; one that leads nowhere counts as a file. Raises
    UsageError for a folder that cannot be read.
    """
    real = folder.resolve()
    if real in _within or (without is not None and real == without.resolve()):
        return
    with as_usage_error(folder, "cannot be read", OSError):
        paths = sorted(folder.iterdir())
    for path in paths:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from files_in(path, without, (*_within, real))
        elif path.is_file() or not path.exists():  # not a device or a pipe
            yield path


def check_utf8(path: Path) -> None:
    """Raise UsageError unless TensorFlow, whose paths are UTF-8, finds the same `path` as Python."""
    if os.fsencode(path.absolute()).decode(errors="replace") != str(path.absolute()):
        raise UsageError(f"{path}: a path that is not UTF-8 to Python; set PYTHONUTF8=1, or choose another path")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write a file or a folder to; if the block succeeds, it becomes `path`.

    It has the last two suffixes of `path`, which can be a file or an empty folder.
    """
    # The process's own, and without the file's name, by which TensorBoard would take it for an event file. Two suffixes
    # are kept, because Keras writes weights only to a file that ends in .weights.h5.
    temporary = path.with_name("".join([f"{TEMPORARY}{os.getpid()}", *path.suffixes[-2:]]))
    try:
        yield temporary
        for written in (temporary, *temporary.rglob("*")):
            if written.is_file():
                with open(written, "rb") as file:
                    os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def reserve(descriptor: int, size: int) -> None:
    """Reserve space for an open file of `size` bytes, to be mapped into memory. Raises OSError if the disk is full.

    Without it, a write to the mapping would end the process with SIGBUS.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def check_output(path: Path, suffixes: tuple[str, ...], flag: str) -> None:
    """Raise UsageError, before any work is done, if `path` has none of the suffixes or cannot be written.

    Without suffixes, it must be the path of a new folder, or of an empty one.
    """
    if suffixes and (path.suffix not in suffixes or path.is_dir()):
        raise UsageError(f"{flag}: {path}: expected the name of a {' or '.join(suffixes)} file")
    if not suffixes and path.exists() and not (path.is_dir() and path.name and not any(path.iterdir())):
        raise UsageError(f"{flag}: {path} exists; expected the name of a new folder, or of an empty one")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{flag}: {path.parent.resolve()} is not a writable folder")
