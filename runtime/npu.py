"""Ascend NPUs: the only file that imports torch_npu and torch_atb.

Enters: a device profile's environment variables and a rank. Leaves: the torch_atb module (what the generated
`build(atb, ...)` takes) and a few calls on tensors. Variables are applied before the imports, because libatb
and torch_npu read many of them once, while loading; a variable that the user has set keeps the user's value.

    atb = npu.load({"TASK_QUEUE_ENABLE": "1", "ATB_OPERATION_EXECUTE_ASYNC": "1"})
    npu.set_device(rank=0)
    weight = npu.to_nz(npu.to_device(weight))

torch itself imports torch_npu (the entry point torch.backends) unless TORCH_DEVICE_BACKEND_AUTOLOAD is 0 in the
process; whoever starts ranks sets it, else the variables come late and `load` says so.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from llmc.compiler.diagnostics import UserError

if TYPE_CHECKING:
    import torch

LOG = logging.getLogger("llmc.npu")
FRACTAL_NZ = 29  # aclFormat ACL_FORMAT_FRACTAL_NZ
DEVICE_TO_DEVICE = 3  # aclrtMemcpyKind ACL_MEMCPY_DEVICE_TO_DEVICE
# Chip of the ATB table -> how names of its devices begin (atb-operations.md, chip words)
CHIP_NAMES = {"Ascend910B": ("Ascend910B", "Ascend910_93"), "Ascend310P": ("Ascend310P",)}

CANN_HINT = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
ATB_HINT = (
    "source .../atb/set_env.sh of an ATB built for this torch: "
    "cxx11abi 1 if torch.compiled_with_cxx11_abi() is True, else 0"
)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a profile changed: variables that were set, and those where the user's value was kept."""

    applied: Mapping[str, str]
    kept: Mapping[str, str]


def apply_environment(profile: Mapping[str, str]) -> Environment:
    """Put the profile's variables into os.environ; the user's win."""
    wanted = {name: str(value) for name, value in profile.items()}
    if os.environ.get("INF_NAN_MODE_ENABLE", wanted.get("INF_NAN_MODE_ENABLE")) == "0":
        # Saturating overflow needs this second switch on Atlas 800I A2.
        wanted.setdefault("INF_NAN_MODE_FORCE_DISABLE", "1")
    kept = {name: os.environ[name] for name in wanted if name in os.environ}
    applied = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(applied)
    return Environment(applied=applied, kept=kept)


def available() -> bool:
    """Whether both packages are installed. Cheap: nothing is imported, no device is asked."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch_npu", "torch_atb"))


def load(profile: Mapping[str, str]) -> ModuleType:
    """Apply the profile, import torch_npu and torch_atb, check that a device is visible; returns torch_atb."""
    environment = apply_environment(profile)
    for name, value in environment.kept.items():
        LOG.info("%s=%s is yours; the profile has %s", name, value, profile.get(name, value))
    if environment.applied:
        LOG.info("set %s", " ".join(f"{name}={value}" for name, value in environment.applied.items()))
        if early := [name for name in ("torch_npu", "torch_atb") if name in sys.modules]:
            LOG.warning(
                "%s was imported before %s were set; start with TORCH_DEVICE_BACKEND_AUTOLOAD=0",
                early[0],
                ", ".join(environment.applied),
            )
    _import("torch_npu", hint="pip install 'llmc[npu]'")
    atb = _import("torch_atb", hint=ATB_HINT)
    if _device_count() == 0:
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        found = "not set" if visible is None else repr(visible)
        raise UserError(
            f"no NPU is visible (ASCEND_RT_VISIBLE_DEVICES is {found})",
            hint="name devices of the Device column of `npu-smi info`, for example ASCEND_RT_VISIBLE_DEVICES=0,1",
        )
    return atb


def set_device(rank: int, *, nz: bool = False) -> None:
    """Bind this process to the device of its local rank. `nz`: some tensors will have that format, which torch_npu
    must be told on 910B: else a cast to nz leaves them nd, with a warning."""
    import torch

    if not 0 <= rank < (count := _device_count()):
        raise UserError(
            f"rank {rank} needs device {rank}, but {count} are visible "
            f"(ASCEND_RT_VISIBLE_DEVICES={os.environ.get('ASCEND_RT_VISIBLE_DEVICES', '')!r})",
            hint="make more devices visible, or use a smaller --tp",
        )
    torch.npu.set_device(rank)  # type: ignore[attr-defined]
    torch.npu.set_compile_mode(jit_compile=False)  # type: ignore[attr-defined]
    if nz:
        torch.npu.config.allow_internal_format = True  # type: ignore[attr-defined]


def set_workspace(atb: ModuleType, size: int) -> None:
    """Bytes that torch_atb's workspace has when the first step asks for it; before any graph is built. A workspace that
    is too small is replaced in the middle of a step, and the old one is memory that nobody uses."""
    atb.set_buffer_size(-(-size // 1024) * 1024)


def npu_smi(*words: str) -> subprocess.CompletedProcess[str]:
    """What npu-smi answers. OSError or SubprocessError where it cannot be asked."""
    return subprocess.run(["npu-smi", *words], capture_output=True, text=True, timeout=30)


def installed_chip() -> str:
    """Chip of the ATB table of this host's first NPU, by `npu-smi info -m`; "" where it does not say."""
    try:
        told = npu_smi("info", "-m").stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    names = re.findall(r"^\s*\d+\s+\d+\s+\d+\s+(\S.*)$", told, re.MULTILINE)  # ids of card, chip, logic; then its name
    first = names[0].replace(" ", "") if names else ""
    return next((chip for chip, starts in CHIP_NAMES.items() if first.startswith(starts)), "")


