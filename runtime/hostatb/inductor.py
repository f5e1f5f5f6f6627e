"""`llmc run --host-compile`: the arithmetic of a planned graph through torch.compile, with weights as constants.

    compiler = HostCompiler(constants={3: weight})       # graph input -> tensor that never changes
    run = compiler(steps, inputs=5, outputs=1, located=...)      # None: these shapes run as lines, as without it

Kernels of the operations in `TRACED` are functions of tensors: what they do is recorded, and inductor makes C++ of all
that lies between two products, which it packs itself. Everything else (caches, attention, collectives, rows of tables)
stays a call of its kernel or of its rewrite: one opaque operator for each row of such steps, whose order its inputs
keep. Intermediate roundings to 16 bit are left out where inductor sees two operations as one loop.

Compiling takes about as long as 2,000 tokens of a small model, so one tuple of shapes is compiled: the first.
"""

from __future__ import annotations

import gc
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor

from llmc.compiler.atb.core import AtbError, Desc
from llmc.compiler.diagnostics import UserError
from llmc.runtime.hostatb.numeric import TORCH_DTYPE
from llmc.runtime.hostatb.operation import Single
from llmc.runtime.hostatb.pages import remember
from llmc.runtime.hostatb.rewrites import rewrite
from llmc.runtime.hostatb.step import Step
from llmc.runtime.hostatb.straight import straight_line
from llmc.runtime.machine import cache_directory

Run = Callable[[Sequence[Tensor]], list[Tensor]]
Located = Callable[[Step, AtbError], AtbError]
# Kernels that look at no values and write to no input.
TRACED = frozenset({"Linear", "RmsNorm", "LayerNorm", "Activation", "Elewise", "Rope", "Split", "Concat", "Transpose"})


@dataclass(frozen=True, kw_only=True)
class Opaque:
    """Steps behind each other that stay calls. `given`: graph inputs they read; `made`: values of steps before them;
    `outputs`: slots that somebody reads later."""

    run: Run
    given: tuple[int, ...]
    made: tuple[int, ...]
    outputs: tuple[int, ...]
    descs: tuple[Desc, ...]


class HostCompiler:
    """Of one graph. `constants`: graph input -> tensor; `tell`: what was compiled, or why not."""

    def __init__(self, constants: Mapping[int, Tensor], tell: Callable[[str], None] = lambda line: None) -> None:
        self.constants, self.tell = constants, tell
        self.shapes: tuple[Any, ...] | None = None
        self.compiled: Callable[..., Sequence[Tensor]] | None = None
        self.refused = False
        self.opaque: Sequence[Opaque] = ()
        self.tensors: Sequence[Tensor] = ()  # graph inputs of the call at hand
        self.handle = next(NUMBERS)
        HANDLES[self.handle] = self

    def __call__(self, steps: Sequence[Step], *, inputs: int, outputs: int, located: Located) -> Run | None:
        if (
            self.refused
            or not any(is_traced(step) for step in steps)
            or any(self._writes_constant(step) for step in steps)
        ):
            return None
        items = list(grouped(steps, inputs, located))
        live = sorted({s for i in items if isinstance(i, Step) for s in i.inputs if s < inputs} - {*self.constants})
        shapes = tuple(item.ins if isinstance(item, Step) else item.descs for item in items)
        if self.shapes is None:
            self.shapes = shapes
        if shapes != self.shapes:
            return None
        opaque = [item for item in items if isinstance(item, Opaque)]
        ends = range(inputs, inputs + outputs)

        @cache
        def lines() -> Run:
            return straight_line(rewrite(steps), inputs=inputs, outputs=outputs, located=located)

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            if self.refused:
                return lines()(tensors)
            # What every opaque operator gets, or inductor would take one without inputs for a constant.
            mark = min((t for i, t in enumerate(tensors) if i not in self.constants), key=Tensor.numel)
            given = [mark, *(tensors[slot] for slot in live)]
            self.opaque, self.tensors = opaque, tensors
            try:
                if self.compiled is None:
                    self.compiled = self._compile(items, ["mark", *live], ends, given)
                return list(self.compiled(*given))
            except AtbError:
                raise
            except Exception as error:
                if self.compiled is not None:
                    raise
                self.refused = True  # by a compiler that this machine has: the step can do without it
                why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                self.tell(f"--host-compile: torch could not compile this graph, which runs without it ({why[:200]})")
                return lines()(tensors)
            finally:
                self.tensors = ()

        return run

    def _writes_constant(self, step: Step) -> bool:
        written = {*step.outputs, *(step.inputs[i] for i in step.fills)}
        return bool(written & {*self.constants})

    def _compile(
        self, items: Sequence[Step | Opaque], live: Sequence[Any], ends: Sequence[int], given: Sequence[Tensor]
    ) -> Callable[..., Sequence[Tensor]]:
        from torch.fx.experimental.proxy_tensor import make_fx

        frozen = sorted({s for i in items if isinstance(i, Step) for s in i.inputs if s in self.constants})

        def whole(*tensors: Tensor) -> list[Tensor]:
            values = dict(zip([*live, *frozen], tensors, strict=True))
            number = 0
            for item in items:
                if isinstance(item, Step):
                    seen = [
                        values[slot] if view is None else values[slot].view(view)
                        for slot, view in zip(item.inputs, item.views, strict=True)
                    ]
                    values.update(zip(item.outputs, item.run(seen), strict=True))
                else:
                    made = [values["mark"], *(values[slot] for slot in item.made)]
                    values.update(zip(item.outputs, torch.ops.llmc_hostatb.run(made, self.handle, number), strict=True))
                    number += 1
            return [values[slot] for slot in ends]

        started = time.perf_counter()
        weights = [self.constants[slot] for slot in frozen]
        traced = make_fx(whole, tracing_mode="fake")(*given, *weights)
        compiled = torch.compile(Frozen(traced, weights), fullgraph=True, dynamic=False)
        with torch._inductor.config.patch(freezing=True):  # dynamo looks at it too, so not among compile's options
            compiled(*given)
        for tensor in packed_tensors():
            remember(torch.ops.mkldnn.data_ptr(tensor), torch.ops.mkldnn._nbytes(tensor))
        self.tell(f"--host-compile: a graph of {len(items)} parts compiled in {time.perf_counter() - started:.1f} s")
        return compiled


