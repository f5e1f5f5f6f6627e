"""The steps of a planned graph as one straight function: Python walks no lists between kernels.

    run = straight_line(steps, inputs=2, outputs=1, located=...)
    y, = run([x, w])

A step is a call of its kernel, or, where a rewrite knows it, lines that call torch with the constants bound. At one
token a step the 330 kernels of a small model take tens of microseconds each, and what lies between them shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from llmc.compiler.atb.core import AtbError
from llmc.runtime.hostatb.operation import undefined
from llmc.runtime.hostatb.step import Code, Step

T = TypeVar("T")
Shape = tuple[int, ...]


def straight_line(
    steps: Sequence[Step],
    *,
    inputs: int,
    outputs: int,
    located: Callable[[Step, AtbError], AtbError],
    clock: Callable[[], int] | None = None,
    stopped: Callable[[list[int]], None] | None = None,
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Slots are local variables `s0`, `s1`, ...; kernels are `k0`, ... `located` adds the node to a refusal. With a
    clock the function reads it at its start and behind each step, and hands the list to `stopped`."""
    line = _Line(steps, inputs, outputs)
    line.names |= {"AtbError": AtbError, "undefined": undefined, "derived": derived, "steps": steps, "located": located}
    line.names |= {"watch_clock": clock, "watch_ends": stopped}
    head = ["def run(tensors):", " at = 0", f" {_tuple('s', range(inputs))} = tensors"]
    head += [" watched = [watch_clock()]"] * bool(clock) + [" try:"]
    behind = ["watched.append(watch_clock())"] if clock else []
    body = [f"  {text}" for number, step in enumerate(steps) for text in (*line.of(number, step), *behind)]
    tail = [" except AtbError as error:", "  raise located(steps[at], error) from None"]
    tail += [" watch_ends(watched)"] * bool(clock)
    tail.append(f" return [{', '.join(line.result(slot) for slot in range(inputs, inputs + outputs))}]")
    # Compiled first: an interrupt inside exec of a text makes Python exit as if nobody had caught it.
    exec(compile("\n".join([*head, *body, *tail]), "<straight>", "exec"), line.names)
    run: Callable[[Sequence[Tensor]], list[Tensor]] = line.names["run"]
    return run


def derived(name: str, make: Callable[..., T], *tensors: Tensor) -> T:
    """`make(*tensors)`, kept on the first of them until one changes: what is computed once a model, or once a step."""
    first = tensors[0]
    if first.is_inference():  # such tensors do not tell whether they changed
        return make(*tensors)
    key = f"_atb_{name}"
    known, versions, value = getattr(first, key, ((), (), None))
    now = tuple([t._version for t in tensors])
    if versions != now or any(a is not b for a, b in zip(known, tensors[1:], strict=True)):
        value = make(*tensors)
        setattr(first, key, (tensors[1:], now, value))
    return value  # type: ignore[return-value]


class _Words(dict[str, str]):
    """What the words of a step's lines stand for; a word that nobody has defined is a variable of the step's own."""

    def __init__(self, known: dict[str, str]) -> None:
        super().__init__(known)
        self.own: list[str] = []

    def __missing__(self, word: str) -> str:
        self.own.append(f"t_{word}")
        self[word] = self.own[-1]
        return self[word]


