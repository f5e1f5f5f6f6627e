"""Import and environment logic of runtime/npu.py, with stand-in packages: the real ones need an Ascend host."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import types

import pytest
import torch

from llmc.compiler.diagnostics import UserError
from llmc.runtime import npu
from llmc.runtime.engine.sampling import SamplingParams

PROFILE = {"TASK_QUEUE_ENABLE": "1", "ATB_OPERATION_EXECUTE_ASYNC": "1"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """A copy of the environment without the profile's variables, and no stand-ins left behind."""
    names = (*PROFILE, "INF_NAN_MODE_ENABLE", "INF_NAN_MODE_FORCE_DISABLE", "ASCEND_RT_VISIBLE_DEVICES")
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in names})
    monkeypatch.setenv("BIND_CPU", "0")  # this process keeps its cores
    yield
    for name in ("torch_npu", "torch_atb"):
        sys.modules.pop(name, None)


class Npu(types.SimpleNamespace):
    """torch.npu: counts devices and remembers calls."""

    def __init__(self, devices: int) -> None:
        super().__init__(calls=[], devices=devices)

    def device_count(self):
        return self.devices

    def current_device(self):
        return 1

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Write packages torch_npu and torch_atb with the given source; each copies the environment when it is imported."""

    def make(npu_source: str = "", atb_source: str = "", devices: int = 2) -> Npu:
        copy = "import os; seen = dict(os.environ)\n"
        (tmp_path / "torch_npu.py").write_text(copy + npu_source)
        (tmp_path / "torch_atb.py").write_text(copy + atb_source)
        monkeypatch.syspath_prepend(str(tmp_path))
        device = Npu(devices)
        monkeypatch.setattr(torch, "npu", device, raising=False)
        return device

    return make


def test_environment_is_set_before_the_packages_are_imported(stand_in):
    stand_in()
    atb = npu.load(PROFILE)
    assert atb is sys.modules["torch_atb"]
    for name in ("torch_npu", "torch_atb"):
        assert PROFILE.items() <= sys.modules[name].seen.items()


def test_variables_of_the_user_win_and_are_reported(stand_in, caplog):
    stand_in()
    os.environ["TASK_QUEUE_ENABLE"] = "0"
    with caplog.at_level(logging.INFO, logger="llmc.npu"):
        npu.load(PROFILE)
    assert sys.modules["torch_atb"].seen["TASK_QUEUE_ENABLE"] == "0"
    assert caplog.messages == ["TASK_QUEUE_ENABLE=0 is yours; the profile has 1", "set ATB_OPERATION_EXECUTE_ASYNC=1"]


def test_report_tells_applied_from_kept():
    os.environ["TASK_QUEUE_ENABLE"] = "0"
    report = npu.apply_environment(PROFILE)
    assert (report.applied, report.kept) == ({"ATB_OPERATION_EXECUTE_ASYNC": "1"}, {"TASK_QUEUE_ENABLE": "0"})


@pytest.mark.parametrize(("mine", "forced"), [(None, "1"), ("0", "1"), ("1", None)])
def test_saturating_overflow_also_sets_its_second_switch(mine, forced):
    if mine is not None:
        os.environ["INF_NAN_MODE_ENABLE"] = mine
    npu.apply_environment({"INF_NAN_MODE_ENABLE": "0"})
    assert os.environ.get("INF_NAN_MODE_FORCE_DISABLE") == forced


def test_packages_that_were_imported_too_early_are_reported(stand_in, caplog):
    stand_in()
    sys.modules["torch_npu"] = types.ModuleType("torch_npu")
    npu.load(PROFILE)
    assert "torch_npu was imported before TASK_QUEUE_ENABLE, ATB_OPERATION_EXECUTE_ASYNC were set" in caplog.text


def test_missing_torch_npu_names_the_extra():
    with pytest.raises(UserError, match=r"torch_npu is not installed\n.*pip install 'llmc\[npu\]'"):
        npu.load({})


@pytest.mark.parametrize(
    ("npu_source", "atb_source", "message"),
    [
        (
            "raise ImportError('libascendcl.so: cannot open shared object file: No such file or directory')",
            "",
            r"torch_npu cannot be imported: libascendcl\.so of CANN is not found\n.*ascend-toolkit/set_env\.sh",
        ),
        (
            "raise ImportError('libhccl.so.1: cannot open shared object file')",
            "",
            r"libhccl\.so of CANN is not found",
        ),
        ("import decorator_of_cann", "", "decorator_of_cann is not installed"),
        (
            "raise RuntimeError('drvDevice failed')",
            "",
            "torch_npu is installed but cannot be imported: drvDevice failed",
        ),
        ("", "raise ModuleNotFoundError(name='torch_atb')", r"torch_atb is not installed\n.*atb/set_env\.sh"),
        (
            "",
            "raise ImportError('libatb.so: cannot open shared object file: No such file or directory')",
            r"libatb\.so of ATB is not found\n.*atb/set_env\.sh",
        ),
        (
            "",
            "raise ImportError('_C.so: undefined symbol: _ZN3atb9Operation4NameB5cxx11Ev')",
            r"undefined symbol[^\n]*\n.*cxx11abi",
        ),
    ],
)
def test_what_is_missing_is_named_with_the_way_out(stand_in, npu_source, atb_source, message):
    stand_in(npu_source, atb_source)
    with pytest.raises(UserError, match=message):
        npu.load(PROFILE)


@pytest.mark.parametrize(("visible", "found"), [(None, "not set"), ("7", "'7'")])
def test_no_visible_device_shows_the_variable(stand_in, visible, found):
    stand_in(devices=0)
    if visible is not None:
        os.environ["ASCEND_RT_VISIBLE_DEVICES"] = visible
    with pytest.raises(UserError, match=f"no NPU is visible \\(ASCEND_RT_VISIBLE_DEVICES is {found}\\)"):
        npu.load({})


def test_available_looks_for_both_packages_and_imports_none(stand_in):
    assert not npu.available()
    stand_in("raise AssertionError('imported')", "raise AssertionError('imported')")
    assert npu.available()
    assert "torch_npu" not in sys.modules


def test_rank_is_bound_to_a_visible_device(stand_in):
    device = stand_in(devices=2)
    npu.set_device(1)
    assert device.calls == [("set_device", (1,), {}), ("set_compile_mode", (), {"jit_compile": False})]
    with pytest.raises(UserError, match="rank 2 needs device 2, but 2 are visible"):
        npu.set_device(2)


@pytest.mark.parametrize("nz", [False, True])
def test_torch_npu_is_told_where_tensors_will_be_nz(nz, stand_in):
    """It casts nothing to nz on 910B otherwise."""
    device = stand_in()
    device.config = types.SimpleNamespace(allow_internal_format=False)
    npu.set_device(0, nz=nz)
    assert device.config.allow_internal_format == nz


def test_nz_is_format_29_of_the_vendor_cast(stand_in):
    stand_in("def npu_format_cast(tensor, number): return tensor, number")
    tensor = torch.ones(2)
    assert npu.to_nz(tensor) == (tensor, 29)


def test_synchronize_waits_for_the_device(stand_in):
    device = stand_in()
    npu.synchronize()
    assert device.calls == [("synchronize", (), {})]


@pytest.mark.parametrize(("name", "chip"), [("Ascend910B4", "Ascend910B"), ("Ascend910_9382", "Ascend910B")])
def test_code_runs_on_the_chip_that_it_was_compiled_for(name, chip, stand_in):
    stand_in().get_device_name = lambda: name
    npu.check_chip(chip)


def test_code_for_another_chip_is_refused_by_name(stand_in):
    stand_in().get_device_name = lambda: "Ascend310P3"
    with pytest.raises(UserError, match="Ascend310P3, and the code is for Ascend910B"):
        npu.check_chip("Ascend910B")


def test_the_npu_is_the_default_where_its_packages_are_installed(monkeypatch, tmp_path):
    from llmc.runtime.session import default_device

    monkeypatch.setenv("PATH", str(tmp_path))
    assert default_device(None) == "host"
    monkeypatch.setattr(npu, "available", lambda: True)
    assert default_device(None) == "atlas-800i-a2"
    assert default_device("npu:1") == "atlas-800i-a2"
    machine = tmp_path / "npu-smi"
    for name, device in (("310P3", "atlas-300i-duo"), ("910B4", "atlas-800i-a2"), ("950", "atlas-800i-a2")):
        machine.write_text(f"#!/bin/sh\n[ \"$*\" = 'info -m' ] && /bin/cat <<'END'\n{CHIPS.format(name=name)}\nEND\n")
        machine.chmod(0o755)
        assert default_device(None) == device
    assert default_device("cpu") == "host"


CHIPS = """\tNPU ID                         Chip ID                        Chip Logic ID                  Chip Name
\t2                              0                              0                              Ascend {name}
\t2                              1                              -                              Mcu
"""
TOPOLOGY = """\t   NPU0       NPU1       CPU Affinity
NPU0       X          {link}       0-23
NPU1       {link}       X          0-23

