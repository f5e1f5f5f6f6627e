"""`Operation`: one ATB operation (or a built graph), run the way torch_atb runs it, with every check of the table.

    op = hostatb.Operation(hostatb.LinearParam(has_bias=False))
    y, = op.forward([x, weight])          # InferShape -> fresh outputs -> Setup -> Execute

`Core` is what an Operation holds: `Single` here, `Graph` in `graph.py`. A core makes, for each tuple of input descs it
meets, a `Plan`: the checks are done while the plan is made, so a call with known descs only runs kernels.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from llmc.compiler.atb.core import CHIPS, AtbError, AtbOp, Desc, Param
from llmc.runtime.host_memory import free_memory
from llmc.runtime.hostatb import (
    attention,
    cache,
    collective,
    elementwise,
    linear,
    moe,
    norm,
    rope,
    sampling,
    shape,
)
from llmc.runtime.hostatb.numeric import TORCH_DTYPE, Kernel, desc_of, format_of, set_format
from llmc.runtime.hostatb.params import ParamStruct

FAMILIES = (linear, norm, rope, elementwise, attention, cache, shape, sampling, moe, collective)
KERNELS: dict[str, Kernel] = {name: kernel for family in FAMILIES for name, kernel in family.KERNELS.items()}

MAX_PASSED = 10_000  # checks that passed and are remembered
ALWAYS_THERE = 2**30  # bytes of outputs for which nobody looks at the free memory
MAX_PLANS = 256  # shapes for which an operation keeps its plan; the oldest goes first

_chip = "host"


def use_chip(chip: str) -> None:
    """The chip whose rules and rounding operations created from now on follow: one of `CHIPS`."""
    global _chip
    _chip = known_chip(chip)


def current_chip() -> str:
    return _chip


def known_chip(chip: str) -> str:
    if chip not in CHIPS:
        raise AtbError("ERROR_INVALID_PARAM", f"unknown chip {chip!r}", expected=", ".join(CHIPS), stage="create")
    return chip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one tuple of input descs leads to: the output descs, and a function from input tensors to output tensors."""

    outs: tuple[Desc, ...]
    run: Callable[[Sequence[Tensor]], list[Tensor]]

    @cached_property
    def marked(self) -> tuple[int, ...]:
        """Outputs in another format than ND, whose tensors must say so."""
        return tuple(index for index, desc in enumerate(self.outs) if desc.format != "nd")


class Core(Protocol):
    """What an Operation or a graph node holds."""

    @property
    def name(self) -> str: ...
    @property
    def chip(self) -> str: ...
    @property
    def input_num(self) -> int: ...
    @property
    def output_num(self) -> int: ...
    @property
    def input_names(self) -> Sequence[str]: ...
    @property
    def host(self) -> frozenset[int]: ...  # inputs read on the host: CPU tensors
    @property
    def device(self) -> frozenset[int]: ...  # inputs read on the device
    @property
    def empty(self) -> frozenset[int]: ...  # inputs that may be empty
    @property
    def in_place(self) -> Mapping[int, int]: ...  # output -> input that must be one tensor: it is written in part only
    @property
    def writes(self) -> frozenset[int]: ...  # inputs written, as outputs or silently

    def infer(self, ins: Sequence[Desc]) -> list[Desc]: ...

    def plan(self, ins: Sequence[Desc]) -> Plan: ...


_PASSED: dict[tuple[str, tuple[Desc, ...]], tuple[Desc, ...]] = {}


class Single:
    """One operation of the table on one chip, created (stage create passed)."""

    def __init__(self, op: AtbOp, param: Param, chip: str) -> None:
        op.create(param, chip)
        self.op, self.param, self.chip, self.name = op, param, chip, op.cpp_name
        self._key = f"{chip} {op.name} {param}"
        self.input_num, self.output_num = op.arity(param)
        self.input_names = [f"input {i}" for i in range(self.input_num)]
        self.host = op.host(param, chip)
        self.device = frozenset(range(self.input_num)) - self.host
        self.empty = op.empty(param)
        self.in_place = MappingProxyType(dict(op.in_place(param)))
        self.writes = op.writes(param)

    @property
    def kernel(self) -> Kernel:
        if self.op.name not in KERNELS:
            raise AtbError("ERROR_OPERATION_NULL_RUNNER", f"hostatb cannot execute {self.op.name} yet", stage="execute")
        return KERNELS[self.op.name]

    def infer(self, ins: Sequence[Desc]) -> list[Desc]:
        return self.op.infer(self.param, ins, self.chip)

    def check(self, ins: Sequence[Desc]) -> tuple[Desc, ...]:
        """Stages infer and setup; the output descs. Layers repeat each other, so what passed once is remembered."""
        key = (self._key, tuple(ins))
        if key not in _PASSED:
            outs = self.op.infer(self.param, ins, self.chip)
            self.op.setup(self.param, ins, outs, self.chip)
            if len(_PASSED) >= MAX_PASSED:
                _PASSED.clear()
            _PASSED[key] = tuple(outs)
        return _PASSED[key]

    def plan(self, ins: Sequence[Desc]) -> Plan:
        outs = self.check(ins)
        kernel, param, chip, descs = self.kernel, self.param, self.chip, tuple(ins)
        buffers = {index: outs[out] for out, index in self.in_place.items()}

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            if buffers:  # outputs are fresh here: slots that the kernel does not write stay undefined, shown as NaN
                tensors = [
                    undefined(buffers[i], like=tensor) if i in buffers else tensor for i, tensor in enumerate(tensors)
                ]
            return kernel(param, tensors, descs, chip)

        return Plan(outs=outs, run=run)