class _Line:
    """The text of one function as it grows: which slots have a value, of what shape, and what was derived of them."""

    def __init__(self, steps: Sequence[Step], inputs: int, outputs: int) -> None:
        self.inputs, self.outputs = inputs, outputs
        self.names: dict[str, Any] = {}
        self.valued = set(range(inputs))
        self.shapes: dict[int, Shape] = {}  # of slots that a step's own lines made
        self.descs = {slot: desc.shape for step in steps for slot, desc in zip(step.outputs, step.outs, strict=True)}
        self.derived: dict[tuple[str, Shape], str] = {}  # name and slots -> variable
        self.count = 0

    def of(self, number: int, step: Step) -> list[str]:
        lines = [f"at = {number}"]
        lines += self._called(number, step) if step.code is None else self._inlined(number, step, step.code)
        self.valued.update(step.outputs)
        self.valued.difference_update(step.frees)
        written = {*step.outputs, *(step.inputs[i] for i in step.fills)}
        self.derived = {key: name for key, name in self.derived.items() if not written & set(key[1])}
        return lines + [f"del s{slot}" for slot in step.frees]

    def result(self, slot: int) -> str:
        """A graph output as its desc says it."""
        if slot not in self.shapes:
            return f"s{slot}"
        return f"s{slot}.reshape({self.descs[slot]}).contiguous()"

    def _called(self, number: int, step: Step) -> list[str]:
        self.names[f"k{number}"] = step.run
        arguments = [self._argument(number, step, index) for index in range(len(step.inputs))]
        call = f"k{number}(({''.join(f'{one}, ' for one in arguments)}))"
        for slot in step.outputs:
            self.shapes.pop(slot, None)
        if not any(step.stores):
            return [f"{_tuple('s', step.outputs)} = {call}" if step.outputs else call]
        return [
            f"results = {call}",
            *(
                f"s{slot} = s{slot}.view(results[{i}].shape).copy_(results[{i}])"
                if store
                else f"s{slot} = results[{i}]"
                for i, (slot, store) in enumerate(zip(step.outputs, step.stores, strict=True))
            ),
        ]

    def _inlined(self, number: int, step: Step, code: Code) -> list[str]:
        lines, words = [], _Words({f"o{i}": f"s{slot}" for i, slot in enumerate(step.outputs)})
        for index in range(len(step.inputs)):
            words[f"i{index}"] = argument = self._argument(number, step, index)
            if "." in argument and sum(line.count(f"{{i{index}}}") for line in code.lines) > 1:
                words[f"i{index}"] = words[f"argument_{index}"]
                lines.append(f"{words[f'i{index}']} = {argument}")
        for name, value in code.names.items():
            words[name] = self._constant(f"{name}_{number}", value)
        for name, kept in code.derived.items():
            slots = tuple(step.inputs[i] for i in kept.inputs)
            if (kept.name, slots) not in self.derived:
                self.count += 1
                variable = self.derived[kept.name, slots] = f"d{self.count}"
                made = self._constant(f"make_{variable}", kept.make)
                whole = ", ".join(f"s{slot}" for slot in slots)
                lines.append(f"{variable} = derived({kept.name!r}, {made}, {whole})")
            words[name] = self.derived[kept.name, slots]
        lines += [line.format_map(words) for line in code.lines]
        lines += [f"del {name}" for name in words.own]
        for index, slot in enumerate(step.outputs):
            self.shapes.pop(slot, None)
            if index in code.shapes:
                self.shapes[slot] = code.shapes[index]
        return lines

    def _constant(self, name: str, value: Any) -> str:
        """A global of the function; functions and numbers that many steps share are one."""
        for known in (name.rpartition("_")[0], name):
            if self.names.setdefault(known, value) is value:
                return known
        raise AssertionError(name)

    def _argument(self, number: int, step: Step, index: int) -> str:
        """A kernel's input: a slot, looked at through its view; an output that it fills in place comes as an input."""
        slot, view = step.inputs[index], step.views[index]
        if index not in step.fills:
            if slot in self.shapes and self.shapes[slot] != step.ins[index].shape:
                return f"s{slot}.view({step.ins[index].shape})"
            return f"s{slot}" if view is None or slot in self.shapes else f"s{slot}.view({view})"
        out = step.fills[index]
        desc, target = step.outs[out], step.outputs[out]
        if target == slot and view is None and slot in self.valued:
            return f"s{slot}"
        self.names[f"d{number}_{out}"] = desc
        return f"s{target}.view({desc.shape})" if target in self.valued else f"undefined(d{number}_{out}, like=s{slot})"


def alone(step: Step, code: Code) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """The `run` of a step that is known as code: its inputs as it sees them -> its outputs."""
    count = len(step.ins)
    own = replace(
        step, code=code, inputs=tuple(range(count)), views=(None,) * count, frees=(),
        outputs=tuple(range(count, count + len(step.outs))),
    )  # fmt: skip
    return straight_line([own], inputs=count, outputs=len(step.outs), located=lambda step, error: error)


def _tuple(letter: str, numbers: Iterable[int]) -> str:
    return f"({' '.join(f'{letter}{n},' for n in numbers)})"