Legend:

  X    = Self
  PIX  = Path traversing a single PCIe switch
  HCCS = Connection traversing HCCS.
"""


@pytest.fixture
def topology(tmp_path, monkeypatch):
    """topology("HCCS"): an npu-smi that prints the matrix with this link."""

    def make(link: str) -> None:
        script = tmp_path / "npu-smi"
        script.write_text(
            f'#!/bin/sh\n[ "$*" = "info -t topo" ] && /bin/cat <<\'END\'\n{TOPOLOGY.format(link=link)}\nEND\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    for name in ("ATB_LLM_HCCL_ENABLE", "RANK_TABLE_FILE"):
        monkeypatch.delenv(name, raising=False)
    return make


@pytest.mark.parametrize(("link", "backend"), [("HCCS", "lccl"), ("HCCS_SW", "lccl"), ("PIX", "hccl"), ("SYS", "hccl")])
def test_lccl_is_for_boards_whose_npus_are_joined_by_hccs(topology, link, backend):
    topology(link)
    assert npu.backend(one_host=True) == backend
    assert npu.backend(one_host=False) == "hccl"


def test_the_backend_is_hccl_where_the_topology_is_unknown_or_the_user_says_so(topology, monkeypatch):
    assert npu.backend(one_host=True) == "hccl"
    topology("HCCS")
    monkeypatch.setenv("ATB_LLM_HCCL_ENABLE", "1")
    assert npu.backend(one_host=True) == "hccl"


def test_code_for_lccl_is_refused_where_lccl_cannot_work(topology):
    npu.check_backend("lccl", one_host=True)  # no npu-smi: nothing is known against it
    topology("HCCS")
    assert npu.check_backend("lccl", one_host=True) == ""
    with pytest.raises(UserError, match=r"lccl works inside one\n.*--backend hccl"):
        npu.check_backend("lccl", one_host=False)
    topology("PIX")
    with pytest.raises(UserError, match=r"lccl needs HCCS between the NPUs.*\n.*--backend hccl"):
        npu.check_backend("lccl", one_host=True)


def test_hccl_over_several_hosts_needs_a_rank_table(topology, monkeypatch, tmp_path):
    assert npu.check_backend("hccl", one_host=True) == ""
    with pytest.raises(UserError, match=r"several hosts.*\n.*RANK_TABLE_FILE="):
        npu.check_backend("hccl", one_host=False)
    table = tmp_path / "table.json"
    monkeypatch.setenv("RANK_TABLE_FILE", str(table))
    with pytest.raises(UserError, match="is not a file"):
        npu.check_backend("hccl", one_host=True)
    table.write_text("{}")
    assert npu.check_backend("hccl", one_host=False) == str(table)


@pytest.fixture
def rank_1(stand_in, topology):
    """Rank 1 of 2 on a board with HCCS, and its torch.npu."""
    from llmc.runtime.ranks import Place, Team

    device = stand_in()
    device.get_device_name = lambda: "Ascend910B4"
    topology("HCCS")
    place = Place(
        rank=1, world_size=2, local_rank=1, local_world_size=2, master_addr="127.0.0.1", master_port=20010
    )  # fmt: skip
    return Team(place), device


MANIFEST = {"device": "atlas-800i-a2", "chip": "Ascend910B", "attention": "paged", "backend": "lccl"}


def test_a_rank_takes_the_device_of_its_local_rank_and_the_communicator_of_its_run(rank_1, monkeypatch):
    from llmc.runtime.session import open_device

    team, device = rank_1
    real = torch.device
    monkeypatch.setattr(torch, "device", lambda kind, index: real("meta", index))  # this torch knows no npu
    atb, _, built_with = open_device(MANIFEST, "npu", team)
    assert atb is sys.modules["torch_atb"]
    assert ("set_device", (1,), {}) in device.calls
    assert built_with == {"rank": 1, "comm_domain": "20010", "rank_table_file": ""}


@pytest.mark.parametrize("formats", [["nd", "nz"], ["nz", "nd"]], ids="first is {}".format)
def test_the_formats_of_the_device_decide_whether_nz_is_allowed(formats, rank_1, monkeypatch):
    """As its file lists them: the first is taken."""
    from llmc.runtime import session

    team, device = rank_1
    device.config = types.SimpleNamespace(allow_internal_format=False)
    target = session.device_profile("atlas-800i-a2")
    found = dataclasses.replace(target, formats={**target.formats, "weight": formats[0]})
    monkeypatch.setattr(session, "device_profile", lambda name: found)
    real = torch.device
    monkeypatch.setattr(torch, "device", lambda kind, index: real("meta", index))
    session.open_device(MANIFEST, "npu", team)
    assert device.config.allow_internal_format == (formats[0] == "nz")


@pytest.mark.parametrize(("device", "scratch"), [("atlas-800i-a2", 188 << 20), ("atlas-300i-duo", 0)])
def test_the_workspace_has_the_size_of_the_largest_step_before_a_graph_is_built(device, scratch, monkeypatch):
    """What the memory plan says, 13 % for holes, and the kernels' scratch: torch_atb would begin with 100 MiB and grow
    in the middle of steps. It reads the size when the first step asks for a workspace."""
    from llmc.compiler.artifact import make_manifest
    from llmc.compiler.memory import needed
    from llmc.compiler.options import Options
    from llmc.compiler.pipeline import compile_model
    from llmc.runtime import session

    manifest, calls = make_manifest(compile_model("llama2-7b", Options(device=device))), []
    atb = types.SimpleNamespace(set_buffer_size=lambda size: calls.append(("set_buffer_size", size)))
    monkeypatch.setattr(session, "open_device", lambda *args: (atb, types.SimpleNamespace(type="npu"), {}))
    for name in ("make_caches", "make_constants", "load_weights", "Executor"):
        monkeypatch.setattr(session, name, lambda *args, name=name, **kwargs: calls.append((name,)))
    monkeypatch.setattr(session, "Engine", lambda *args, **kwargs: None)
    monkeypatch.setattr(session, "eos_ids", lambda path: [])
    words = dict.fromkeys(("max_position_embeddings", "torch_device", "batch_size", "num_blocks", "memory", "graph"))
    args = types.SimpleNamespace(
        **words, max_prefill_tokens=0, model_path=".", quiet=True, json=False, host_compile=False
    )
    artifact = types.SimpleNamespace(manifest=manifest)
    session.make_engine(args, artifact, None, [[1] * 900] * 3, SamplingParams(max_tokens=9))
    step = needed(manifest["memory"], tokens=2700, batch=3, context=909, positions=4096)["workspace"]
    assert calls[0] == ("set_buffer_size", -(-(int(step * 1.13) + scratch) // 1024) * 1024)
    assert calls[-1] == ("Executor",)
    assert step > 100 << 20


def test_ranks_do_not_share_an_npu(rank_1):
    from llmc.runtime.session import open_device

    with pytest.raises(UserError, match=r"each of 2 ranks needs an NPU of its own"):
        open_device(MANIFEST, "npu:0", rank_1[0])


@pytest.mark.parametrize("why", ["", "npu-smi is not installed"])
def test_a_rank_is_bound_to_cores_near_its_npu_and_says_why_not(rank_1, why, monkeypatch, capsys):
    from llmc.runtime.session import binding, open_device

    team, device = rank_1
    asked = []

    def bind(indices, own):
        asked.append((list(indices), own, device.calls[0][0]))
        return binding.Binding(npu=1, cores=() if why else (4, 5), why=why)

    real = torch.device
    monkeypatch.setattr(torch, "device", lambda kind, index: real("meta", index))
    monkeypatch.setattr(binding, "bind", bind)
    open_device(MANIFEST, "npu", team)
    open_device(MANIFEST, "npu:1", None)
    assert asked == [([0, 1], 1, "set_device"), ([1], 1, "set_device")]
    said = f"note: not kept on the cores near its NPU: {why}; BIND_CPU=0 does not try\n" * 2
    assert capsys.readouterr().err == (said if why else "")
