"""Names of intermediates: as few as a graph may have (256), at as little workspace as that allows.

libatb gives a name its place from its first to its last use in a graph (atb-operations.md 1.5). So every value has a
name of its own, the model's, where the limit allows that; where it does not, names are given up one after the other,
each time what adds least to the most that a layer holds at once:

    layers.3.input_norm.y  of attn.core too: a value of the same size, made after the first was last read
    layers.*.attn.k        one place for the value of all layers, which lives as long as the graph
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import combinations

from llmc.compiler.atb.core import DTYPE_BYTES, GRAPH_LIMITS
from llmc.compiler.layers import Group, Layer, rest_of

MANY = 64  # values of a layer for which every pair is looked at


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a value lies: under the name of the first value there. `shared`: all layers have it in common; `number`
    tells apart those whose tensors differ from layer to layer."""

    value: str
    shared: bool = False
    number: int = 0

    def name(self, block: str, own: str) -> str:
        """In a graph; `own`: what stands in front of the names of one layer."""
        if not self.shared:
            return own + self.value
        return f"{block}.*.{self.value}{f'#{self.number}' if self.number else ''}"


Names = Mapping[Layer, Mapping[str, Place]]  # of a layer: what stands behind the layer in a value's name -> its place


@dataclass(frozen=True, kw_only=True)
class _Values:
    """Values of one size that share a name. `live` and `held` have a bit for each node of the layer: where one of the
    values is needed, and where the name has its place, from the first of these nodes to the last."""

    values: tuple[str, ...]
    live: int
    size: int
    kind: tuple  # equal for tensors of one size

    @property
    def held(self) -> int:
        return (1 << self.live.bit_length()) - (self.live & -self.live)

    def with_other(self, other: _Values) -> _Values:
        first, second = sorted((self, other), key=lambda place: place.live & -place.live)
        return replace(first, values=first.values + second.values, live=first.live | second.live)


@dataclass(kw_only=True)
class _Plan:
    """The places of one layer's values, the names that all layers share, and the bytes held at each node."""

    places: list[_Values]
    shared: list[_Values] = field(default_factory=list)
    bytes_at: list[int]

    def count(self, layers: int) -> int:
        """Names in so many layers."""
        return len(self.places) * layers + len(self.shared)

    def cost(self, size: int, nodes: int) -> tuple[int, int]:
        """Bytes that the most held at once grows by, and bytes times nodes."""
        at = [number for number in range(len(self.bytes_at)) if nodes >> number & 1]
        most = max(self.bytes_at)
        return max([0, *(self.bytes_at[number] + size - most for number in at)]), size * len(at)

    def give_up_one(self) -> bool:
        """One name less in every layer; False where there is none left."""
        everywhere = (1 << len(self.bytes_at)) - 1
        ways: list[tuple[tuple[int, int], int, tuple[_Values, ...], int]] = []
        for a, b in combinations(self.places, 2):
            if a.kind == b.kind and not a.live & b.live:
                idle = a.with_other(b).held & ~(a.held | b.held)
                ways.append((self.cost(a.size, idle), 0, (a, b), idle))
        ways += [(self.cost(p.size, everywhere & ~p.held), 1, (p,), everywhere & ~p.held) for p in self.places]
        if not ways:
            return False
        _, _, chosen, idle = min(ways, key=lambda way: way[:2])
        self.places = [place for place in self.places if place not in chosen]
        first, *others = chosen
        if others:
            self.places.append(first.with_other(*others))
        else:
            self.shared.append(first)
        self.bytes_at = [held + first.size * (idle >> at & 1) for at, held in enumerate(self.bytes_at)]
        return True

    def fewest(self) -> None:
        """One place after the other is filled with what comes next: as few names as can be, in one go."""
        places: list[_Values] = []
        for place in sorted(self.places, key=lambda place: place.live & -place.live):
            free = (at for at, other in enumerate(places) if other.kind == place.kind and not other.live & place.live)
            if (at := next(free, -1)) < 0:
                places.append(place)
            else:
                places[at] = places[at].with_other(place)
        self.places = places

    def like(self, other: _Plan, mine: Layer, its: Layer) -> _Plan | None:
        """These values with the places of the other plan; None where that does not fit."""
        if len(mine.nodes) != len(its.nodes) or mine.block != its.block:
            return None
        partner = {its.own(theirs): mine.own(ours) for a, b in zip(its.nodes, mine.nodes, strict=True)
                   for theirs, ours in zip(a.outs, b.outs, strict=False)}  # fmt: skip
        single = {place.values[0]: place for place in self.places}
        found: list[list[_Values]] = []
        for places in (other.places, other.shared):
            found.append([])
            for place in places:
                parts = [single.pop(partner[v]) for v in place.values if partner.get(v) in single]
                if any(p.kind != parts[0].kind for p in parts) or any(
                    a.live & b.live for a, b in combinations(parts, 2)
                ):
                    return None
                found[-1] += [reduce(_Values.with_other, parts)] if parts else []
        return _Plan(places=[*found[0], *single.values()], shared=found[1], bytes_at=self.bytes_at)

    def names(self, taken: dict[str, list[tuple]]) -> Iterator[tuple[str, Place]]:
        """Value -> its place. `taken`: first value of a shared place -> the kinds of tensors in places of that name."""
        for values in self.places:
            yield from ((value, Place(value=values.values[0])) for value in values.values)
        for values in self.shared:
            kinds = taken.setdefault(values.values[0], [])
            if values.kind not in kinds:
                kinds.append(values.kind)
            place = Place(value=values.values[0], shared=True, number=kinds.index(values.kind))
            yield from ((value, place) for value in values.values)


