"""CPU binding: a rank's process stays on the cores near its NPU.

Enters: the NPUs that the ranks of this host use. Leaves: the process on its share of the cores of its NPU's NUMA node,
or one line that says why not; a run never fails for it. BIND_CPU=0 switches it off, as in the original stack.

    bind([0, 1], own=1)      # Binding(npu=1, cores=(24, ..., 47))

Which cores are near is asked of `npu-smi info -t topo` (its last column); where that says nothing, of the NUMA node
that Linux knows for the NPU's PCIe address (`npu-smi info -m`, `-t board`). mindie-stack.md 1.6, 2.5.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmc.compiler.diagnostics import UserError
from llmc.runtime.npu import npu_smi

SYSTEM = Path("/sys")
THREADS = Path("/proc/self/task")
TOPOLOGY_ROW = re.compile(r"\s*NPU(\d+)\s.*\s(\d[\d,-]*)\s*")  # NPU1  HCCS  X  ...  24-47
CHIP_ROW = re.compile(r"\s*(\d+)\s+(\d+)\s+(\d+)\s+\S.*")  # NPU ID, Chip ID, Chip Logic ID, name; of an MCU no logic ID
BUS = re.compile(r"PCIe ?Bus ?Info\s*:\s*([0-9A-Fa-f:.]+)")


@dataclass(frozen=True, kw_only=True)
class Binding:
    """The cores that the process has now, or why it was left alone."""

    npu: int = -1
    cores: tuple[int, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return f"not kept on the cores near its NPU: {self.why}; BIND_CPU=0 does not try"
        return f"kept on cores {as_list(self.cores)}, near NPU {self.npu}"


class _Unknown(Exception):
    """Why nothing can be bound."""


def bind(indices: Sequence[int], own: int) -> Binding | None:
    """Keep this process on its share of the cores near its NPU. `indices`: the devices of this host's ranks as torch
    counts them, `own` this rank's. None: BIND_CPU=0."""
    wanted = os.environ.get("BIND_CPU", "1")
    if wanted not in ("0", "1"):
        raise UserError(f"BIND_CPU={wanted}: expected 0 or 1")
    if wanted == "0":
        return None
    try:
        numbers = _visible(indices)
        npu = numbers[own]
        cores = share(npu, cores_near(sorted(numbers.values())), _allowed())
        _pin(cores)
    except _Unknown as error:
        return Binding(why=str(error))
    return Binding(npu=npu, cores=cores)


def share(npu: int, near: Mapping[int, Sequence[int]], allowed: Iterable[int]) -> tuple[int, ...]:
    """The part of the cores near this NPU that is its own: those that the process may use, dealt to the NPUs that have
    the same ones near."""
    cores = sorted(set(near[npu]) & set(allowed))
    peers = [other for other in sorted(near) if set(near[other]) == set(near[npu])]
    place, count = peers.index(npu), len(peers)
    if not cores:
        raise _Unknown(f"the cores {as_list(near[npu])} near NPU {npu} are not for this process")
    if len(cores) < count:
        raise _Unknown(f"only {as_list(cores)} of the cores near NPU {npu} are for {count} ranks")
    return tuple(cores[place * len(cores) // count : (place + 1) * len(cores) // count])


def cores_near(npus: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """NPU -> cores near it, for each of these."""
    rows = (TOPOLOGY_ROW.fullmatch(line) for line in _npu_smi("info", "-t", "topo").splitlines())
    told = {int(row[1]): read_list(row[2]) for row in rows if row}
    if set(npus) <= set(told):
        return {npu: told[npu] for npu in npus}
    return {npu: _cores_of_node(npu, _bus(npu)) for npu in npus}


def _bus(npu: int) -> str:
    """PCIe address of the NPU, as Linux writes it: 0000:c1:00.0"""
    chips = (CHIP_ROW.fullmatch(line) for line in _npu_smi("info", "-m").splitlines())
    card = next(((row[1], row[2]) for row in chips if row and int(row[3]) == npu), None)
    if card is None:
        raise _Unknown(f"npu-smi does not list NPU {npu}")
    told = BUS.search(_npu_smi("info", "-t", "board", "-i", card[0], "-c", card[1]))
    if told is None:
        raise _Unknown(f"npu-smi does not say where NPU {npu} is on the PCIe bus")
    return told[1].lower()


def _cores_of_node(npu: int, bus: str) -> tuple[int, ...]:
    try:
        node = int((SYSTEM / f"bus/pci/devices/{bus}/numa_node").read_text())
        if node < 0:
            raise _Unknown(f"this machine has no NUMA node for NPU {npu} ({bus})")
        return read_list((SYSTEM / f"devices/system/node/node{node}/cpulist").read_text())
    except (OSError, ValueError) as error:
        raise _Unknown(f"the NUMA node of NPU {npu} ({bus}) cannot be read: {error}") from None


def _visible(indices: Sequence[int]) -> dict[int, int]:
    """Index as torch counts -> number of the NPU. ASCEND_RT_VISIBLE_DEVICES lists the numbers."""
    text = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if text is None:
        return {index: index for index in indices}
    numbers = text.split(",")
    try:
        return {index: int(numbers[index]) for index in indices}
    except (ValueError, IndexError):
        raise _Unknown(f"ASCEND_RT_VISIBLE_DEVICES={text} does not number the NPUs of the ranks") from None


def _allowed() -> set[int]:
    if not hasattr(os, "sched_getaffinity"):
        raise _Unknown("this system binds no processes")
    return os.sched_getaffinity(0)


def _pin(cores: Sequence[int]) -> None:
    """All threads that the process has; later ones inherit it."""
    try:
        for thread in [int(entry.name) for entry in THREADS.iterdir()]:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.sched_setaffinity(thread, cores)
    except OSError as error:
        raise _Unknown(f"the system refuses cores {as_list(cores)}: {error.strerror or error}") from None


def _npu_smi(*words: str) -> str:
    command = " ".join(("npu-smi", *words))
    try:
        told = npu_smi(*words)
    except FileNotFoundError:
        raise _Unknown("npu-smi is not installed") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise _Unknown(f"{command} failed: {error}") from None
    return told.stdout if told.returncode == 0 else ""


def read_list(text: str) -> tuple[int, ...]:
    """Linux's lists of cores: "0-2,8" is 0, 1, 2, 8. ValueError for anything else."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


def as_list(cores: Sequence[int]) -> str:
    """The same backwards: 0, 1, 2, 8 is "0-2,8"."""
    parts: list[list[int]] = []
    for core in sorted(cores):
        if parts and core == parts[-1][-1] + 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ",".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