def undefined(desc: Desc, *, like: Tensor) -> Tensor:
    """A new tensor with no defined content; NaN where the dtype has it, so that a read of it shows."""
    dtype = TORCH_DTYPE[desc.dtype]
    fill = float("nan") if dtype.is_floating_point else 0
    return torch.full(desc.shape, fill, dtype=dtype, device=like.device)


class Operation:
    """torch_atb.Operation. `chip` is hostatb's own keyword; the default is what `use_chip` said last."""

    def __init__(self, param: Any, *, chip: str | None = None) -> None:
        if not isinstance(param, ParamStruct):
            raise TypeError(
                f"Operation needs a parameter object such as LinearParam(...), found {type(param).__name__}"
            )
        op, values = param.cpp()
        self._core: Core | None = Single(op, values, known_chip(chip or current_chip()))
        self._plans: dict[tuple[Any, ...], Plan] = {}

    @classmethod
    def of(cls, core: Core) -> Operation:
        """An Operation around a core that exists already: a graph, or an operation given in C++ names."""
        made = cls.__new__(cls)
        made._core, made._plans = core, {}
        return made

    @property
    def core(self) -> Core:
        if self._core is None:
            raise AtbError(
                "ERROR_INVALID_OPERATION_ADDR", "this operation was given to a graph and cannot be used again",
                expected="a new Operation for each node and each call", stage="create",
            )  # fmt: skip
        return self._core

    def take(self) -> Core:
        """The core, moved out: as in torch_atb the wrapper is empty afterwards."""
        core, self._core = self.core, None
        self._plans.clear()
        return core

    def forget_plans(self) -> None:
        """The next call plans anew: kernels are chosen for the number of threads that there are then."""
        self._plans.clear()

    @property
    def name(self) -> str:
        return self.core.name

    @property
    def input_num(self) -> int:
        return self.core.input_num

    @property
    def output_num(self) -> int:
        return self.core.output_num

    @property
    def chip(self) -> str:
        return self.core.chip

    def __repr__(self) -> str:
        return f"op name: {self.name}, input_num: {self.input_num}, output_num: {self.output_num}"

    @torch.no_grad()
    def forward(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """InferShape, fresh outputs, Setup, Execute. Checks run when a tuple of descs is met for the first time."""
        core = self.core
        try:
            key = tuple([(t.shape, t.dtype, format_of(t), t.is_cuda, t.is_contiguous()) for t in tensors])
        except AttributeError:
            check_tensors(core, tensors)
            raise
        plan = self._plans.get(key)
        new = plan is None
        if plan is None:
            check_tensors(core, tensors)
            plan = core.plan([desc_of(t) for t in tensors])
            check_memory(core, plan)
        if not all(k[4] for k in key):
            tensors = [t.contiguous() for t in tensors]
        started = perf_counter()
        try:
            outputs = plan.run(tensors)
        except AtbError as error:
            raise error.at(stage="execute", operation=core.name) from None
        except threading.BrokenBarrierError:  # how a rank of `run_ranks` learns that another one failed
            raise
        except Exception as error:  # a caller of torch_atb sees RuntimeError only
            raise kernel_failure(core, error) from error
        Prof.get_prof_stats().record(core.name, perf_counter() - started)
        for index in plan.marked:
            set_format(outputs[index], plan.outs[index].format)
        if new:
            check_outputs(core, plan, tensors, outputs)
            if len(self._plans) >= MAX_PLANS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = plan
        return outputs


def check_memory(core: Core, plan: Plan) -> None:
    """The library refuses tensors above 256 GiB; a machine may have less, and Linux would end the process."""
    size = sum(desc.elements * TORCH_DTYPE[desc.dtype].itemsize for desc in plan.outs)
    if size > ALWAYS_THERE and (free := free_memory()) is not None and size > free:
        raise AtbError("ERROR_OUT_OF_DEVICE_MEMORY", "the outputs do not fit into memory", found=f"{size} bytes",
                       expected=f"at most the {free} that are free", stage="execute",
                       ).at(operation=core.name)  # fmt: skip


def kernel_failure(core: Core, error: Exception) -> AtbError:
    """What PyTorch refused although every check passed."""
    full = isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)
    code = "ERROR_OUT_OF_DEVICE_MEMORY" if full else "ERROR_INTERNAL_ERROR"
    message = "memory is full" if full else "a kernel failed; please report"
    found = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return AtbError(code, message, found=found, stage="execute").at(operation=core.name)


