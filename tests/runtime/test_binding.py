"""CPU binding with stand-ins for npu-smi and Linux's files: which cores a rank gets, or the line that says why none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llmc.compiler.diagnostics import UserError
from llmc.runtime import binding
from llmc.runtime.binding import Binding, as_list, bind, read_list, share

TOPOLOGY = """\t   NPU0       NPU1       NPU2       NPU3       CPU Affinity
NPU0       X          HCCS       HCCS       HCCS       0-3
NPU1       HCCS       X          HCCS       HCCS       0-3
NPU2       HCCS       HCCS       X          HCCS       4-6,12
NPU3       HCCS       HCCS       HCCS       X          4-6,12

Legend:

  X    = Self
  HCCS = Connection traversing HCCS.
"""
# A card with two chips and its controller, as Atlas 300I DUO is listed.
CHIPS = """\tNPU ID                         Chip ID                        Chip Logic ID                  Chip Name
\t2                              0                              0                              Ascend 310P3
\t2                              1                              1                              Ascend 310P3
\t2                              2                              -                              Mcu
"""
BOARD = "\tNPU ID                         : 2\n\tPCIe Bus Info                  : 0000:0{chip}:00.0\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine({"info -t topo": TOPOLOGY}): an npu-smi that answers so, and the threads' cores as they are set."""
    tools, system, threads = tmp_path / "bin", tmp_path / "sys", tmp_path / "threads"
    tools.mkdir()
    for thread in ("11", "12"):
        (threads / thread).mkdir(parents=True)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("BIND_CPU", raising=False)
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(binding, "SYSTEM", system)
    monkeypatch.setattr(binding, "THREADS", threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)
    pinned: dict[int, tuple[int, ...]] = {}
    monkeypatch.setattr(
        os, "sched_setaffinity", lambda thread, cores: pinned.update({thread: tuple(cores)}), raising=False
    )

    def make(answers: dict[str, str], nodes: dict[str, tuple[int, str]] | None = None) -> dict[int, tuple[int, ...]]:
        """`nodes`: PCIe address -> NUMA node and its list of cores."""
        cases = [f"{words!r})\n/bin/cat <<'END'\n{text}\nEND\n;;" for words, text in answers.items()]
        script = tools / "npu-smi"
        script.write_text('#!/bin/sh\ncase "$*" in\n' + "\n".join(cases) + "\n*) exit 1;;\nesac\n")
        script.chmod(0o755)
        for bus, (node, cores) in (nodes or {}).items():
            for path, text in ((f"bus/pci/devices/{bus}/numa_node", str(node)),
                               (f"devices/system/node/node{node}/cpulist", cores)):  # fmt: skip
                (system / path).parent.mkdir(parents=True, exist_ok=True)
                (system / path).write_text(text + "\n")
        return pinned

    return make


DUO = {"info -m": CHIPS, **{f"info -t board -i 2 -c {chip}": BOARD.format(chip=chip) for chip in (0, 1)}}


@pytest.mark.parametrize(("own", "cores"), [(0, (0, 1)), (1, (2, 3)), (2, (4, 5)), (3, (6, 12))])
def test_ranks_whose_npus_have_the_same_cores_near_share_them(own, cores, machine):
    pinned = machine({"info -t topo": TOPOLOGY})
    assert bind(range(4), own) == Binding(npu=own, cores=cores)
    assert pinned == {11: cores, 12: cores}  # all threads of the process


def test_a_rank_whose_neighbours_are_not_in_the_run_has_all_the_cores(machine, monkeypatch):
    machine({"info -t topo": TOPOLOGY})
    assert bind([1], 1) == Binding(npu=1, cores=(0, 1, 2, 3))
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "3,0")
    assert bind([0, 1], 0) == Binding(npu=3, cores=(4, 5, 6, 12))
    assert str(bind([0, 1], 1)) == "kept on cores 0-3, near NPU 0"


def test_without_a_topology_the_numa_node_of_the_pcie_address_says_the_cores(machine):
    machine(DUO, {"0000:00:00.0": (1, "8-11"), "0000:01:00.0": (1, "8-11")})
    assert bind([0, 1], 0) == Binding(npu=0, cores=(8, 9))
    assert bind([0, 1], 1) == Binding(npu=1, cores=(10, 11))


