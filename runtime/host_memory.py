"""How much memory of this host a process can have: what is free, and what the limits of containers leave of it.

free_memory()           # bytes, or None where nobody says
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Of control groups of version 2 and 1: where they are mounted (systemd's layout), the files of a limit and of what is
# used, the line of memory.stat with cached files that can be dropped (Linux: cgroup-v2.rst, cgroup-v1/memory.rst).
VERSION_2 = (("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max", "memory.current", "inactive_file")
VERSION_1 = (("sys/fs/cgroup/memory",), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the system could hand out without swapping, within the memory limits of this process's control groups
    (docker, Kubernetes, Slurm, systemd). Elsewhere than on Linux: the memory that is built in. None: unknown."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return _built_in()
    return max(0, min(free, *_left_in_groups(root)))


def _built_in() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each limit leaves: of the group of this process and of those around it. Inside a container the group's own
    path may not be visible; its limits are then at the mount."""
    yield 1 << 63
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except (OSError, ValueError):
        return
    for number, controllers, path in (group for group in groups if len(group) == 3):
        if number == "0" or "memory" in controllers.split(","):
            mounts, limit, used, cached = VERSION_2 if number == "0" else VERSION_1
            inside = PurePosixPath(path.lstrip("/"))
            folders = [inside, *inside.parents] if ".." not in inside.parts else [PurePosixPath()]
            for folder in (root / mount / folder for mount in mounts for folder in folders):
                most, now = _number(folder / limit), _number(folder / used)
                if most is not None:  # "max", or no file: no limit
                    yield most - (now or 0) + (_number(folder / "memory.stat", cached) or 0)


def _number(path: Path, name: str = "") -> int | None:
    """What a file says, or its line of that name."""
    try:
        text = path.read_text(encoding="ascii")
        return int(text if not name else next(line.split()[1] for line in text.splitlines() if line.split()[0] == name))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