def check_outputs(core: Core, plan: Plan, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """A kernel that does not give what the table inferred, or gives an input back, is a mistake of this package."""
    found = [desc_of(t) for t in outputs]
    memory = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
    if shared := [index for index, t in enumerate(outputs) if t.untyped_storage().data_ptr() in memory]:
        raise AtbError(
            "ERROR_INTERNAL_ERROR", "an output shares memory with an input; please report",
            tensor=f"output {shared[0]}", stage="execute",
        ).at(operation=core.name)  # fmt: skip
    if found != list(plan.outs):
        raise AtbError(
            "ERROR_INTERNAL_ERROR", "a kernel's outputs are not as inferred; please report",
            found="; ".join(map(str, found)), expected="; ".join(map(str, plan.outs)), stage="execute",
        ).at(operation=core.name)  # fmt: skip


def check_tensors(core: Core, tensors: Sequence[Any]) -> None:
    """What torch_atb's conversion of tensors demands: count, host or device, no lost in-place write (reference 2.1)."""
    if len(tensors) != core.input_num:
        raise AtbError("ERROR_INVALID_IN_TENSOR_NUM", "number of inputs", found=str(len(tensors)),
                       expected=f"{core.input_num}: {', '.join(core.input_names)}", stage="infer",
                       ).at(operation=core.name)  # fmt: skip
    on_cuda = any(t.is_cuda for i, t in enumerate(tensors) if i in core.device and isinstance(t, Tensor))
    for index, tensor in enumerate(tensors):
        name = core.input_names[index]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{core.name}: {name} must be a torch.Tensor, found {type(tensor).__name__}")
        if index in core.host and tensor.is_cuda:
            raise AtbError("ERROR_INVALID_TENSOR_ADDR", "tensor.hostData is null: this input is read on the host",
                           found=str(tensor.device), expected="a CPU tensor", stage="setup", tensor=name,
                           ).at(operation=core.name)  # fmt: skip
        if index in core.device and on_cuda and not tensor.is_cuda and tensor.numel():
            raise AtbError("ERROR_INVALID_TENSOR_ADDR", "tensor.deviceData is null: this input is read on the device",
                           found="a CPU tensor", expected="a CUDA tensor like the others", stage="setup", tensor=name,
                           ).at(operation=core.name)  # fmt: skip
        if index in core.writes and not tensor.is_contiguous():
            raise AtbError(
                "ERROR_INVALID_TENSOR_ADDR",
                "this input is written in place but is not contiguous: torch_atb would write to a copy and lose it",
                found=f"strides {list(tensor.stride())} of shape {list(tensor.shape)}",
                expected="a contiguous tensor", stage="setup", tensor=name,
            ).at(operation=core.name)  # fmt: skip


def set_buffer_size(bytes: int) -> None:
    """torch_atb's workspace size. PyTorch allocates here, so only the type is checked."""
    if isinstance(bytes, bool) or not isinstance(bytes, int) or not 0 <= bytes < 2**64:
        raise TypeError(f"set_buffer_size: bytes must be a non-negative int, found {bytes!r}")


class Prof:
    """torch_atb.Prof: host microseconds of `forward` by operation name, the latest thousand of each, by thread."""

    _of_thread = threading.local()

    def __init__(self) -> None:
        self._times: dict[str, deque[int]] = defaultdict(lambda: deque(maxlen=1000))

    @classmethod
    def get_prof_stats(cls) -> Prof:
        stats = getattr(cls._of_thread, "stats", None)
        if stats is None:
            stats = cls._of_thread.stats = cls()
        return stats

    def record(self, name: str, seconds: float) -> None:
        self._times[name].append(int(seconds * 1e6))

    def get_run_time_stats(self, op_name: str) -> list[int]:
        return list(self._times.get(op_name, ()))
