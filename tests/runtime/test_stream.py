"""Inputs on their way to a device: one copy a step, none waited for, none overtaken."""

from __future__ import annotations

import pytest
import torch
from device_queue import DeviceQueue, QueuedCopies

from llmc.runtime.stream import Upload


def step(number: int, batch: int = 3) -> dict[str, torch.Tensor]:
    """Inputs of mixed types and odd sizes, all of them the step's number."""
    shapes = {"token_ids": (batch, torch.int64), "slots": (batch, torch.int32), "last_rows": (1, torch.int64)}
    made = {name: torch.full((size,), number, dtype=dtype) for name, (size, dtype) in shapes.items()}
    return {**made, "block_tables": torch.full((batch, 5), number, dtype=torch.int32)}


def test_the_inputs_of_a_step_go_in_one_copy_and_keep_type_shape_and_alignment(monkeypatch):
    queue = DeviceQueue(monkeypatch)
    with QueuedCopies(queue) as copies:
        found = Upload("cpu")(given := step(7))
    assert copies.count == 1
    queue.drain()
    assert list(found) == list(given)
    start = found["token_ids"].data_ptr()
    for name, tensor in found.items():
        assert torch.equal(tensor, given[name])
        assert tensor.dtype == given[name].dtype
        assert tensor.is_contiguous(), "torch_atb would copy it"
        assert (tensor.data_ptr() - start) % 512 == 0


@pytest.mark.parametrize("batches", [(3, 3, 3, 3, 3, 3), (1, 40, 3, 9000, 2, 9000, 1)], ids=["same", "growing"])
@pytest.mark.parametrize("kept", [True, False], ids=["waits", "does_not_wait"])
def test_a_buffer_is_filled_again_only_when_its_copy_is_done(batches, kept, monkeypatch):
    """Nobody reads the device between steps; each step looks at its inputs when the queue comes to it."""
    queue, upload, seen = DeviceQueue(monkeypatch), Upload("cpu"), []
    if not kept:
        queue.run_to = lambda place: None  # type: ignore[method-assign]
    with QueuedCopies(queue):
        for number, batch in enumerate(batches):
            found = upload(step(number, batch))
            queue.put(lambda found=found: seen.append({name: t.clone() for name, t in found.items()}))
    for call in queue.calls[queue.done :]:
        call()
    right = [
        all(torch.equal(t, step(number, batch)[name]) for name, t in found.items())
        for number, (batch, found) in enumerate(zip(batches, seen, strict=True))
    ]
    assert all(right) == kept


def test_a_step_that_a_device_reads_nothing_of_copies_nothing(monkeypatch):
    queue = DeviceQueue(monkeypatch)
    with QueuedCopies(queue) as copies:
        assert Upload("cpu")({}) == {}
    assert copies.count == 0
