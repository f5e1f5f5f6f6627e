"""Two values that should be one: how far they are apart, how far they may be, and which is the first that errs.

    found = Comparison("prefill", entry, side)
    found.add(joined(entry, shares, splits), rows)        # once a step
    found.result()                                        # {"relative": 4.1e-3, "budget": 5.2e-3, "ok": true, ...}

Truth is the model in the next better precision (float64 for float32, float32 for 16 bit), on the numbers that the
compiled model's weights have. The natural error is that of transformers in the traced dtype against the same truth.
An error is |ours - truth| / |truth| of each row (a token), and the root mean square over rows: trained models give
some tokens a thousand times the norm of others, and these alone would be seen.

    whole   error <= c sqrt(natural^2 + rounding^2),  c = 1.25 + 2 / sqrt(rows)
    place   the same over one token and one head (64 columns where there are no heads), with c = 12, of attention 20

natural     of the rows compared or of all rows of the prompts, whichever is larger: few rows are few samples.
rounding    of one value to its dtype: what an exact copy may lack, and what a sum over ranks is rounded once more.
1.25        what 16-bit logits are held to against transformers' own (DESIGN, section 7).
2 / sqrt    rows differ in error, so that a mean of few scatters: honest models of the tests need 0.9 / sqrt.
12, 20      places differ more: honest models of the tests reach 4.3, and 10.2 in attention, because the softmax of one
            head and token can be sharper than all others and make its errors grow more. A wrong head, rank or position
            is off by a hundred times the natural error of 16 bit.

Against a recording (a dump, another artifact) the recording is the truth, and natural is the distance of two honest
runs: sqrt(2) times the natural error. Where transformers does not know the model nothing tells how it makes errors
grow, and the budget is coarse: 128 sqrt(1 + layer) roundings as a whole, 512 in one place (honest artifacts of the
tests reach 54 and 253, in float32, where sharp softmax makes errors grow most).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from llmc.compiler.ir import LAYER
from llmc.runtime.measure.forced import Row

MANTISSA = {"float32": 24, "float16": 11, "bfloat16": 8}  # bits, the hidden one included
RATIO, SCATTER = 1.25, 2.0
LOCAL, LOCAL_ATTENTION = 12.0, 20.0
DRIFT, LOCAL_DRIFT = 128.0, 512.0
COLUMNS = 64  # of a block where a value has no heads


class Side(Protocol):
    """What our values are compared with."""

    def counterpart(self, phase: str, entry: Mapping[str, Any]) -> str | None: ...

    def truth(self, phase: str, entry: Mapping[str, Any], rows: Sequence[Row]) -> Tensor: ...

    def natural(self, phase: str, entry: Mapping[str, Any], rows: Sequence[Row]) -> Tensor | None: ...

    def nearest(self, phase: str, entry: Mapping[str, Any], rows: Sequence[Row]) -> Tensor:
        """The value that was rounded as ours: what units in the last place are counted from."""
        ...

    def usual(self, phase: str, entry: Mapping[str, Any]) -> float:
        """The natural error over all rows that are known."""
        ...

    def dtype(self, entry: Mapping[str, Any]) -> str:
        """Of the two values the one that is rounded more."""
        ...


def rounding(dtype: str) -> float:
    """Relative error in norm of rounding to nearest: evenly spread over half a unit in the last place, under mantissas
    that lie as 1/x, whose mean square is 0.72 of a unit's at 1."""
    return 0.72 * 2.0 ** -MANTISSA.get(dtype, 24) / math.sqrt(3)