def name_intermediates(groups: Sequence[Group], outputs: Collection[str], layers_per_segment: int) -> Names:
    """A name for every value that does not leave its layer; the others keep the model's. `layers_per_segment`: at most
    so many layers in one graph, 0: as many as fit."""
    leaving = leaving_values(groups, outputs)
    counts = Counter(group.layer for group in groups if group.layer.block)
    outside = sum(len(group.layer.made) for group in groups if not group.layer.block)
    plans: dict[Layer, _Plan] = {}
    for layer, _ in counts.most_common():
        together = min(layers_per_segment or counts.total(), max(1, GRAPH_LIMITS["nodes"] // len(layer.nodes)))
        plan = _plan(layer, leaving[layer])
        # A layer that differs from most in little (the first one) is named like them: they share code.
        plan = next((same for like, other in plans.items() if (same := plan.like(other, layer, like))), plan)
        room = GRAPH_LIMITS["internals"] - outside - together * len(leaving[layer])
        if plan.count(together) > room and len(plan.places) > MANY:
            plan.fewest()
        while plan.count(together) > room and len(plan.places) <= MANY and plan.give_up_one():
            pass
        plans[layer] = plan
    taken: dict[str, list[tuple]] = {}
    return {layer: dict(plan.names(taken)) for layer, plan in plans.items()}


def leaving_values(groups: Sequence[Group], outputs: Collection[str]) -> dict[Layer, set[str]]:
    """Of each layer, the values that other groups read or that the graph gives."""
    leaving: dict[Layer, set[str]] = {group.layer: set() for group in groups}
    for at, group in enumerate(groups):
        for name, back in zip(group.reads, group.back, strict=True):
            if back:
                maker = groups[at - back]
                leaving[maker.layer].add(rest_of(name))
        leaving[group.layer].update(group.layer.own(n) for n in group.layer.made if group.actual(n) in outputs)
    return leaving


def _plan(layer: Layer, leaving: Collection[str]) -> _Plan:
    bytes_at = [0] * len(layer.nodes)
    places = []
    for name in (*layer.args, *layer.made):
        rest, tensor, given = layer.own(name), layer.tensors[name], name in layer.args
        uses = [at for at, node in enumerate(layer.nodes) if name in node.ins or name in node.outs]
        leaves = not rest or rest in leaving
        first, last = 0 if given else uses[0], len(layer.nodes) - 1 if leaves and not given else uses[-1]
        size = DTYPE_BYTES[tensor.dtype] * tensor.form[2]
        for at in range(first, last + 1):
            bytes_at[at] += size
        if not given and not leaves:
            live = (1 << last + 1) - (1 << first)
            places.append(_Values(values=(rest,), live=live, size=size, kind=tensor.form))
    return _Plan(places=places, bytes_at=bytes_at)
