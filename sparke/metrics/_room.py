"""Whether a matrix has room in memory, told before it is made."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sparke.errors import ArgumentError

CGROUP = Path("/sys/fs/cgroup")


def reserve(
    measure: str, side: tuple[int, int], copies: int, device: torch.device, cure: str
) -> None:
    """Raise unless `copies` float64 matrices of `side` have room on `device`, naming the cure.

    `copies` counts what the decomposition needs beside the matrix itself.
    """
    rows, columns = side
    needed, free = 8 * copies * rows * columns, available(device)
    if free is not None and needed > free:
        raise ArgumentError(
            f"{measure} needs {copies} matrices of {rows} x {columns} in float64 here, "
            f"{needed:,} bytes ({_gib(needed)}), and {_gib(free)} are free. {cure}"
        )


def available(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device without swapping, None where nothing tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [size for size in (_free(), _left_to_container()) if size is not None]
    return min(known, default=None)


def _free() -> int | None:
    """What the system has for new programs; where it does not say, all its memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (kilobytes,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        return int(kilobytes) << 10
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _left_to_container() -> int | None:
    """What the limit of this control group leaves; pages of files give way."""
    try:
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        lines = (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        files = sum(int(size) for name, size in map(str.split, lines) if name == "inactive_file")
    except (OSError, ValueError):  # no limit reads "max"
        return None
    return max(0, limit - used + files)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
