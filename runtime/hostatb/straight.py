"""The steps of a planned graph as one straight function: Python walks no lists between kernels.

    run = straight_line(steps, inputs=2, outputs=1, located=...)
    y, = run([x, w])

At one token a step the 330 kernels of a small model take tens of microseconds each, and the walk between them shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from llmc.compiler.atb.core import AtbError
from llmc.runtime.hostatb.operation import undefined
from llmc.runtime.hostatb.step import Step


def straight_line(
    steps: Sequence[Step], *, inputs: int, outputs: int, located: Callable[[Step, AtbError], AtbError]
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Slots are local variables `s0`, `s1`, ...; kernels are `k0`, ... `located` adds the node to a refusal."""
    names: dict[str, Any] = {"AtbError": AtbError, "undefined": undefined, "steps": steps, "located": located}
    lines = ["def run(tensors):", " at = 0", f" {_tuple('s', range(inputs))} = tensors", " try:"]
    valued = set(range(inputs))
    for number, step in enumerate(steps):
        names[f"k{number}"] = step.run
        lines.append(f"  at = {number}")
        call = f"k{number}(({', '.join(_arguments(number, step, valued, names))},))"
        if any(step.stores):
            lines.append(f"  results = {call}")
            lines += [
                f"  s{slot} = s{slot}.view(results[{i}].shape).copy_(results[{i}])"
                if store
                else f"  s{slot} = results[{i}]"
                for i, (slot, store) in enumerate(zip(step.outputs, step.stores, strict=True))
            ]
        else:
            lines.append(f"  {_tuple('s', step.outputs)} = {call}" if step.outputs else f"  {call}")
        valued.update(step.outputs)
        valued.difference_update(step.frees)
        lines += [f"  del s{slot}" for slot in step.frees]
    lines += [" except AtbError as error:", "  raise located(steps[at], error) from None"]
    lines.append(f" return [{', '.join(f's{slot}' for slot in range(inputs, inputs + outputs))}]")
    # Compiled first: an interrupt inside exec of a text makes Python exit as if nobody had caught it.
    exec(compile("\n".join(lines), "<straight>", "exec"), names)
    return names["run"]


def _tuple(letter: str, numbers: Sequence[int]) -> str:
    return f"({' '.join(f'{letter}{n},' for n in numbers)})"


def _arguments(number: int, step: Step, valued: set[int], names: dict[str, Any]) -> list[str]:
    """A kernel's inputs: slots, looked at through their views; an output that it fills in place comes as an input."""
    found = []
    for index, (slot, view) in enumerate(zip(step.inputs, step.views, strict=True)):
        if index not in step.fills:
            found.append(f"s{slot}" if view is None else f"s{slot}.view({view})")
            continue
        out = step.fills[index]
        desc, target = step.outs[out], step.outputs[out]
        names[f"d{number}_{out}"] = desc
        fresh = f"undefined(d{number}_{out}, like=s{slot})"
        found.append(f"s{target}.view({desc.shape})" if target in valued else fresh)
    return found