def check_chip(chip: str) -> None:
    """Refuse to run code that was compiled for another chip; libatb would fail in the middle of a graph."""
    import torch

    name = torch.npu.get_device_name()  # type: ignore[attr-defined]
    if not name.startswith(CHIP_NAMES[chip]):
        raise UserError(f"this NPU is {name}, and the code is for {chip}", hint="choose another --device")


def backend(*, one_host: bool) -> str:
    """The backend of collectives for this board: lccl where HCCS joins its NPUs, else hccl (mindie-stack.md 4.3)."""
    if not one_host or os.environ.get("ATB_LLM_HCCL_ENABLE") == "1":
        return "hccl"
    return "lccl" if has_hccs() else "hccl"


def check_backend(name: str, *, one_host: bool) -> str:
    """Refuse generated code whose collectives this board cannot run; returns the rank table file, "" for none."""
    again = "compile with --backend hccl"
    if name == "lccl":
        if not one_host:
            raise UserError("these ranks are on several hosts, and lccl works inside one", hint=again)
        if has_hccs() is False:
            raise UserError("lccl needs HCCS between the NPUs, and `npu-smi info -t topo` shows none", hint=again)
        return ""
    table = os.environ.get("RANK_TABLE_FILE", "")
    if table and not os.path.isfile(table):
        raise UserError(f"RANK_TABLE_FILE={table} is not a file", hint="the rank table of hccl, the same on all hosts")
    if not table and not one_host:
        raise UserError(
            "these ranks are on several hosts, and hccl needs a rank table to find them",
            hint="RANK_TABLE_FILE=/path/of/ranktable.json",
        )
    return table


def has_hccs() -> bool | None:
    """Whether HCCS (or XLink) joins the NPUs of this host, by the matrix of `npu-smi info -t topo`; None: unknown."""
    try:
        told = npu_smi("info", "-t", "topo")
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line for line in told.stdout.splitlines() if re.match(r"\s*NPU\d+\s", line)]  # not the legend below it
    links = [row for row in rows if not re.match(r"\s*NPU\d+\s+NPU", row)]  # not the matrix's head
    return any(re.search(r"\b(HCCS|XLINK)", row, re.IGNORECASE) for row in links) if links else None


def device() -> torch.device:
    """The device of this process."""
    import torch

    return torch.device("npu", torch.npu.current_device())  # type: ignore[attr-defined]


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy on this process's device; torch_atb would copy a non-contiguous one at every call."""
    return tensor.contiguous().to(device())


def to_nz(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in FRACTAL_NZ, the layout of weights and caches on Atlas 300I DUO."""
    return _module("torch_npu").npu_format_cast(tensor, FRACTAL_NZ)


def copy_memory(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Of each pair (source, target), both contiguous and of one size, the source's bytes over the target's, whatever
    their formats: `copy_` between parts of nz tensors turns both of them whole to nd, and the target back (torch_npu
    CopyKernel.cpp, copy_d2d_dtype_format). What was queued is done before; the copies are done when this returns."""
    synchronize()
    copy = ctypes.CDLL("libascendcl.so").aclrtMemcpy
    for source, target in pairs:
        size = ctypes.c_size_t(source.numel() * source.element_size())
        addresses = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (target, source))
        if status := copy(next(addresses), size, next(addresses), size, DEVICE_TO_DEVICE):
            raise RuntimeError(f"aclrtMemcpy of {size.value} bytes within the device failed with {status}")


def synchronize() -> None:
    """Wait until everything queued on the device is done."""
    import torch

    torch.npu.synchronize()  # type: ignore[attr-defined]


@contextmanager
def profiled(folder: Path, steps: int) -> Iterator[Callable[[], None]]:
    """torch_npu's profiler around what runs inside, of at most so many steps; what it yields is called behind each
    step. Its files are in `folder` afterwards (hiascend.com, Ascend PyTorch Profiler). libatb reports kernels at level
    0 and their tensors at level 1 (ops_runner.cpp, ReportMsprofInfo)."""
    p = _module("torch_npu").profiler
    settings = p._ExperimentalConfig(
        profiler_level=p.ProfilerLevel.Level1, aic_metrics=p.AiCMetrics.PipeUtilization, l2_cache=False
    )
    with p.profile(
        activities=[p.ProfilerActivity.CPU, p.ProfilerActivity.NPU],
        schedule=p.schedule(wait=0, warmup=0, active=steps, repeat=1, skip_first=0),
        on_trace_ready=p.tensorboard_trace_handler(str(folder)),
        experimental_config=settings,
    ) as profile:

        def ended() -> None:
            synchronize()
            profile.step()

        yield ended


def _module(name: str) -> ModuleType:
    return importlib.import_module(name)


def _device_count() -> int:
    import torch

    return int(torch.npu.device_count())  # type: ignore[attr-defined]


def _import(name: str, *, hint: str) -> ModuleType:
    try:
        return _module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if missing.partition(".")[0] == name:
            raise UserError(f"the package {name} is not installed", hint=hint) from error
        raise UserError(
            f"{name} cannot be imported: {missing} is not installed", hint=f"pip install {missing}"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        library = re.search(r"(lib[\w+-]+)\.so\S*: cannot open shared object", str(error))
        if library and library[1].startswith(("libatb", "libasdops")):
            raise UserError(f"{name} cannot be imported: {library[1]}.so of ATB is not found", hint=ATB_HINT) from error
        if library:
            raise UserError(
                f"{name} cannot be imported: {library[1]}.so of CANN is not found", hint=CANN_HINT
            ) from error
        hint = ATB_HINT if "undefined symbol" in str(error) else CANN_HINT
        raise UserError(f"{name} is installed but cannot be imported: {error}", hint=hint) from error
