"""Whether an HDF5 file can be read at all, asked in a process of its own.

The HDF5 library can loop for ever, or crash, in a damaged file, and nothing in its own process can stop it then.
"""

import subprocess
import sys
from pathlib import Path

SECONDS_ALLOWED = 30.0


def check(path: Path) -> None:
    """Raises ValueError, in one line, unless every attribute and array in the file `path` can be read in time."""
    try:
        done = subprocess.run(
            # Isolated, so that nothing in this folder is taken for a module, and then with the path of this process.
            [sys.executable, "-I", __file__, str(path), *sys.path],
            capture_output=True,
            text=True,
            timeout=SECONDS_ALLOWED,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"reading it takes more than {SECONDS_ALLOWED:g} seconds") from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise ValueError(said[-1] if said else "the HDF5 library crashes on it")


def _read_all(path: str) -> None:
    import h5py

    def read(name: str, item: h5py.Group | h5py.Dataset) -> None:
        for attribute in item.attrs:
            item.attrs[attribute]
        # A few bytes may declare an array of terabytes.
        if isinstance(item, h5py.Dataset) and item.nbytes <= Path(path).stat().st_size:
            item[()]

    with h5py.File(path) as file:
        read("/", file)
        file.visititems(read)


if __name__ == "__main__":
    _, file, *sys.path[:] = sys.argv
    _read_all(file)
