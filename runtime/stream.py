"""A device works through a queue of its own: marks in that queue, and inputs that go to it without waiting for it.

    upload = Upload(device)
    inputs = upload(step)          # name -> tensor of the host  ->  name -> the same on the device, by one copy
    mark = Mark("npu")
    mark.set()                     # behind everything queued so far
    mark.wait()                    # until all that has run

Which calls wait for which is one rule, in `executor.Executor.run`; `Upload` waits for nothing but its own copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, cycle

import torch

# torch_npu's allocator gives tensors places that are multiples of 512 bytes (NPUCachingAllocator.cpp, kMinBlockSize),
# and kernels read whole blocks of 32: packed inputs lie as tensors of their own would.
ALIGNMENT = 512
LEAST = 1 << 16  # bytes of a buffer; a decode step of 64 sequences of up to 4096 tokens takes 10 KiB


class Mark:
    """A place in a device's queue. On a host nothing is queued. `kind` of device: npu, cuda, cpu, as torch names it."""

    def __init__(self, kind: str) -> None:
        module = None if kind == "cpu" else getattr(torch, kind, None)
        self.event = module.Event() if module else None

    def set(self) -> None:
        if self.event is not None:
            self.event.record()

    def wait(self) -> None:
        """Until everything before the mark has run; at once where it was never set. torch_npu also empties its task
        queue first, so that calls queued there have been made (NPUEvent.cpp, synchronize)."""
        if self.event is not None:
            self.event.synchronize()


class Upload:
    """Copies the inputs of a step to a device at once, from pinned memory, so that the copy is queued like everything
    else: copies from ordinary memory would each wait for the whole queue. Two buffers take turns, and each is filled
    again only when its last copy is done. Results are good until the call after next."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.turns = cycle([_Buffer(self.device), _Buffer(self.device)])

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """name -> contiguous tensor of the host  ->  name -> its copy, contiguous, at a multiple of 512 bytes."""
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values()]
        ends = list(accumulate(sizes))
        if not ends:
            return {}
        buffer = next(self.turns)
        buffer.make_ready(ends[-1])
        places = [(end - size, tensor) for end, size, tensor in zip(ends, sizes, tensors.values(), strict=True)]
        for start, tensor in places:
            _at(buffer.host, start, tensor).copy_(tensor)
        buffer.there[: ends[-1]].copy_(buffer.host[: ends[-1]], non_blocking=True)
        buffer.copied.set()
        return {name: _at(buffer.there, *place) for name, place in zip(tensors, places, strict=True)}


class _Buffer:
    """Bytes on the host and on the device, and the mark behind the last copy from one to the other."""

    def __init__(self, device: torch.device) -> None:
        self.host = self.there = torch.empty(0, dtype=torch.uint8)
        self.device, self.copied = device, Mark(device.type)

    def make_ready(self, size: int) -> None:
        self.copied.wait()
        if size > len(self.host):
            most = max(LEAST, 1 << (size - 1).bit_length())
            self.host = pinned(most)
            self.there = torch.empty(most, dtype=torch.uint8, device=self.device)


def pinned(size: int) -> torch.Tensor:
    """Bytes that the device reads by itself; ordinary ones where no device could (torch's meta device)."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return torch.empty(size, dtype=torch.uint8)


def _at(buffer: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    return buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
