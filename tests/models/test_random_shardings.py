"""Random graphs with random weight splits: a clear refusal, or the numbers of the model at every world size."""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import evaluate, random_weights
from safetensors.torch import save_file
from torch import Tensor

from llmc.compiler import artifact
from llmc.compiler.compiled import Compiled
from llmc.compiler.diagnostics import DiagnosticError
from llmc.compiler.ir import Graph
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.runtime import hostatb
from llmc.runtime.executor import Executor
from llmc.runtime.hostatb.collective import run_ranks
from llmc.runtime.weights import load_weights

WIDTHS = (24, 40)  # RmsNorm wants multiples of 8; world 3 and world 4 leave rests of 40
ODD = (17, 31, 45)  # of values that no norm reads
# Sizes of packed parts, and heads of each: none, as many, groups that ranks share, no groups.
PARTS = (
    ((24, 24), ()), ((40, 40), ()), ((17, 31), ()), ((24, 24, 24), ()), ((24, 24), (6, 6)), ((40, 40), (5, 5)),
    ((24, 8), (6, 2)), ((24, 8, 8), (3, 1, 1)), ((40, 8), (5, 1)), ((24, 40), (3, 5)),
)  # fmt: skip
TOKENS = 7
WORLDS = (2, 3, 4)
FUSIONS = ("swiglu", "add_norm", "linear_all_reduce")