class Frozen(torch.nn.Module):
    """A recorded function with its last inputs as parameters."""

    def __init__(self, traced: torch.nn.Module, constants: Sequence[Tensor]) -> None:
        super().__init__()
        self.traced = traced
        self.constants = torch.nn.ParameterList([torch.nn.Parameter(c, requires_grad=False) for c in constants])

    def forward(self, *given: Tensor) -> list[Tensor]:
        found: list[Tensor] = self.traced(*given, *self.constants)
        return found


def is_traced(step: Step) -> bool:
    """A kernel that is a function of tensors, and whose outputs are new ones."""
    core = step.core
    return isinstance(core, Single) and core.op.name in TRACED and not any(step.stores) and not step.fills


def grouped(steps: Sequence[Step], inputs: int, located: Located) -> Iterator[Step | Opaque]:
    """Traced steps as they are, all others between them as one."""
    at = 0
    while at < len(steps):
        if is_traced(steps[at]):
            yield steps[at]
            at += 1
            continue
        until = next((i for i in range(at, len(steps)) if is_traced(steps[i])), len(steps))
        yield opaque(steps[at:until], inputs, located)
        at = until


def opaque(steps: Sequence[Step], inputs: int, located: Located) -> Opaque:
    """These steps as a function of their own: slots are numbered anew, what it reads, what it leaves, what dies."""
    read, live = dict[int, None](), dict[int, Desc]()
    for step in steps:
        filled = {step.outputs[out] for out in step.fills.values()}
        read.update(dict.fromkeys(s for s in step.inputs if (s not in live and s not in filled) or s < inputs))
        live.update((s, d) for s, d in zip(step.outputs, step.outs, strict=True) if s >= inputs)
        for slot in step.frees:
            live.pop(slot, None)
    given = tuple(slot for slot in read if slot < inputs)
    made = tuple(slot for slot in read if slot >= inputs)
    order = [*given, *made, *live]
    order += dict.fromkeys(s for step in steps for s in (*step.inputs, *step.outputs) if s not in order)
    number = {slot: at for at, slot in enumerate(order)}

    def renamed(slots: Sequence[int]) -> tuple[int, ...]:
        return tuple(number[slot] for slot in slots)

    own = [
        replace(step, inputs=renamed(step.inputs), outputs=renamed(step.outputs),
                frees=renamed([s for s in step.frees if s not in read and s in number]))
        for step in steps
    ]  # fmt: skip
    run = straight_line(rewrite(own), inputs=len(read), outputs=len(live), located=located)
    return Opaque(run=run, given=given, made=made, outputs=tuple(live), descs=tuple(live.values()))


# ---- the operator behind which a graph calls kernels

NUMBERS = count(1)
HANDLES: weakref.WeakValueDictionary[int, HostCompiler] = weakref.WeakValueDictionary()
_LIBRARY = torch.library.Library("llmc_hostatb", "DEF")
_LIBRARY.define("run(Tensor[] made, int handle, int number) -> Tensor[]")


def _call(made: list[Tensor], handle: int, number: int) -> list[Tensor]:
    compiler = HANDLES[handle]
    part = compiler.opaque[number]
    results = part.run([*(compiler.tensors[slot] for slot in part.given), *made[1:]])
    return [result.contiguous() for result in results]


def _fake(made: list[Tensor], handle: int, number: int) -> list[Tensor]:
    descs = HANDLES[handle].opaque[number].descs
    return [made[0].new_empty(desc.shape, dtype=TORCH_DTYPE[desc.dtype]) for desc in descs]


_LIBRARY.impl("run", _call, "CPU")
_LIBRARY.impl("run", _fake, "Meta")


def packed_tensors() -> list[Tensor]:
    """Weights in oneDNN's layout: those that inductor made are known to nobody else."""
    tensors = [found for found in gc.get_objects() if type(found) is Tensor]  # isinstance would wake proxies
    return [found for found in tensors if found.is_mkldnn]


def check_compiler() -> None:
    """UserError where this machine cannot compile C++."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "--host-compile needs a C++ compiler, and none was found",
            hint="apt install g++ (or set CXX), or leave the flag out",
        ) from None
    if (folder := cache_directory()) is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
