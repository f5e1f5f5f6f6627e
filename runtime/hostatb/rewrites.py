"""Planning for speed: steps of a planned graph become faster ones that give the same numbers.

Kernels of this package say what the chip computes; a rewrite is another way to the same result, to the rounding of the
order of sums. A `Fusion` looks at the next few steps and gives one step for some of them. Those that carry a product on
to what follows it (residual, activation) leave out a rounding in between, or make it elsewhere: their result is as near
to the exact one (tests/hostatb/test_rewrites.py compares all with their kernels).

What is written here costs the fewest calls: at one token a step of a small model that is what remains beside reading
the weights. Which product is fastest for how many rows is measured (`choices.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import linear as dense
from torch.nn.functional import scaled_dot_product_attention, silu

from llmc.compiler.atb.core import FLOATS16, Desc, Param
from llmc.compiler.atb.elementwise import SWIGLU_FORWARD
from llmc.compiler.atb.norm import NORM, PRENORM
from llmc.compiler.atb.self_attention import DECODER, PA_ENCODER
from llmc.runtime.host_memory import free_memory
from llmc.runtime.hostatb.attend import attend
from llmc.runtime.hostatb.choices import CHOICES
from llmc.runtime.hostatb.masks import is_tile, is_triangle, mask_factor
from llmc.runtime.hostatb.numeric import TORCH_DTYPE
from llmc.runtime.hostatb.operation import Single
from llmc.runtime.hostatb.paged_attention import checked_tables
from llmc.runtime.hostatb.pages import remember
from llmc.runtime.hostatb.step import Code, Derived, Step
from llmc.runtime.hostatb.straight import alone

Run = Callable[[Sequence[Tensor]], list[Tensor]]

# Packed copies leave this much memory free: caches and activations come from it.
RESERVE_BYTES = 2 << 30
# Up to this many tokens one small matrix product turns a head faster than four passes over it.
MATRIX_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Found:
    """One step in the place of `count` steps."""

    step: Step
    count: int = 1


def rewrite(steps: Sequence[Step]) -> Sequence[Step]:
    """Every step or row of steps that a rewrite knows runs faster; the others stay."""
    made, at = [], 0
    while at < len(steps):
        found = next((f for fusion in FUSIONS if (f := fusion(steps[at : at + 3]))), Found(step=steps[at]))
        made.append(found.step)
        at += found.count
    return made


def single(step: Step, name: str) -> Param | None:
    """The parameters of this operation of the table, if that is what the step is and a rewrite may touch it.

    What 310P makes of float16 overflow (65504) is left to the kernels."""
    core = step.core
    known = isinstance(core, Single) and core.op.name == name and core.chip != "Ascend310P" and not any(step.stores)
    return core.param if known and isinstance(core, Single) else None


def coded(step: Step, code: Code) -> Step:
    return replace(step, code=code, run=alone(step, code))


def merged(steps: Sequence[Step], inputs: Sequence[tuple[int, int]], outputs: Sequence[tuple[int, int]]) -> Step:
    """Several steps as one, with these inputs and outputs, each given as (step, index). Its code comes later."""
    dead = dict[int, None]()
    for step in steps:  # a slot may be given again to a value of a later step
        dead = {slot: None for slot in dead if slot not in step.outputs} | dict.fromkeys(step.frees)
    read = [steps[s].inputs[i] for s, i in inputs]
    written = [steps[s].outputs[i] for s, i in outputs]
    return Step(
        core=steps[-1].core,
        label=steps[-1].label,
        run=steps[-1].run,
        ins=tuple(steps[s].ins[i] for s, i in inputs),
        outs=tuple(steps[s].outs[i] for s, i in outputs),
        inputs=tuple(read),
        views=tuple(steps[s].views[i] for s, i in inputs),
        outputs=tuple(written),
        stores=(False,) * len(outputs),
        frees=tuple(slot for slot in dead if slot in (*read, *written)),
        nodes=tuple(node for step in steps for node in step.nodes),
    )


def passes_only_to(first: Step, out: int, then: Step, index: int) -> bool:
    """The output goes to that input as it is, and nowhere else."""
    slot = first.outputs[out]
    return then.inputs[index] == slot and then.inputs.count(slot) == 1 and not then.views[index] and slot in then.frees


# ---- products


def is_plain_linear(step: Step, p: Param) -> bool:
    """x [.., k] times weight [n, k], no bias inside."""
    x, weight = step.ins[:2]
    plain = p.transposeB and not p.transposeA and not p.enAccum and p.matmulType == 0 and p.outDataType == -1
    return plain and x.dtype in FLOATS16 and weight.format == "nd" and len(weight.shape) == 2 and not step.views[1]


def fast_linear(steps: Sequence[Step]) -> Found | None:
    """16-bit products, the way that is fastest here for so many rows."""
    step, p = steps[0], single(steps[0], "Linear")
    if p is None or not is_plain_linear(step, p):
        return None
    way = way_of(step)
    if way == "packed":
        line = "{o0} = {dense}({i0}, {i1}) if {packed} is None else {times}({i0}, {packed}, None, 'none', [], '')"
        code = Code(lines=(line,), names={"dense": dense, "times": times()}, derived={"packed": PACKED})
    else:
        code = Code(lines=("{o0} = {product}({i0}, {i1})",), names={"product": WAYS[way]})
    if p.hasBias:
        code = replace(code, lines=(*code.lines, "{o0} = {o0} + {i2}"))
    return Found(step=coded(step, code))


def times() -> Any:
    """x, packed weight, bias, what follows ("none", "swish"), its numbers and its kind."""
    return torch.ops.mkldnn._linear_pointwise.default


def times_and() -> Any:
    """x, other, packed weight, bias, what joins the product and the other ("add", "mul"); rounded once."""
    return torch.ops.mkldnn._linear_pointwise.binary


def packed(weight: Tensor) -> Tensor | None:
    """The copy in oneDNN's layout; None where memory is short, since all copies together double the weights."""
    free = free_memory()
    if free is not None and free < RESERVE_BYTES + 2 * weight.nbytes:
        return None
    copy = torch.ops.mkldnn._reorder_linear_weight(weight)
    remember(torch.ops.mkldnn.data_ptr(copy), torch.ops.mkldnn._nbytes(copy))
    return copy


