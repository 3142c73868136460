"""Golden vectors on disk: a zip of `.npy` members, each under its array's exact name.

`numpy.load` and `numpy.savez` are not used, as they change names: `x.npy` would be read as `x`, and
a Dict observation may have both keys.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from serving.errors import BundleError

_SUFFIX = ".npy"
# Of all golden vectors together, unpacked: a small archive can hold a very large one.
_LIMIT_BYTES = 256 * 1024 * 1024
# A zip counts the bytes of a member's name in 16 bits.
_NAME_LIMIT_BYTES = 65_535


def read_golden(path: Path) -> dict[str, NDArray[Any]]:
    """Read the arrays of an archive, by name.

    Raises:
        BundleError: The file is damaged, holds objects, or is absurdly large when unpacked.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            size_bytes = sum(entry.file_size for entry in entries)
            if size_bytes > _LIMIT_BYTES:
                raise BundleError(
                    f"{path} would take {size_bytes} bytes unpacked, at most {_LIMIT_BYTES} are "
                    "read"
                )
            found: dict[str, NDArray[Any]] = {}
            for entry in entries:
                name = entry.filename.removesuffix(_SUFFIX)
                if name == entry.filename or name in found:
                    raise BundleError(
                        f"{path} holds {entry.filename!r}, expected {_SUFFIX} members of "
                        "different names"
                    )
                with archive.open(entry) as file:
                    found[name] = np.lib.format.read_array(file, allow_pickle=False)
            return found
    except (
        OSError,
        ValueError,
        EOFError,
        KeyError,
        MemoryError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as exc:
        raise BundleError(f"{path} is not readable: {exc}") from exc


def write_golden(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays, compressed, by their exact names; the same arrays make the same bytes.

    Args:
        path: The file, replaced if it is there.
        arrays: By name, in this order; no objects.

    Raises:
        BundleError: A zip cannot carry one of the names; nothing is written then.
        ValueError: An array of objects.
    """
    # A `ZipInfo` made by hand bears the year 1980, not the time of writing.
    entries = {name: zipfile.ZipInfo(f"{name}{_SUFFIX}") for name in arrays}
    for name, entry in entries.items():
        _check_name(name, entry)
    with zipfile.ZipFile(path, "w") as archive:
        for name, entry in entries.items():
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(arrays[name]), allow_pickle=False)


def _check_name(name: str, entry: zipfile.ZipInfo) -> None:
    member = f"{name}{_SUFFIX}"
    try:
        # What `ZipInfo` changed, such as a NUL that ends a name, would be read back changed.
        is_carried = entry.filename == member and len(member.encode("utf-8")) <= _NAME_LIMIT_BYTES
    except UnicodeEncodeError:  # half a surrogate pair
        is_carried = False
    if not is_carried:
        raise BundleError(
            f"golden vectors cannot be stored under the name {name[:80]!r}: a zip's names are "
            "valid Unicode of at most 65535 bytes without NUL; rename that key of the space"
        )
