"""A stand-in for a device that works later: what torch_npu's task queue and torch_atb do, on the host.

    queue = DeviceQueue(monkeypatch)
    executor = Executor(artifact, queue.atb, ...)     # forward queues; the call reads its Operation when it is made
    queue.drain()                                     # as a read of the device does

atb-operations.md 2.1: forward gives outputs that nobody has written yet, and the queued call captures the Operation,
not the tensors. Copies that do not wait (`copy_(non_blocking=True)`) are queued too, and marks are places in the queue.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmc.runtime import hostatb, stream
from llmc.runtime.engine import rows
from llmc.runtime.hostatb.numeric import TORCH_DTYPE, desc_of


class DeviceQueue:
    def __init__(self, monkeypatch) -> None:
        self.calls: list[Callable[[], Any]] = []
        self.done = 0
        queue = self

        class Event:
            place = 0

            def record(self) -> None:
                self.place = len(queue.calls)

            def synchronize(self) -> None:
                queue.run_to(self.place)

        class Builder(hostatb.GraphBuilder):
            def build(self):
                return QueuedOperation(super().build(), queue)

        mark = stream.Mark
        monkeypatch.setattr(torch, "npu", types.SimpleNamespace(Event=Event), raising=False)
        monkeypatch.setattr(stream, "Mark", lambda kind: mark("npu"))  # uploads of the tests go to the host
        copy_rows = rows.copy_rows
        monkeypatch.setattr(rows, "copy_rows", lambda *move: self.put(lambda: copy_rows(*move)))  # work of the device
        monkeypatch.setattr(stream, "pinned", lambda size: torch.empty(size, dtype=torch.uint8))
        names = set(dir(hostatb)) - {"use_chip", "current_chip"}
        self.atb: Any = types.SimpleNamespace(**{**{n: getattr(hostatb, n) for n in names}, "GraphBuilder": Builder})

    def put(self, call: Callable[[], Any]) -> None:
        self.calls.append(call)

    def run_to(self, place: int) -> None:
        while self.done < place:
            self.done += 1
            self.calls[self.done - 1]()

    def drain(self) -> None:
        self.run_to(len(self.calls))


class QueuedOperation:
    """torch_atb's OperationWrapper with the task queue on."""

    def __init__(self, operation, queue: DeviceQueue) -> None:
        self.operation, self.queue = operation, queue

    def forward(self, tensors):
        self.tensors = list(tensors)
        plan = self.operation.core.plan([desc_of(t) for t in tensors])
        self.outputs = [torch.full(out.shape, torch.nan, dtype=TORCH_DTYPE[out.dtype]) for out in plan.outs]
        self.queue.put(self.execute)
        return list(self.outputs)

    def execute(self) -> None:
        for output, made in zip(self.outputs, self.operation.forward(self.tensors), strict=True):
            output.copy_(made)


class QueuedCopies(TorchDispatchMode):
    """Copies that do not wait are queued."""

    def __init__(self, queue: DeviceQueue) -> None:
        super().__init__()
        self.queue, self.count = queue, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and (args[2:] == (True,) or (kwargs or {}).get("non_blocking")):
            self.count += 1
            self.queue.put(lambda: args[0].copy_(args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))
