"""Free memory as this process sees it: of the system, and of the control groups that it is in."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.runtime.host_memory import free_memory

MIB = 2**20
V1, V2 = "sys/fs/cgroup/memory", "sys/fs/cgroup"


def host(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A host with 1000 MiB available, whose other files are these."""
    files = {
        "proc/meminfo": f"MemTotal: 9999 kB\nMemAvailable: {1000 * 1024} kB\n",
        "proc/self/cgroup": groups,
        **files,
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    """The files of one group; sizes in MiB."""
    first = folder.startswith(V1)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
    stat = f"cache 5\n{'total_' * first}inactive_file {cached * MIB}\n"
    most = limit if not limit.isdecimal() else str(int(limit) * MIB)
    return {f"{folder}/{names[0]}": most, f"{folder}/{names[1]}": str(used * MIB), f"{folder}/memory.stat": stat}


@pytest.mark.parametrize(
    ("groups", "files", "free"),
    [
        ("0::/\n", {}, 1000),
        ("0::/\n", group(V2, "max", 300), 1000),
        ("0::/\n", group(V2, "500", 300), 200),
        ("0::/\n", group(V2, "500", 300, cached=100), 300),
        ("0::/a/b\n", {**group(f"{V2}/a", "400", 300), **group(f"{V2}/a/b", "max", 10)}, 100),
        ("0::/a/b\n", {**group(f"{V2}/a", "max", 300), **group(f"{V2}/a/b", "50", 10)}, 40),
        ("0::/../../other\n", group(V2, "500", 100), 400),
        ("0::/\n", group(V2, "100", 300), 0),
        ("0::/\n", {f"{V2}/memory.max": str(70 * MIB)}, 70),
        ("4:memory:/docker/x\n0::/\n", group(V1, "500", 100), 400),
        ("4:cpu,memory:/job\n", {**group(V1, str(2**43), 800), **group(f"{V1}/job", "300", 100, cached=7)}, 207),
        ("4:cpu:/job\n", group(f"{V1}/job", "300", 100), 1000),
        ("0::/u\n4:memory:/\n", group(f"{V2}/unified/u", "60", 10), 50),
        ("nonsense\n", {}, 1000),
    ],
)
def test_the_tightest_group_around_this_process_decides(tmp_path, groups, files, free):
    assert free_memory(host(tmp_path, groups, files)) == free * MIB


def test_a_system_that_does_not_say_what_is_free_has_what_is_built_in(tmp_path):
    built_in = free_memory(tmp_path)
    assert built_in is not None
    assert built_in >= free_memory() > 0
