"""Import and environment logic of runtime/npu.py, with stand-in packages: the real ones need an Ascend host."""

from __future__ import annotations

import logging
import os
import sys
import types

import pytest
import torch
from llmc.compiler.diagnostics import UserError
from llmc.runtime import npu

PROFILE = {"TASK_QUEUE_ENABLE": "1", "ATB_OPERATION_EXECUTE_ASYNC": "1"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """A copy of the environment without the profile's variables, and no stand-ins left behind."""
    names = (*PROFILE, "INF_NAN_MODE_ENABLE", "INF_NAN_MODE_FORCE_DISABLE", "ASCEND_RT_VISIBLE_DEVICES")
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in names})
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


def test_the_npu_is_the_default_where_its_packages_are_installed(monkeypatch):
    from llmc.runtime.run import default_device

    assert default_device(None) == "host"
    monkeypatch.setattr(npu, "available", lambda: True)
    assert default_device(None) == "atlas-800i-a2"
    assert default_device("npu:1") == "atlas-800i-a2"
    assert default_device("cpu") == "host"
