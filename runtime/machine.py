"""What this machine's CPU is, and where things are kept that a later process finds again.

cpu_model()     # "AMD EPYC 9654 96-Core Processor"
cpu_isa()       # ("avx2", "avx512f", "avx512_bf16", "avx512_vnni")
"""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path

# Extensions that decide how fast a kernel is, as Linux spells them; "asimd..." and "sve..." are Arm's.
EXTENSIONS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "bf16", "i8mm", "sve", "sve2",
)  # fmt: skip


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_directory(cache_dir: Path | None = None) -> Path:
    """The argument, else LLMC_CACHE, else llmc in XDG_CACHE_HOME or ~/.cache."""
    if cache_dir is not None:
        return Path(cache_dir)
    if own := os.environ.get("LLMC_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "llmc"


def cpu_model() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_isa() -> tuple[str, ...]:
    """Those of `EXTENSIONS` that Linux reports; nothing elsewhere."""
    flags = {*_cpuinfo().get("flags", "").split(), *_cpuinfo().get("Features", "").split()}
    return tuple(name for name in EXTENSIONS if name in flags)


@lru_cache(maxsize=1)
def _cpuinfo() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.split("\n\n", 1)[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}
