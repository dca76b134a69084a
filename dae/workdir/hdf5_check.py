"""Test, in a separate process, that an HDF5 file can be read at all.

The HDF5 library can loop forever or crash on a damaged file, and nothing in the same process could stop it.
"""

import subprocess
import sys
from pathlib import Path

TIMEOUT_SECONDS = 30.0


def check(path: Path) -> None:
    """Raise ValueError, in one line, unless every attribute and array in the file can be read in time."""
    # Isolated, so that no file in this folder shadows a module, and then with this process's path.
    command = [sys.executable, "-I", __file__, str(path), *sys.path]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"reading it takes more than {TIMEOUT_SECONDS:g} seconds") from None
    if completed.returncode != 0:
        messages = completed.stderr.strip().splitlines()
        raise ValueError(messages[-1] if messages else "the HDF5 library crashes on it")


if __name__ == "__main__":
    _, path, *sys.path[:] = sys.argv
    import h5py

    def read(name: str, item: h5py.Group | h5py.Dataset) -> None:
        """Read all attributes of `item`, and its array unless it claims more bytes than the file has."""
        list(item.attrs.values())
        if isinstance(item, h5py.Dataset) and item.nbytes <= Path(path).stat().st_size:
            item[()]

    with h5py.File(path, locking=False) as file:
        read("/", file)
        file.visititems(read)