def packed_halves(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Of gate and up, one below the other, a packed copy each."""
    gate, up = (packed(half) for half in weight.chunk(2))
    return None if gate is None or up is None else (gate, up)


PACKED = Derived(name="packed", make=packed, inputs=(1,))


def in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """[rows, k] x [n, k] -> [rows, n]: exact products, float32 sums, one rounding, as the chip's cube unit."""
    return dense(x.float(), weight.float()).to(x.dtype)


def times_vector(x: Tensor, weight: Tensor) -> Tensor:
    """One row: the weight times a vector."""
    return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], weight.shape[0])


def turned(x: Tensor, weight: Tensor) -> Tensor:
    """Few rows: the weight times x as columns, which reads the weight as it lies."""
    rows = x.reshape(-1, x.shape[-1])
    return torch.mm(weight, rows.t()).t().reshape(*x.shape[:-1], weight.shape[0])


WAYS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": dense, "vector": times_vector, "turned": turned, "float32": in_float32,
}  # fmt: skip
ROW_CLASSES = (1, 4, 16, 64, 256)  # measured at these; more rows than the last are like the last
SIZE_CLASSES = (256, 512, 1024)  # of either side of the weight
FEW_ROWS = 16  # up to here reading the weight is what a product costs


def way_of(step: Step) -> str:
    """ "packed", or a key of `WAYS`."""
    x, weight = step.ins[:2]
    return linear_way(x.dtype, prod(x.shape[:-1]), *weight.shape)


def linear_way(dtype: str, rows: int, n: int, k: int) -> str:
    """The fastest product of x [rows, k] and weight [n, k], measured on sizes of the same class."""
    rows, n, k = class_of(rows, ROW_CLASSES), class_of(n, SIZE_CLASSES), class_of(k, SIZE_CLASSES)
    if rows > FEW_ROWS:  # many rows cost time and tell the same at smaller weights
        n, k = min(n, 512), min(k, 512)
    names = ["packed"] if onednn_supports(dtype) else []
    names += ["plain", "float32"] if rows > FEW_ROWS else ["plain", "vector" if rows == 1 else "turned", "float32"]
    question = f"product and residual {dtype} {rows}x{k}x{n}"
    copies = 4 if rows <= FEW_ROWS else 1

    def prepare() -> dict[str, Measured]:
        sizes = (rows, k), (rows, n), *[(n, k)] * copies
        tensors = [torch.linspace(-1, 1, a * b).to(TORCH_DTYPE[dtype]).view(a, b) for a, b in sizes]
        return {name: Measured(name, tensors) for name in names}

    return CHOICES.pick(question, names, prepare)