@st.composite
def graphs(draw) -> str:
    """YAML of a graph over a few widths. Weights are split by chance, but a row split mostly reads what is likely to be
    split, and sums mostly add what lies alike, so that most graphs have a meaning."""
    nodes: dict[str, dict] = {}
    widths: dict[str, int] = {}  # value -> width
    letters: dict[str, str] = {}  # value -> how it is likely to lie
    used: set[str] = set()

    def put(size: int, letter: str, **node) -> str:
        name = f"n{len(nodes)}"
        used.update(value for key, value in node.items() if key in ("x", "a", "b"))
        nodes[name] = node
        widths[name], letters[name] = size, letter
        return name

    def pick(width: int | None = None, like: str = "RSP") -> str:
        """A value of that width, where possible one that lies like one of the letters."""
        fitting = [name for name, w in widths.items() if width in (None, w)]
        return draw(st.sampled_from([name for name in fitting if letters[name] in like] or fitting))

    def linear(x: str, width: int, tp: str = "") -> str:
        number = len(nodes)
        usual = ["row"] * 3 if letters[x] == "S" else ["column", "vocab"]
        tp = tp or draw(st.sampled_from([*usual, "row", "column", "replicate"]))
        bias = {"bias": f"b{number}"} if draw(st.booleans()) else {}
        whole = widths[x] if tp == "row" else width
        heads = draw(st.sampled_from([None, None, None, None, *(n for n in (3, 5, 8) if whole % n == 0)]))
        said = {"heads": heads} if heads and tp != "replicate" else {}
        letter = {"row": "P", "replicate": "R"}.get(tp, "S")
        return put(width, letter, op="linear", x=x, out=width, weight=f"w{number}", tp=tp, **bias, **said)

    def packed(x: str) -> str:
        """Several parts in one matmul, each with its tensor or all in one; then what gate and up are for."""
        number, tp = len(nodes), draw(st.sampled_from(["column", "column", "column", "replicate"]))
        sizes, heads = draw(st.sampled_from(PARTS))
        parts: dict[str, dict] = {name: {"out": size} for name, size in zip("abc", sizes, strict=False)}
        for part, count in zip(parts.values(), heads, strict=False):
            part["heads"] = count
        node: dict = {"op": "linear", "x": x, "tp": tp, "parts": parts}
        biased = draw(st.booleans())
        if draw(st.booleans()):
            node |= {"weight": f"w{number}", **({"bias": f"b{number}"} if biased else {})}
            if len(set(sizes)) == 1 and draw(st.booleans()):
                node["groups"] = 4
        else:
            for name, part in parts.items():
                part |= {"weight": f"w{number}{name}", **({"bias": f"b{number}{name}"} if biased else {})}
        letter = "S" if tp == "column" else "R"
        name = put(0, letter, **node)
        del widths[name]
        first, *others = values = [f"{name}.{part}" for part in parts]
        widths.update(zip(values, sizes, strict=True))
        letters.update(dict.fromkeys(values, letter))
        if len(set(heads)) > 1:  # kv heads may lie on several ranks: no row split reads them, and nothing gathers them
            letters[others[-1]] = draw(st.sampled_from("RS"))
        result = put(sizes[0], letter, op="silu", x=first)
        for other in others:
            if widths[other] == widths[result]:
                a, b = draw(st.permutations([result, other]))
                result = put(widths[result], letter, op="mul", a=a, b=b)
        return result

    def norm(x: str) -> str:
        x = x if widths[x] in WIDTHS else linear(x, WIDTHS[0])
        eps = draw(st.sampled_from([1e-5, 1e-6]))
        return put(widths[x], "R", op="rms_norm", x=x, eps=eps, weight=f"w{len(nodes)}")

    def binary(op: str, a: str) -> str:
        b = pick(widths[a], like=letters[a])
        return put(widths[a], letters[a] if letters[a] == letters[b] else "R", op=op, a=a, b=b)

    def column_row() -> str:
        wide = linear(pick(like="RP"), draw(st.sampled_from((*WIDTHS, *ODD))), "column")
        if draw(st.booleans()):
            wide = put(widths[wide], "S", op="silu", x=wide)
        return linear(wide, draw(st.sampled_from(WIDTHS)), "row")

    table = {"op": "embedding", "ids": "token_ids", "rows": 11, "width": 24, "weight": "e"}
    tp = draw(st.sampled_from(["replicate", "hidden"]))
    put(24, "S" if tp == "hidden" else "R", **table, tp=tp)
    kinds = ["column, row", "two sums", "silu of sums", "linear", "packed", "packed", "norm", "add", "mul", "silu",
             "add, norm"]  # fmt: skip
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=8)):
        if kind == "column, row":
            column_row()
        elif kind == "two sums":
            one = column_row()
            put(widths[one], "P", op="add", a=one, b=linear(pick(like="S"), widths[one], "row"))
        elif kind == "silu of sums":
            sums = column_row()
            put(widths[sums], "R", op="silu", x=sums)
        elif kind == "linear":
            linear(pick(), draw(st.sampled_from((*WIDTHS, *ODD))))
        elif kind == "packed":
            packed(pick(like="RP"))
        elif kind == "norm":
            norm(pick())
        elif kind == "silu":
            x = pick()
            put(widths[x], letters[x], op="silu", x=x)
        else:
            total = binary("mul" if kind == "mul" else "add", pick())
            if kind == "add, norm":
                norm(total)
    loose = [name for name in widths if name not in used]
    result = loose[0] if widths[loose[0]] == 24 else linear(loose[0], 24)
    for name in loose[1:]:
        result = put(24, "R", op="add", a=result, b=name if widths[name] == 24 else linear(name, 24))
    if draw(st.booleans()):
        nodes["last"] = {"op": "last_token", "x": result}
        result = "last"
    model = {
        "name": "random",
        "inputs": ["token_ids"],
        "dtype": "float32",
        "sizes": {"max_positions": 64},
        "graph": nodes,
        "outputs": {"logits": result},
    }
    return yaml.safe_dump(model, sort_keys=False)


def compiled(text: str, world_size: int, folder: Path, until: str = "") -> Compiled:
    path = folder / "random.yaml"
    path.write_text(text)
    options = Options(device="host", dtype="float32", fusions=FUSIONS, world_size=world_size)
    return compile_model(str(path), options, until=until)


