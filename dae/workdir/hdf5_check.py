"""Test that reading a model file takes bounded time and memory: an HDF5 file, or the archive that .keras files are.

The HDF5 library allocates what a file claims, and it can loop forever or crash on a damaged one; nothing in the same
process could stop it.
"""

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:] = sys.argv[2:]

import h5py

TIMEOUT_SECONDS = 30.0
# Text and numbers of a model are not compressed further than to this fraction.
LARGEST_COMPRESSION = 20
# Memory of the process that reads an HDF5 file, besides twice the file's size, in bytes.
MEMORY = 2**30


def check(path: Path) -> None:
    """Raise ValueError, in one line, if the file claims far more bytes than it has.

    Every attribute and array of an .h5 file is read too, by another process, which must end in time; the archive of a
    .keras file has checksums, which its reader compares.
    """
    if path.suffix == ".keras":
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            if (claimed := sum(member.file_size for member in archive.infolist())) > LARGEST_COMPRESSION * size:
                raise ValueError(f"its files claim {claimed:,} bytes, it has {size:,}")
            for name in archive.namelist():
                if name.endswith(".h5"):
                    with h5py.File(io.BytesIO(archive.read(name))) as file:
                        check_claims(file, size)
        return
    # Isolated, so that no file in this folder shadows a module, and then with this process's path.
    command = [sys.executable, "-I", __file__, str(path), *sys.path]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"reading it takes more than {TIMEOUT_SECONDS:g} seconds") from None
    if completed.returncode != 0:
        messages = completed.stderr.strip().splitlines()
        raise ValueError(messages[-1] if messages else "the HDF5 library crashes on it")


def check_claims(file: h5py.File, size: int) -> None:
    """Raise ValueError if the arrays in an HDF5 file of `size` bytes claim far more."""
    claims = [0]
    file.visititems(lambda _, item: claims.append(item.nbytes) if isinstance(item, h5py.Dataset) else None)
    if sum(claims) > LARGEST_COMPRESSION * size:
        raise ValueError(f"its arrays claim {sum(claims):,} bytes, the file has {size:,}")


def _read_all(path: str) -> None:
    """Read the HDF5 file at `path` with bounded memory. Raises ValueError, MemoryError, or what h5py raises."""
    size = Path(path).stat().st_size
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY + 2 * size, MEMORY + 2 * size))

    def read(_: str, item: Any) -> None:
        list(item.attrs.values())
        if isinstance(item, h5py.Dataset):
            item[()]

    with h5py.File(path, locking=False) as file:
        check_claims(file, size)
        read("/", file)
        file.visititems(read)


if __name__ == "__main__":
    _read_all(sys.argv[1])