class Measured:
    """One candidate on made-up numbers, with the residual that follows every second product of a layer and can join a
    packed one. It goes round several weights, as a step does: one would stay in the cache."""

    def __init__(self, way: str, tensors: Sequence[Tensor]) -> None:
        self.way, self.calls, (self.x, self.residual, *self.plain) = way, 0, tensors

    @cached_property
    def weights(self) -> list[Tensor]:
        pack = torch.ops.mkldnn._reorder_linear_weight
        return [pack(weight) for weight in self.plain] if self.way == "packed" else self.plain

    def __call__(self) -> Tensor:
        self.calls += 1
        weight = self.weights[self.calls % len(self.weights)]
        if self.way == "packed":
            joined: Tensor = times_and()(self.x, self.residual, weight, None, "add")
            return joined
        return WAYS[self.way](self.x, weight).float().add_(self.residual).to(self.x.dtype)


def class_of(size: int, classes: Sequence[int]) -> int:
    return next((c for c in classes if size <= c), classes[-1])


def onednn_supports(dtype: str) -> bool:
    """oneDNN has a kernel for this 16-bit type on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == "bfloat16" else ops._is_mkldnn_fp16_supported())


def is_packed_linear(step: Step) -> bool:
    """A product without bias that is fastest in oneDNN's layout: what follows it can join it there."""
    p = single(step, "Linear")
    return p is not None and is_plain_linear(step, p) and not p.hasBias and way_of(step) == "packed"


# ---- norms


def fast_rms_norm(steps: Sequence[Step]) -> Found | None:
    """NORM and PRENORM without quantisation or options, in as few calls as torch allows."""
    step = steps[0]
    if (epsilon := plain_norm(step)) is None:
        return None
    x, y, gamma, dtype = step.ins[0], step.outs[0], len(step.ins) - 1, step.ins[0].dtype
    if gamma == 1:
        code = norm_code("{i0}", "{o0}", y, gamma, epsilon)
    elif dtype == "float32":
        code = norm_code("{o1}", "{o0}", y, gamma, epsilon, before=("{o1} = {i0} + {i1}",))
    else:
        before = ("{total} = {add}({i0}.float(), {i1})", "{o1} = {total}.to({half})")
        code = norm_code("{total}", "{o0}", replace(y, dtype="float32"), gamma, epsilon, before=before, dtype=x.dtype)
        code = replace(code, names={**code.names, "add": torch.add, "half": TORCH_DTYPE[x.dtype]})
    return Found(step=coded(step, code))


def plain_norm(step: Step) -> float | None:
    """epsilon of a norm over [.., width] that no option changes."""
    p = single(step, "RmsNorm")
    if p is None or p.layerType not in (NORM, PRENORM) or len(step.ins) != p.layerType + 1:
        return None
    options = p.normParam
    if options.rstd or options.precisionMode or options.modelType or options.quantType or p.preNormParam.quantType:
        return None
    epsilon: float = options.epsilon if p.layerType == NORM else p.preNormParam.epsilon
    return epsilon if len(step.ins[-1].shape) == 1 and epsilon > 0 else None


def norm_code(
    x: str, y: str, desc: Desc, gamma: int, epsilon: float, *, before: tuple[str, ...] = (), dtype: str = ""
) -> Code:
    """Lines that give `y` of `x` in float32, rounded once to `dtype`. The variable `x` is not written."""
    width, half = desc.shape[-1], TORCH_DTYPE[dtype or desc.dtype]
    names = {"addcmul": torch.addcmul, "vector_norm": vector_norm, "wide": torch.float32, "half": half}
    gammas = {"gamma": Derived(name="float32", make=Tensor.float, inputs=(gamma,))}
    if desc.elements == width:  # one number a row is cheaper in Python than in a tensor
        scale = f"({{vector_norm}}({x}, dtype={{wide}}).item() ** 2 / {width} + {epsilon!r}) ** -0.5"
        line = f"{y} = {{addcmul}}({{zero}}, {x}, {{gamma}}, value={scale}).to({{half}})"
        return Code(lines=(*before, line), names={**names, "zero": torch.zeros(())}, derived=gammas)
    source = x if desc.dtype == "float32" else "{wide_x}"
    widen = () if desc.dtype == "float32" else (f"{{wide_x}} = {x}.float()",)
    scale = f"{{addcmul}}({{epsilon}}, {{length}}, {{length}}, value={1 / width!r}).rsqrt_()"
    lines = (
        *before,
        *widen,
        f"{{length}} = {{vector_norm}}({source}, 2, -1, True)",
        f"{y} = ({source} * {scale}).mul_({{gamma}}).to({{half}})",
    )
    return Code(lines=lines, names={**names, "epsilon": torch.tensor(epsilon)}, derived=gammas)