def save_checkpoint(graph: Graph, weights: dict[str, Tensor], folder: Path) -> None:
    """The tensors that the author named, put together from the values of the graph's weights."""
    tensors: dict[str, Tensor] = {}
    for name, weight in graph.weights.items():
        rows = weights[name].float()
        for source in weight.sources:
            tensor = tensors.setdefault(source.tensor, torch.zeros(source.shape))
            take = source.rows
            taken = tensor if take is None else tensor.view(take.groups, take.stride, *tensor.shape[1:])
            if take is not None:
                taken = taken[:, take.offset : take.offset + take.size]
            count = source.shape[0] if take is None else take.groups * take.size
            taken.copy_(rows[:count].view(taken.shape))
            rows = rows[count:]
    save_file(tensors, folder / "model.safetensors")


def logits(text: str, world_size: int, folder: Path) -> list[Tensor]:
    """What each rank gives for the same tokens, weights from the checkpoint in the folder."""
    out = folder / f"world-{world_size}"
    artifact.write(compiled(text, world_size, folder), out)
    found = artifact.read(out)
    manifest = found.manifest
    inputs = {"token_ids": torch.arange(TOKENS) % 11, "last_rows": torch.tensor([TOKENS - 1])}

    def run(rank: int) -> Tensor:
        weights = load_weights(manifest["weights"], folder, splits=manifest["splits"], rank=rank, progress=False)
        executor = Executor(found, hostatb, weights=weights, constants={}, caches={}, rank=rank)
        return executor.run("prefill", inputs)

    return run_ranks([partial(run, rank) for rank in range(world_size)])


@settings(max_examples=150, deadline=None)
@given(world_size=st.sampled_from(WORLDS), text=graphs(), seed=st.integers(0, 2**16))
def test_a_random_sharding_is_refused_with_place_and_reason_or_gives_equal_numbers(world_size, text, seed):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            compiled(text, world_size, folder)
        except DiagnosticError as error:
            compiled(text, 1, folder)  # what has a meaning for one rank is refused for its sharding only
            *problems, closing = error.diagnostics
            assert problems
            assert closing.needed.startswith("world size 1")  # the sizes that are possible, none of them this one
            assert str(world_size) not in closing.needed.split(", ")
            for problem in problems:
                assert problem.code == "E303"
                assert problem.place is not None
                assert problem.place.file.endswith("random.yaml")
                assert problem.found
                assert problem.needed or problem.likely
            return
        built = compiled(text, 1, folder, until="build").graph
        weights = random_weights(built, seed)
        save_checkpoint(built, weights, folder)
        expected = evaluate(built, {"token_ids": torch.arange(TOKENS) % 11}, weights)["logits"]
        scale = max(1.0, expected.abs().max().item())
        for actual in logits(text, world_size, folder):
            torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=0, atol=2e-5)


def test_the_random_shardings_reach_every_kind_of_answer():
    """The strategy is worth its name only if most graphs are accepted, some are refused, and every letter occurs."""
    seen: Counter[str] = Counter()

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(text=graphs())
    def collect(text):
        with tempfile.TemporaryDirectory() as name:
            try:
                result = compiled(text, 3, Path(name))
            except DiagnosticError:
                seen["refused"] += 1
                return
        seen["accepted"] += 1
        letters = {str(t.shard) for t in result.graph.types.values()}
        lies = {str(w.type.shard) for w in result.graph.weights.values()}
        uneven = {"uneven" for w in result.graph.weights.values() for s in w.type.shard.splits if s.size % 3}
        ops = {node.op for phase in result.lowered.values() for node in phase.nodes}
        seen.update({*letters, *(f"weight {letter}" for letter in lies), *uneven, *ops})
        graph = result.graph
        for node in graph.nodes:
            if node.op == "add" and graph.types[node.value()].shard.letter == "P":
                seen["sum of partial sums"] += 1

    collect()
    assert seen["accepted"] >= 75
    assert seen["refused"] >= 10
    wanted = {"R", "S(1)", "P", "weight S(0)", "weight S(1)", "weight P", "uneven", "AllReduce", "AllGather",
              "sum of partial sums"}  # fmt: skip
    assert {kind for kind in wanted if seen[kind] >= 5} == wanted