def test_only_cores_that_the_process_may_use_are_dealt(machine, monkeypatch):
    """A container has some of the machine's."""
    machine({"info -t topo": TOPOLOGY})
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 2, 3, 40})
    assert bind([0, 1], 0) == Binding(npu=0, cores=(1,))
    assert bind([0, 1], 1) == Binding(npu=1, cores=(2, 3))


@pytest.mark.parametrize("near", [{0: (0, 1, 2), 1: (0, 1, 2)}, {n: tuple(range(7)) for n in range(3)}, {5: (3,)}])
def test_shares_are_disjoint_and_leave_no_core_out(near):
    shares = [share(npu, near, range(99)) for npu in near]
    dealt = [core for own in shares for core in own]
    assert sorted(dealt) == sorted(set().union(*near.values()))


def test_fewer_cores_than_ranks_bind_nobody_to_nothing(machine):
    machine({"info -t topo": TOPOLOGY.replace("0-3", "5")})
    for own in (0, 1):
        found = bind([0, 1], own)
        assert found is not None
        assert found.why == f"only 5 of the cores near NPU {own} are for 2 ranks"


def test_bind_cpu_0_switches_it_off(machine, monkeypatch):
    pinned = machine({"info -t topo": TOPOLOGY})
    monkeypatch.setenv("BIND_CPU", "0")
    assert bind([0], 0) is None
    assert not pinned
    monkeypatch.setenv("BIND_CPU", "yes")
    with pytest.raises(UserError, match="BIND_CPU=yes: expected 0 or 1"):
        bind([0], 0)


def test_what_cannot_be_known_is_one_line_and_nothing_is_bound(machine, monkeypatch, tmp_path):
    pinned = machine({})
    assert why() == "npu-smi does not list NPU 0"
    (tmp_path / "bin/npu-smi").unlink()
    assert why() == "npu-smi is not installed"
    machine({"info -m": CHIPS})
    assert why() == "npu-smi does not say where NPU 0 is on the PCIe bus"
    machine(DUO)
    assert why().startswith("the NUMA node of NPU 0 (0000:00:00.0) cannot be read")
    machine(DUO, {"0000:00:00.0": (-1, "")})
    assert why() == "this machine has no NUMA node for NPU 0 (0000:00:00.0)"
    machine(DUO, {"0000:00:00.0": (0, "30-31")})
    assert why() == "the cores 30-31 near NPU 0 are not for this process"
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "first")
    assert why() == "ASCEND_RT_VISIBLE_DEVICES=first does not number the NPUs of the ranks"
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES")
    assert not pinned


def why() -> str:
    found = bind([0], 0)
    assert found is not None
    assert not found.cores
    assert str(found) == f"not kept on the cores near its NPU: {found.why}; BIND_CPU=0 does not try"
    assert "\n" not in found.why
    return found.why


def test_a_system_that_refuses_is_one_line(machine, monkeypatch):
    machine({"info -t topo": TOPOLOGY})

    def refuse(thread: int, cores: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    assert why() == "the system refuses cores 0-3: Operation not permitted"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no processes")
def test_a_real_process_stays_on_its_cores_with_the_threads_that_it_had_and_will_have(tmp_path):
    core = min(os.sched_getaffinity(0))
    script = tmp_path / "npu-smi"
    script.write_text(f"#!/bin/sh\necho 'NPU0   X   {core}'\n")
    script.chmod(0o755)
    program = """
import os, threading
from llmc.runtime.binding import bind
stop, found = threading.Event(), []
early = threading.Thread(target=lambda: (stop.wait(), found.append(os.sched_getaffinity(0))))
early.start()
print(bind([0], 0))
stop.set()
late = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
late.start()
for thread in (early, late): thread.join()
print(found + [os.sched_getaffinity(0)])
"""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "BIND_CPU": "1"}
    environment.pop("ASCEND_RT_VISIBLE_DEVICES", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == [f"kept on cores {core}, near NPU 0", str([{core}] * 3)]


@pytest.mark.parametrize(("text", "cores"), [("0-2,8", (0, 1, 2, 8)), ("5", (5,)), ("0,1,2-3\n", (0, 1, 2, 3))])
def test_lists_of_cores_are_read_and_written_as_linux_does(text, cores):
    assert read_list(text) == cores
    assert read_list(as_list(cores)) == cores