def linear_then_prenorm(steps: Sequence[Step]) -> Found | None:
    """The residual joins the product: their sum is rounded once, and the norm reads it rounded."""
    if len(steps) < 2 or (epsilon := plain_norm(steps[1])) is None or not is_packed_linear(steps[0]):
        return None
    linear, norm = steps[:2]
    if len(norm.ins) != 3 or norm.ins[0] != norm.ins[1]:
        return None
    own = next((i for i in (0, 1) if passes_only_to(linear, 0, norm, i)), None)
    if own is None:
        return None
    step = merged((linear, norm), [(0, 0), (0, 1), (1, 1 - own), (1, 2)], [(1, 0), (1, 1)])
    joined = (
        "{o1} = {plain_sum}({i0}, {i1}, {i2}) if {packed} is None else {times_and}({i0}, {i2}, {packed}, None, 'add')",
    )
    code = norm_code("{o1}", "{o0}", step.outs[0], 3, epsilon, before=joined)
    code = replace(
        code,
        names={**code.names, "plain_sum": plain_sum, "times_and": times_and()},
        derived={**code.derived, "packed": PACKED},
    )
    return Found(step=coded(step, code), count=2)


def plain_sum(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return dense(x, weight).float().add_(residual).to(x.dtype)


# ---- activation


def fast_swiglu(steps: Sequence[Step]) -> Found | None:
    """silu(gate) * up in float32; `up` is widened inside the product."""
    step, p = steps[0], single(steps[0], "Activation")
    if p is None or p.activationType != SWIGLU_FORWARD:
        return None
    half = step.ins[0].shape[-1] // 2
    lines = (
        f"{{gate}}, {{up}} = {{i0}}.split_with_sizes(({half}, {half}), -1)",
        "{o0} = {silu}({gate}.float()).mul_({up}).to({dtype})",
    )
    return Found(step=coded(step, Code(lines=lines, names={"silu": silu, "dtype": TORCH_DTYPE[step.ins[0].dtype]})))


def linear_then_swiglu(steps: Sequence[Step]) -> Found | None:
    """gate and up as products of their own: silu joins the one, the multiplication the other."""
    if len(steps) < 2 or (p := single(steps[1], "Activation")) is None or p.activationType != SWIGLU_FORWARD:
        return None
    linear, activation = steps[:2]
    if linear.core.name != "LinearOperation" or not passes_only_to(linear, 0, activation, 0):
        return None
    if not is_packed_linear(linear):
        return None
    step = merged((linear, activation), [(0, 0), (0, 1)], [(1, 0)])
    lines = (
        "if {halves} is None: {o0} = {plain_gated}({i0}, {i1})",
        "else: {o0} = {times_and}({i0}, {times}({i0}, {halves}[0], None, 'swish', [], ''), {halves}[1], None, 'mul')",
    )
    names = {"plain_gated": plain_gated, "times": times(), "times_and": times_and()}
    halves = Derived(name="packed_halves", make=packed_halves, inputs=(1,))
    return Found(step=coded(step, Code(lines=lines, names=names, derived={"halves": halves})), count=2)


def plain_gated(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = dense(x, weight).chunk(2, -1)
    return silu(gate.float()).mul_(up).to(x.dtype)


# ---- rotation


def fast_rope(steps: Sequence[Step]) -> Found | None:
    """Rotation of halves in float32, q and k one after the other."""
    step = steps[0]
    if not is_wide_rope(step):
        return None
    code = Code(lines=("{o0}, {o1} = {rotate_both}({i0}, {i1}, {tables})",), names={"rotate_both": rotate_both},
                derived={"tables": tables_of(step, 2)}, shapes={i: heads_of(step, i) for i in (0, 1)})  # fmt: skip
    return Found(step=coded(step, code))


def is_wide_rope(step: Step) -> bool:
    """float16 rounds both products, which the plain kernel does."""
    p = single(step, "Rope")
    if p is None:
        return False
    q, _, cos = step.ins[:3]
    one_row_a_token = p.cosFormat == 0 and cos.shape[0] == q.shape[0] and len(q.shape) == 2
    return p.rotaryCoeff == 2 and one_row_a_token and q.dtype != "float16"


def heads_of(rope: Step, index: int) -> tuple[int, int, int]:
    (tokens, width), size = rope.ins[index].shape, rope.ins[2].shape[1]
    return tokens, width // size, size


def rotate_both(q: Tensor, k: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
    size = tables[0].shape[-1]
    return rotate(q.unflatten(-1, (-1, size)), tables), rotate(k.unflatten(-1, (-1, size)), tables)


Tables = tuple[Tensor, ...]


def tables_of(rope: Step, first: int) -> Derived:
    """What the tables at inputs `first` and `first + 1` give for all layers: a rotation matrix a token when tokens are
    few; else cos and sin in float32, sin's first half negated."""
    few = rope.ins[2].shape[0] <= MATRIX_TOKENS
    return Derived(
        name="rotations" if few else "wide", make=rotations if few else wide_tables, inputs=(first, first + 1)
    )


def rotate(heads: Tensor, tables: Tables) -> Tensor:
    """[tokens, heads, size] of any strides -> the same, turned."""
    if len(tables) == 1:
        return torch.bmm(heads.float(), tables[0]).to(heads.dtype)
    cos, first, second = tables
    wide, half = heads.float(), first.shape[-1]
    turned = wide * cos
    turned[..., :half].addcmul_(wide[..., half:], first)
    turned[..., half:].addcmul_(wide[..., :half], second)
    return turned.to(heads.dtype)


def wide_tables(cos: Tensor, sin: Tensor) -> Tables:
    first, second = sin.float().unsqueeze(1).chunk(2, -1)
    return cos.float().unsqueeze(1), -first, second


def rotations(cos: Tensor, sin: Tensor) -> Tables:
    """[tokens, size, size]: cos on the diagonal, sin where a channel meets its partner half a head away. A product with
    it sums two terms and zeros, so it is as exact as the two products alone."""
    size = cos.shape[1]
    partner = torch.eye(size).roll(size // 2, 0)
    first, second = sin.float().chunk(2, -1)
    return (torch.diag_embed(cos.float()) + partner * torch.cat((-first, second), -1).unsqueeze(1),)


def split_then_rope(steps: Sequence[Step]) -> Found | None:
    """q and k, which lie side by side in the packed product, turn together; the parts stay views of it."""
    if len(steps) < 2 or (p := single(steps[0], "Split")) is None or not is_wide_rope(steps[1]):
        return None
    split, rope = steps[:2]
    last_axis = p.splitDim % len(split.ins[0].shape) == len(split.ins[0].shape) - 1
    if len(split.outputs) != 3 or not last_axis or not all(passes_only_to(split, i, rope, i) for i in (0, 1)):
        return None
    step = merged((split, rope), [(0, 0), (1, 2), (1, 3)], [(1, 0), (1, 1), (0, 2)])
    (tokens, q_heads, size), k_heads = heads_of(rope, 0), heads_of(rope, 1)[1]
    both, rest = (q_heads + k_heads) * size, split.outs[2].shape[-1]
    lines = (
        f"{{both}}, {{o2}} = {{i0}}.split_with_sizes(({both}, {rest}), 1)",
        f"{{both}} = {{both}}.view(({tokens}, {q_heads + k_heads}, {size}))",
        f"{{o0}}, {{o1}} = {{rotate}}({{both}}, {{tables}}).split_with_sizes(({q_heads}, {k_heads}), 1)",
    )
    if tokens <= MATRIX_TOKENS:
        turned = "{bmm}({both}.float(), {tables}[0]).to({dtype})"
        lines = (*lines[:2], lines[2].replace("{rotate}({both}, {tables})", turned))
    names = {"rotate": rotate, "bmm": torch.bmm, "dtype": TORCH_DTYPE[step.outs[0].dtype]}
    shapes = {0: heads_of(rope, 0), 1: heads_of(rope, 1), 2: (tokens, rest)}
    code = Code(lines=lines, names=names, derived={"tables": tables_of(rope, 1)}, shapes=shapes)
    return Found(step=coded(step, code), count=2)


# ---- caches and attention


def fast_reshape_and_cache(steps: Sequence[Step]) -> Found | None:
    """Keys and values into [blocks, blockSize, Nk, D] caches; slots are checked once a step, not once a layer."""
    step, p = steps[0], single(steps[0], "ReshapeAndCache")
    if p is None or len(step.ins) != 5 or p.compressType or p.kvCacheCfg or step.ins[2].format != "nd":
        return None
    key, value, key_cache, value_cache, slots = step.ins
    if key_cache.shape != value_cache.shape or key.shape != value.shape or slots.shape[0] != key.shape[0]:
        return None
    if len(key_cache.shape) != 4 or any(step.inputs[i] != step.outputs[out] for i, out in step.fills.items()):
        return None
    rows = key_cache.shape[0] * key_cache.shape[1]
    flat = (rows, *key_cache.shape[2:])
    lines = (
        "if {checked} is None: {kernel}(({i0}, {i1}, {i2}, {i3}, {i4}))",
        f"else: {{i2}}.view({flat}).index_copy_(0, {{checked}}, {{i0}})",
        f"if {{checked}} is not None: {{i3}}.view({flat}).index_copy_(0, {{checked}}, {{i1}})",
    )
    checked = Derived(name=f"slots_below_{rows}", make=lambda t: all_within(t, rows), inputs=(4,))
    return Found(step=replace(step, code=Code(lines=lines, names={"kernel": step.run}, derived={"checked": checked})))


def all_within(slots: Tensor, rows: int) -> Tensor | None:
    """int64 slots when all lie in the cache; None where the kernel must skip or refuse some."""
    low, high = torch.aminmax(slots)
    return slots.long() if low >= 0 and high < rows else None


@dataclass(frozen=True, kw_only=True)
class CacheRows:
    """Where a step's keys lie in a cache: one run of rows, or an index [B * longest] with a mask of the padding."""

    start: int
    count: int
    index: Tensor | None
    bias: Tensor | None


def fast_paged_attention(steps: Sequence[Step]) -> Found | None:
    """Decode without masks or quantisation: all sequences in one call; which rows to read is worked out once a step."""
    step, p = steps[0], single(steps[0], "PagedAttention")
    if p is None:
        return None
    q, key_cache, value_cache, _, lengths = step.ins[:5]
    plain = len(step.ins) == 5 and p.qScale in (0, 1) and not p.inputLayout and key_cache.format == "nd"
    if not plain or key_cache != value_cache or lengths.shape[0] != q.shape[0] or q.shape[1] != p.headNum:
        return None
    batch, heads, size = q.shape
    blocks, block, kv_heads, _ = key_cache.shape
    chip, dtype, scale, row = step.core.chip, q.dtype, p.qkScale, kv_heads * size
    shape = query_shape(dtype, batch, heads, kv_heads, size)
    cache = torch.empty(key_cache.shape, device="meta")

    def rows_of(lengths: Tensor, tables: Tensor) -> CacheRows:
        counts = lengths.tolist()
        ids = checked_tables(p, {"keyCache": cache, "blockTables": tables}, counts, chip)[1]
        used = ids[0][: -(-counts[0] // block)]
        if batch == 1 and used == list(range(used[0], used[0] + len(used))):
            return CacheRows(start=used[0] * block, count=counts[0], index=None, bias=None)
        position = torch.arange(max(counts))
        index = torch.tensor(ids)[:, position // block] * block + position % block
        return CacheRows(start=0, count=len(position), index=own_rows(index, counts), bias=padding(counts, dtype))

    def attend(q: Tensor, keys: Tensor, values: Tensor, rows: CacheRows) -> Tensor:
        if rows.index is None:
            where = (1, kv_heads, rows.count, size), (0, size, row, 1), rows.start * row
            keys = keys.as_strided(*where[:2], keys.storage_offset() + where[2])
            values = values.as_strided(*where[:2], values.storage_offset() + where[2])
        else:
            places = (batch, kv_heads, rows.count, size), (rows.count * row, size, row, 1)
            keys = keys.view(-1, row).index_select(0, rows.index).as_strided(*places)
            values = values.view(-1, row).index_select(0, rows.index).as_strided(*places)
        return scaled_dot_product_attention(
            q.view(shape), keys, values, attn_mask=rows.bias, scale=scale, enable_gqa=shape[2] == 1
        )

    rows = Derived(name=f"rows_of_{blocks}x{block}_{dtype}", make=rows_of, inputs=(4, 3))
    code = Code(lines=("{o0} = {attend}({i0}, {i1}, {i2}, {rows})",), names={"attend": attend}, derived={"rows": rows},
                shapes={0: shape})  # fmt: skip
    return Found(step=coded(step, code))


def query_shape(dtype: str, batch: int, heads: int, kv_heads: int, size: int) -> tuple[int, int, int, int]:
    """One query a sequence, for torch's fused kernel: [B, N, 1, D] with shared kv heads, or the queries of a kv head as
    rows of one product, [B, Nk, N / Nk, D]. Both are the same numbers in the same order."""
    apart, grouped = (batch, heads, 1, size), (batch, kv_heads, heads // kv_heads, size)
    if heads == kv_heads:
        return apart
    few, options, attention = min(batch, 4), {"grouped": grouped, "apart": apart}, scaled_dot_product_attention

    def prepare() -> dict[str, Callable[[], object]]:
        q, rows = (
            torch.linspace(-1, 1, few * n * size).to(TORCH_DTYPE[dtype]).view(few, -1, n, size)
            for n in (heads, 128 * kv_heads)
        )
        keys = rows.view(few, 128, kv_heads, size).transpose(1, 2)
        return {
            name: partial(attention, q.view(few, *shape[1:]), keys, keys, enable_gqa=shape[2] == 1)
            for name, shape in options.items()
        }

    return options[CHOICES.pick(f"decode attention {dtype} {few}x{heads}/{kv_heads}x{size}", list(options), prepare)]


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Contiguous caches: rows [B] (of B * S) where this step's keys go, the longest sequence; index and mask when some
    are shorter, as in CacheRows."""

    rows: Tensor
    longest: int
    index: Tensor | None
    bias: Tensor | None


def fast_flash_decode(steps: Sequence[Step]) -> Found | None:
    """One new token in every sequence of contiguous caches [1, B, S, Nk * D]: append, then all in one call."""
    step, p = steps[0], single(steps[0], "SelfAttention")
    if p is None:
        return None
    options = (p.maskType, p.kvcacheCfg, p.clampType, p.scaleType, p.cacheType, p.inputLayout, p.quantType)
    if p.calcType != DECODER or any(options) or p.batchRunStatusEnable or p.windowSize or len(step.ins) != 8:
        return None
    q, key, value, k_cache, v_cache = step.ins[:5]
    heads, kv_heads = p.headNum, p.kvHeadNum or p.headNum
    batch, width = q.shape[0], k_cache.shape[-1]
    caches = k_cache == v_cache and k_cache.format == "nd" and k_cache.shape[:2] == (1, batch) and not width % kv_heads
    if not caches or len(q.shape) != 2 or p.qScale != 1 or key.shape != (batch, width) or value.shape != key.shape:
        return None
    room, size, dtype, kernel = k_cache.shape[2], width // kv_heads, q.dtype, step.run
    shape = query_shape(dtype, batch, heads, kv_heads, size)

    def ends_of(offsets: Tensor, lengths: Tensor, layer: Tensor) -> Ends | None:
        counts = offsets.tolist()
        if set(lengths.tolist()) != {1} or not 0 < min(counts) <= max(counts) <= room or layer.item() != 0:
            return None
        first, longest, bias = torch.arange(batch) * room, max(counts), padding(counts, dtype)
        index = None if bias is None else own_rows(first[:, None] + torch.arange(longest), counts)
        return Ends(rows=first + torch.tensor(counts) - 1, longest=longest, index=index, bias=bias)

    def append_and_read(new: Tensor, cache: Tensor, ends: Ends) -> Tensor:
        """-> [B, Nk, longest, D]"""
        flat = cache.view(-1, width)
        flat.index_copy_(0, ends.rows, new)
        if ends.index is None:
            return cache.as_strided((batch, kv_heads, ends.longest, size), (room * width, size, width, 1))
        found = flat.index_select(0, ends.index)
        return found.as_strided((batch, kv_heads, ends.longest, size), (ends.longest * width, size, width, 1))

    def attend(q: Tensor, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, ends: Ends) -> Tensor:
        keys, values = append_and_read(key, k_cache, ends), append_and_read(value, v_cache, ends)
        return scaled_dot_product_attention(
            q.view(shape), keys, values, attn_mask=ends.bias, scale=p.qkScale, enable_gqa=shape[2] == 1
        ).view(q.shape)

    lines = (
        "if {ends} is None: {o0}, = {kernel}(({i0}, {i1}, {i2}, {i3}, {i4}, {i5}, {i6}, {i7}))",
        "else: {o0} = {attend}({i0}, {i1}, {i2}, {i3}, {i4}, {ends})",
    )
    ends = Derived(name=f"ends_below_{room}_{dtype}", make=ends_of, inputs=(5, 6, 7))
    return Found(
        step=coded(step, Code(lines=lines, names={"kernel": kernel, "attend": attend}, derived={"ends": ends}))
    )


def fast_prefill_attention(steps: Sequence[Step]) -> Found | None:
    """Causal attention over whole sequences in 16 bit. As in decode the fused kernel rounds P to 16 bit, as the chips
    do; the plain kernel widens everything."""
    step, p = steps[0], single(steps[0], "SelfAttention")
    if p is None or p.calcType != PA_ENCODER or len(step.ins) != 5 or not is_tile(step.ins[3], p):
        return None
    options = (p.clampType, p.scaleType, p.inputLayout, p.quantType, p.mlaVHeadSize, p.windowSize, p.cacheType)
    q, k, v, mask, lengths = step.ins
    heads, kv_heads = p.headNum, p.kvHeadNum or p.headNum
    flat = len(q.shape) == len(k.shape) == len(v.shape) == 2 and mask.format == "nd" and len(lengths.shape) == 1
    if any(options) or not flat or q.dtype not in FLOATS16 or k != v or k.dtype != q.dtype or q.shape[1] % heads:
        return None
    tokens, size = q.shape[0], q.shape[1] // heads
    if k.shape != (tokens, kv_heads * size):
        return None
    if (chosen := prefill_way(q.dtype, heads, kv_heads, size, tokens)) == "kernel":
        return None
    chip, scale, kernel, way = step.core.chip, p.qkScale, step.run, PREFILL_WAYS[chosen]

    def is_causal(mask: Tensor) -> bool:
        return is_triangle(mask, mask_factor(mask, p, chip))

    def lengths_of(lengths: Tensor) -> list[int] | None:
        counts: list[int] = lengths.tolist()
        return counts if min(counts) > 0 and sum(counts) == tokens else None  # the kernel refuses

    def all_of(q: Tensor, k: Tensor, v: Tensor, counts: list[int]) -> Tensor:
        if len(counts) == 1:
            return way(q, k, v, scale)
        parts = zip(q.split(counts), k.split(counts), v.split(counts), strict=True)
        return torch.cat([way(a, b, c, scale) for a, b, c in parts])

    lines = (
        "if {counts} is None or not {causal}: {o0}, = {kernel}(({i0}, {i1}, {i2}, {i3}, {i4}))",
        f"else: {{o0}} = {{all_of}}({{i0}}.view({(tokens, heads, size)}), {{i1}}.view({(tokens, kv_heads, size)}), "
        f"{{i2}}.view({(tokens, kv_heads, size)}), {{counts}}).reshape({(tokens, heads * size)})",
    )
    kept = {
        "counts": Derived(name=f"lengths_of_{tokens}", make=lengths_of, inputs=(4,)),
        "causal": Derived(name="is_causal", make=is_causal, inputs=(3,)),
    }
    return Found(step=coded(step, Code(lines=lines, names={"kernel": kernel, "all_of": all_of}, derived=kept)))


def whole(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[T, N, D] x [T, Nk, D] -> [T, N, D]"""
    gqa = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)[0].transpose(0, 1)


def in_pieces(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The fused kernel computes up to 512 keys past the diagonal and hides them; a piece reads only what it sees."""
    if q.shape[0] <= PIECE:
        return whole(q, k, v, scale)
    gqa = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    hidden = torch.full((PIECE, PIECE), float("-inf"), dtype=q.dtype).triu_(1)
    parts = []
    for start in range(0, q.shape[2], PIECE):
        rows = q[:, :, start : start + PIECE]
        count = rows.shape[2]
        mask = torch.nn.functional.pad(hidden[:count, :count], (start, 0))
        keys, values = k[:, :, : start + count], v[:, :, : start + count]
        parts.append(scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale, enable_gqa=gqa))
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


PIECE = 128
PREFILL_WAYS: Mapping[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {"whole": whole, "pieces": in_pieces}


def prefill_way(dtype: str, heads: int, kv_heads: int, size: int, tokens: int) -> str:
    """ "kernel" (widened), or a key of `PREFILL_WAYS`."""
    tokens, groups = class_of(tokens, (16, 64, 256, 512)), heads // kv_heads

    def prepare() -> dict[str, Callable[[], object]]:
        q, k, v = (
            torch.linspace(-1, 1, tokens * n * size).to(TORCH_DTYPE[dtype]).view(tokens, n, size)
            for n in (groups, 1, 1)
        )
        ways: dict[str, Callable[[], object]] = {name: partial(way, q, k, v, 0.1) for name, way in PREFILL_WAYS.items()}
        return {**ways, "kernel": lambda: attend(q, k, v, scale=0.1, chip="host", causal=True)}

    return CHOICES.pick(f"prefill attention {dtype} {tokens}x{groups}x{size}", [*PREFILL_WAYS, "kernel"], prepare)


def beyond(counts: Sequence[int]) -> Tensor:
    """[B, longest]: the positions that a sequence does not have."""
    return torch.arange(max(counts)) >= torch.tensor(counts)[:, None]


def own_rows(index: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows [B, longest] -> [B * longest]. Padding may point at rows never written, which may hold NaN: it reads the
    sequence's first row instead."""
    return torch.where(beyond(counts), index[:, :1], index).flatten()


def padding(counts: Sequence[int], dtype: str) -> Tensor | None:
    """[B, 1, 1, longest]: -inf beyond the end of each sequence; None where all are equally long."""
    if min(counts) == max(counts):
        return None
    bias = torch.zeros(len(counts), 1, 1, max(counts), dtype=TORCH_DTYPE[dtype])
    return bias.masked_fill_(beyond(counts)[:, None, None], float("-inf"))


Fusion = Callable[[Sequence[Step]], Found | None]
FUSIONS: Sequence[Fusion] = (
    linear_then_prenorm,
    linear_then_swiglu,
    split_then_rope,
    fast_linear,
    fast_rms_norm,
    fast_swiglu,
    fast_rope,
    fast_reshape_and_cache,
    fast_paged_attention,
    fast_flash_decode,
    fast_prefill_attention,
)
