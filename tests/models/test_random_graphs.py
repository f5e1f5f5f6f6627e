"""Random legal graphs keep their numbers through every pass, down to the generated code on hostatb."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import evaluate, random_weights

from llmc.compiler import artifact
from llmc.compiler.options import Options
from llmc.compiler.pipeline import PASS_NAMES, compile_model
from llmc.runtime import hostatb
from llmc.runtime.executor import Executor

WIDTHS = (32, 64)
TOKENS = 7
PASSES_OVER_MODELS = [name for name in PASS_NAMES if name not in ("lower", "segment")]


@st.composite
def graphs(draw) -> str:
    """YAML of a graph over two widths, rich in what the fusions look for: gated products, sums before norms."""
    nodes: dict[str, dict] = {"embed": {"op": "embedding", "ids": "token_ids", "rows": 11, "width": 32, "weight": "e"}}
    widths = {"embed": 32}
    used: set[str] = set()

    def put(width: int, **node) -> str:
        name = f"n{len(nodes)}"
        used.update(value for key, value in node.items() if key in ("x", "a", "b"))
        nodes[name] = node
        widths[name] = width
        return name

    def pick(width: int | None = None) -> str:
        return draw(st.sampled_from([name for name, w in widths.items() if width in (None, w)]))

    def linear(x: str, width: int) -> str:
        bias = {"bias": f"b{len(nodes)}"} if draw(st.booleans()) else {}
        return put(width, op="linear", x=x, out=width, weight=f"w{len(nodes)}", **bias)

    def norm(x: str) -> str:
        return put(widths[x], op="rms_norm", x=x, eps=draw(st.sampled_from([1e-5, 1e-6])), weight=f"w{len(nodes)}")

    def gated(x: str) -> str:
        parts = {"gate": {"out": 32, "weight": f"g{len(nodes)}"}, "up": {"out": 32, "weight": f"u{len(nodes)}"}}
        packed = put(0, op="linear", x=x, parts=parts)
        del widths[packed]
        act = put(32, op="silu", x=f"{packed}.gate")
        if draw(st.booleans()):
            return put(32, op="mul", a=act, b=f"{packed}.up")
        return put(32, op="mul", a=f"{packed}.up", b=act)

    for kind in draw(st.lists(st.sampled_from(["linear", "norm", "gated", "add", "mul", "add_norm"]), max_size=12)):
        if kind == "linear":
            linear(pick(), draw(st.sampled_from(WIDTHS)))
        elif kind == "norm":
            norm(pick())
        elif kind == "gated":
            gated(pick())
        else:
            a = pick()
            total = put(widths[a], op="mul" if kind == "mul" else "add", a=a, b=pick(widths[a]))
            if kind == "add_norm":
                norm(total)
    loose = [name for name in widths if name not in used]
    result = loose[0] if widths[loose[0]] == 32 else linear(loose[0], 32)
    for name in loose[1:]:
        result = put(32, op="add", a=result, b=name if widths[name] == 32 else linear(name, 32))
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


@settings(max_examples=60, deadline=None)
@given(text=graphs(), seed=st.integers(0, 2**16))
def test_a_random_graph_keeps_its_numbers_through_every_pass(text, seed):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "random.yaml")
        path.write_text(text)
        options = Options(device="host", dtype="float32", fusions=("swiglu", "add_norm"))
        built = compile_model(str(path), options, until="build").graph
        weights = random_weights(built, seed)
        ids = torch.arange(TOKENS) % 11
        expected = evaluate(built, {"token_ids": ids}, weights)["logits"]

        for step in PASSES_OVER_MODELS:
            result = compile_model(str(path), options, until=step).phases
            graph = result.get("model", result.get("prefill"))
            torch.testing.assert_close(
                evaluate(graph, {"token_ids": ids}, weights)["logits"], expected, rtol=1e-12, atol=1e-12, msg=step
            )

        out = Path(name, "out")
        artifact.write(compile_model(str(path), options), out)
        found = artifact.read(out)
        executor = Executor(found, hostatb, weights={n: w.float() for n, w in weights.items()}, constants={}, caches={})
        inputs = {"token_ids": ids, "last_rows": torch.tensor([TOKENS - 1])}
        actual = executor.run("prefill", inputs)
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=0, atol=2e-5)


def test_the_random_graphs_reach_both_fusions():
    """The strategy is worth its name only if fused operators occur."""
    seen: set[str] = set()

    @settings(max_examples=60, deadline=None, database=None)
    @given(text=graphs())
    def collect(text):
        with tempfile.TemporaryDirectory() as name:
            path = Path(name, "random.yaml")
            path.write_text(text)
            options = Options(device="host", dtype="float32", fusions=("swiglu", "add_norm"))
            seen.update(node.op for node in compile_model(str(path), options, until="add_norm").phases["prefill"].nodes)

    collect()
    assert {"swiglu", "add_rms_norm"} <= seen