@dataclass
class Comparison:
    """One value in one phase, over all steps."""

    phase: str
    entry: Mapping[str, Any]
    side: Side
    depth: int = 0  # layers below a value outside layers
    rows: int = 0
    sums: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("error", "natural", "truth", "ours", "dot"), 0.0)
    )
    has_natural: bool = True
    max_abs: float = 0.0
    ulp: float | None = None
    worst: float = 0.0  # error of the worst place over what is natural there
    where: dict[str, Any] = field(default_factory=dict)

    def add(self, versions: Sequence[Tensor], rows: Sequence[Row]) -> None:
        """`versions`: the value as each different answer of the ranks has it; the worst counts."""
        truth = self.side.truth(self.phase, self.entry, rows).double()
        natural = self.side.natural(self.phase, self.entry, rows)
        errors = [version.double() - truth for version in versions]
        at = max(range(len(errors)), key=lambda i: _finite(_square(errors[i])))
        error, ours = errors[at], versions[at]
        noise = torch.zeros_like(truth) if natural is None else natural.double() - truth
        self.rows += len(rows)
        self.has_natural &= natural is not None
        wide = ours.double()
        self.sums["error"] += by_row(error, truth)
        self.sums["natural"] += by_row(noise, truth)
        self.sums["truth"] += _square(truth)
        self.sums["ours"] += _square(wide)
        self.sums["dot"] += float((wide * truth).sum())
        self.max_abs = max(self.max_abs, _finite(float(error.abs().max())))
        same = self.side.nearest(self.phase, self.entry, rows)
        if same.dtype == ours.dtype and (found := ulps(ours, same)) is not None:
            self.ulp = max(self.ulp or 0.0, found)
        self._places(error, noise, truth, rows)

    def _places(self, error: Tensor, noise: Tensor, truth: Tensor, rows: Sequence[Row]) -> None:
        width = self.entry["head_dim"] or COLUMNS
        e, n, t = (_in_blocks(x, width) for x in (error, noise, truth))
        if self.has_natural:
            relative = max(self.side.usual(self.phase, self.entry) ** 2, float(n.sum() / t.sum().clamp_min(1e-300)))
            row, column = n.mean(1, keepdim=True).expand_as(n), n.mean(0, keepdim=True).expand_as(n)
            n = torch.stack([n, row, column, relative * t]).nan_to_num(nan=math.inf).amax(0)  # transformers overflows
        else:
            n = self.drift**2 * torch.stack([t, t.mean(1, keepdim=True).expand_as(t)]).amax(0)
        ratio = (e / (n + self.rounding**2 * t + 1e-300)).sqrt().nan_to_num(nan=math.inf)
        r, b = divmod(int(ratio.argmax()), ratio.shape[1])
        if float(ratio[r, b]) > self.worst:
            self.worst = float(ratio[r, b])
            last = min((b + 1) * width, truth.shape[1])
            self.where = {"prompt": rows[r][0], "position": rows[r][1], "columns": [b * width, last]}

    @property
    def drift(self) -> float:
        """Natural distance of two recordings, in norm: roundings of a value, and of what it is made from."""
        match = LAYER.match(self.entry["name"])
        depth = int(match[2]) if match else 0 if self.entry["op"] == "embedding" else self.depth
        return self.rounding * math.sqrt(1 + depth)

    @cached_property
    def rounding(self) -> float:
        return rounding(self.side.dtype(self.entry))

    def nothing(self) -> dict[str, Any]:
        """Of a value that has no counterpart."""
        known = {key: self.entry[key] for key in ("name", "node", "op", "place")}
        return {**known, "phase": self.phase, "counterpart": None, "ok": True}

    def result(self) -> dict[str, Any]:
        """What is printed of it. `ok` False: it leaves its budget."""
        s = self.sums
        relative, natural = (math.sqrt(_finite(s[key]) / max(1, self.rows)) for key in ("error", "natural"))
        few = RATIO + SCATTER / math.sqrt(max(1, self.rows))
        if self.has_natural:
            natural = max(natural, _finite(self.side.usual(self.phase, self.entry)))
            budget = few * math.hypot(natural, self.rounding)
            local = LOCAL_ATTENTION if self.entry["op"] == "attention" else LOCAL
        else:
            budget, local = DRIFT * self.drift, LOCAL_DRIFT
        norms = math.sqrt(s["ours"]) * math.sqrt(s["truth"])
        inside = relative <= budget and math.isfinite(relative)
        here = self.worst <= local
        return {
            "name": self.entry["name"],
            "node": self.entry["node"],
            "op": self.entry["op"],
            "phase": self.phase,
            "place": self.entry["place"],
            "counterpart": self.side.counterpart(self.phase, self.entry),
            "rows": self.rows,
            "cosine": s["dot"] / norms if norms else 1.0,
            "max_abs": self.max_abs,
            "relative": relative,
            "ulp": self.ulp,
            "natural": natural if self.has_natural else None,
            "budget": budget,
            "worst": {"times_natural": self.worst, "at_most": local, **self.where},
            "ok": inside and here,
            "why": "" if inside and here else "as a whole" if not inside else "in one place",
        }


def first_that_errs(nodes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """In the order of the graph, prefill before decode: the first outside its budget. What it reads stands before it,
    and is inside."""
    return next((node for node in nodes if not node["ok"]), None)


def ulps(a: Tensor, b: Tensor) -> float | None:
    """Units in the last place between two tensors of one dtype: the median, since near zero there are many."""
    ints = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}.get(a.dtype)
    if ints is None:
        return None

    def steps(x: Tensor) -> Tensor:
        bits = x.contiguous().view(ints).long()
        return torch.where(bits < 0, torch.iinfo(ints).min - bits, bits)

    return float((steps(a) - steps(b)).abs().median())


def by_row(error: Tensor, truth: Tensor) -> float:
    """Sum over rows of |error|^2 / |truth|^2, in float64."""
    return float((error.square().sum(1) / truth.square().sum(1).clamp_min(1e-300)).sum())


def _finite(x: float) -> float:
    return math.inf if math.isnan(x) else x


def _square(x: Tensor) -> float:
    return float((x * x).sum())


def _in_blocks(x: Tensor, width: int) -> Tensor:
    """[rows, n] -> squares summed over blocks of columns [rows, ceil(n / width)]"""
    padded = torch.nn.functional.pad(x * x, (0, -x.shape[1] % width))
    return padded.reshape(x.shape[0], -1, width).sum(-1)
