"""`llmc bench --profile`: times by operation and kind on a host, and kernels of an NPU's profiler (in its form)."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest

from llmc.compiler.cli import main
from llmc.compiler.diagnostics import UserError
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.compiler.reports.roofline import step_facts
from llmc.compiler.target.device import Board
from llmc.runtime.measure import profile
from llmc.runtime.measure.profile import Kernel, Piece, Profile, Seen


def run(checkpoint: Path, *words: str) -> int:
    graph = [] if "--artifact" in words else ["--graph", str(checkpoint / "mine.yaml")]
    cases = ["--cases", "[[12,6]]", "--batch", "2", "--repeats", "2"]
    return main(["bench", "--model-path", str(checkpoint), *graph, "--dtype", "bfloat16", *cases, *words])


@pytest.fixture(scope="module")
def compiled(checkpoint):
    return compile_model(str(checkpoint / "mine.yaml"), Options(device="host", dtype="bfloat16"))


@pytest.fixture
def profiled(checkpoint, capsys):
    def go(*words: str):
        assert run(checkpoint, "--profile", *words, "--json") == 0
        return json.loads(capsys.readouterr().out)["profiles"]

    return go


def test_every_operation_has_a_time_its_place_and_what_plan_says_of_its_cost(profiled, compiled):
    (found,) = profiled()
    assert [one["phase"] for one in found["phases"]] == ["prefill", "decode"]
    for one, length in zip(found["phases"], (12, 12 + 3), strict=True):
        graph = compiled.lowered[one["phase"]]
        names = [name for entry in one["operations"] for name in entry["operations"]]
        assert names == [node.name for node in graph.nodes]
        plan = step_facts(compiled, one["phase"], 2, length, None, None)
        for key, wanted in (("flops", "flops"), ("bytes", "memory_bytes")):
            assert sum(entry[key] for entry in one["operations"]) == plan[wanted]
            assert sum(kind[key] for kind in one["kinds"]) == plan[wanted]
        for entry in one["operations"]:
            kinds = [node.op for node in graph.nodes if node.name in entry["operations"]]
            assert entry["kind"] == " + ".join(kinds)
            assert 0 < entry["us"]["min"] <= entry["us"]["p10"] <= entry["us"]["median"] <= entry["us"]["p90"]
        owned = {owner for entry in one["operations"] for owner in entry["nodes"]}
        assert owned >= {"embed", "layers.1.attn.qkv", "layers.0.mlp.down", "lm_head"}
        (qkv,) = [entry for entry in one["operations"] if "layers.1.attn.qkv" in entry["operations"]]
        assert qkv["places"][0].startswith("graphs/families/llama.yaml:")


def test_every_second_step_is_watched_and_its_operations_lie_one_behind_the_other_in_it(profiled, monkeypatch):
    kept, on_host = [], profile.on_host

    def keep(*args, **named):
        kept.append(on_host(*args, **named))
        return kept[-1]

    monkeypatch.setattr(profile, "on_host", keep)
    (found,) = profiled()
    (made,) = kept
    assert [step.phase for step in made.steps] == (["prefill"] + ["decode"] * 5) * 4
    first, second = ([bool(step.pieces) for step in made.steps[i : i + 6]] for i in (0, 6))
    assert first == [False, True] * 3
    assert second == [True, False] * 3
    for step in made.steps:
        assert sum(piece.ns for piece in step.pieces) <= step.ran <= step.ns
        for piece, following in zip(step.pieces, step.pieces[1:], strict=False):
            assert piece.start + piece.ns <= following.start
    for one in found["phases"]:
        watched = [step for step in made.steps if step.phase == one["phase"] and step.pieces]
        assert one["steps"] == len(watched)
        assert one["operations_ms"] == pytest.approx(median(sum(p.ns for p in s.pieces) for s in watched) / 1e6)
        assert one["clock"]["looks"] == len(one["operations"])
        assert one["clock"]["share"] == pytest.approx(one["clock"]["looks"] * one["clock"]["ns"] / one["step_ms"] / 1e6)
        assert sum(kind["count"] for kind in one["kinds"]) == len(one["operations"])


def test_tokens_are_the_same_while_somebody_watches(checkpoint, capsys, monkeypatch):
    """Watched and other steps take turns; the sampled tokens of both kinds of runs are compared."""
    from llmc.runtime.engine.engine import Engine

    made, generate = [], Engine.generate

    def kept(self, *args, **named):
        made.append([output.token_ids for output in generate(self, *args, **named)])
        return [SimpleNamespace(first_token_s=0.0)] * len(made[-1])

    monkeypatch.setattr(Engine, "generate", kept)
    assert run(checkpoint, "--profile", "--json") == 0
    capsys.readouterr()
    assert len(made[1:]) == 3 + 2 * 3
    assert all(tokens == made[1] for tokens in made[1:])


def test_an_artifact_is_profiled_by_the_graph_that_it_was_made_of(checkpoint, capsys, tmp_path, monkeypatch):
    target, yaml = tmp_path / "built", checkpoint / "mine.yaml"
    assert main(["compile", str(yaml), "--device", "host", "--dtype", "bfloat16", "-o", str(target)]) == 0
    capsys.readouterr()
    assert run(checkpoint, "--artifact", str(target), "--profile") == 1
    assert "--profile needs the graph of mine" in capsys.readouterr().err.replace("\n", " ")
    monkeypatch.chdir(checkpoint)  # where the YAML is that the artifact names
    assert run(checkpoint, "--artifact", str(target), "--profile") == 0
    assert "kind of operation" in capsys.readouterr().out


def test_threads_are_compared_by_kind(checkpoint, capsys):
    import torch

    before = torch.get_num_threads()
    assert run(checkpoint, "--profile-threads", "1,2") == 0
    said = capsys.readouterr().out
    assert "prefill, batch 2: from 1 to 2 threads" in said
    assert "ms with 1  ms with 2  faster" in said
    assert torch.get_num_threads() == before
    assert run(checkpoint, "--profile-threads", "1,1") == 1
    assert "--profile-threads 1,1: expected numbers of threads: 1,2" in capsys.readouterr().err


def phase_with(threads, **kinds):
    rows = [{"kind": kind, "fastest_ms": value} for kind, value in kinds.items()]
    return {"phase": "decode", "batch": 1, "threads": threads, "fastest_step_ms": sum(kinds.values()), "kinds": rows}


@pytest.mark.parametrize(
    ("threads", "last", "scales"), [(2, 5.0, True), (2, 8.0, False), (4, 5.0, True), (4, 6.0, False)]
)
def test_a_kind_that_gains_little_from_threads_is_told(threads, last, scales):
    facts = [phase_with(1, Linear=10.0, Gather=1.0), phase_with(threads, Linear=last)]
    linear, gather = profile.scaling(facts)
    assert linear["gain"] == 10 / last
    assert (linear["verdict"] == "") is scales
    assert (gather["ms"], gather["gain"], gather["verdict"]) == ([1.0, None], None, "")
    assert ("does not scale" in "\n".join(profile.show_scaling(facts))) is not scales


def test_the_roofline_is_of_each_operation_by_itself(compiled):
    names = [node.name for node in compiled.lowered["decode"].nodes]
    seen = [Seen(phase="decode", tokens=2, sequences=2, ns=10**6, ran=9 * 10**5,
                 pieces=[Piece(names=(name,), start=1000 * i, ns=1000) for i, name in enumerate(names)])]  # fmt: skip
    board = Board(memory=0, flops=1e12, bandwidth=1e11)
    found = profile.phase_facts(compiled, Profile(steps=seen, method=""), "decode", (12, 6), (board, None))
    plan = step_facts(compiled, "decode", 2, 15, board, None)
    assert sum(one["best_us"] for one in found["operations"]) == pytest.approx(plan["seconds"] * 1e6)
    assert (found["step_ms"], found["operations_ms"], found["around_ms"]) == (1.0, len(names) / 1e3, 0.1)
    text = "\n".join(profile.show_profile({**found, "threads": 2}, top=3))
    assert "decode, batch 2, prompt 12, answer 6, 2 threads: a step takes 1.000 ms" in text
    assert "layers.*.attn.qkv" in text
    assert text.splitlines()[-1].startswith("the other ")


def test_trace_events_are_what_perfetto_opens(checkpoint, tmp_path, capsys):
    """Trace Event Format: complete events have ph X, ts and dur in microseconds, pid and tid; in a thread they nest."""
    target = tmp_path / "trace.json"
    assert run(checkpoint, "--chrome", str(target)) == 0
    assert f"written: {target}" in capsys.readouterr().out.replace("\n", " ")
    events = json.loads(target.read_text())["traceEvents"]
    (process,) = [e for e in events if e["ph"] == "M"]
    assert process["args"]["name"].startswith("mine, batch 2, [12,6], ")
    complete = [e for e in events if e["ph"] == "X"]
    assert complete
    for event in complete:
        assert {type(event[key]) for key in ("ts", "dur")} == {float}
        assert event["ts"] >= 0
        assert (event["pid"], event["tid"]) == (1, 1)
    steps = [e for e in complete if e["cat"] == "step"]
    assert [e["name"] for e in steps] == ["prefill"] * 2 + ["decode"] * 8
    for event in complete:
        if event["cat"] != "step":
            assert event["args"]["operations"]
            inside = [s for s in steps if s["ts"] <= event["ts"] and event["ts"] + event["dur"] <= s["ts"] + s["dur"]]
            assert len(inside) == 1


# ---- an NPU's kernels


KERNELS = {  # as libatb names those of 910B (src/kernels)
    "Gather": ["Gather16I64Kernel"],
    "RmsNorm": ["RmsNormKernel"],
    "Linear": ["PpMatMulBf16Kernel"],
    "Split": ["SplitVF16Output3Kernel"],
    "Rope": ["AtbRopeKernel"],
    "ReshapeAndCache": ["ReshapeAndCacheNdKernel"],
    "PagedAttention": ["PagedAttentionMaskNdKernel"],
    "SelfAttention": ["UnpadFlashAttentionBF16NdKernel"],
    "Activation": ["SwiGluForwardKernel"],
}
SAMPLING = ["aclnnArgMax_ArgMaxV2_ArgMaxV2", "MemSet"]


def kernels_of(compiled, phases, sampling=True):
    """(step, name) in the order in which an NPU would run them, and what each belongs to."""
    for step, phase in enumerate(phases):
        for node in compiled.lowered[phase].nodes:
            for name in KERNELS[node.op]:
                yield step, name, node.name
        if sampling:
            for name in SAMPLING:
                yield step, name, None


def test_kernels_go_to_the_operations_whose_order_they_have(compiled):
    nodes = compiled.lowered["decode"].nodes
    found = list(kernels_of(compiled, ["decode"]))
    given = profile.aligned([name for _, name, _ in found], [node.op for node in nodes])
    assert [None if i is None else nodes[i].name for i in given] == [owner for *_, owner in found]


def test_an_operation_may_have_several_kernels_and_a_strange_one_moves_nothing(compiled):
    operations = ["Linear", "Linear", "Activation", "Linear", "RmsNorm"]
    product = "PpMatMulF16Kernel"
    kernels = ["TransdataNdToNzKernel", product, "SwishF16Kernel", "MulF16Kernel", "Strange", product, "RmsNormKernel"]
    assert profile.aligned(kernels, operations) == [0, 1, 2, 2, None, 3, 4]


@pytest.mark.parametrize("counted", [True, False], ids=["with step ids", "without"])
def test_a_profile_of_an_npu_has_the_times_of_its_kernels(compiled, counted):
    phases = ["prefill", "decode", "decode"]
    listed = list(kernels_of(compiled, phases))
    kernels = [
        Kernel(step=step + 5 if counted else None, name=name, start=100_000 * i, ns=1000 + i)
        for i, (step, name, _) in enumerate(listed)
    ]
    steps = [
        SimpleNamespace(phase=p, tokens_in=t, tokens_out=2, seconds=0.5)
        for p, t in zip(phases, (24, 2, 2), strict=True)
    ]
    made = profile.npu_profile(compiled, steps, kernels)
    wanted = [[(owner, 1000 + i) for i, (s, _, owner) in enumerate(listed) if owner and s == step] for step in range(3)]
    assert [[(piece.names[0], piece.ns) for piece in step.pieces] for step in made.steps] == wanted
    count = sum(map(len, wanted))
    assert made.mapped == {
        "kernels": count + 3 * len(SAMPLING), "fit": count, "operations": count, "with_kernels": count
    }  # fmt: skip
    facts = profile.phase_facts(compiled, made, "decode", (12, 6), (None, None))
    assert facts["steps"] == 2
    text = "\n".join(profile.show_profile(facts, 5))
    assert f"{count} of {count + 6} kernels fit an operation" in text
    assert "looks at the clock" not in text


CSV = """Step Id,Device_id,Name,Type,Accelerator Core,Start Time(us),Duration(us),Wait Time(us),Block Dim
1,0,RmsNormKernel,RmsNormKernel,AI_VECTOR_CORE,"1764060000000002.250\t",3.5,0,40
1,0,PpMatMulF16Kernel,PpMatMulF16Kernel,AI_CORE,"1764060000000001.000\t",12.04,0,20
"""


def test_the_profilers_file_is_read_in_order_of_time(tmp_path):
    folder = tmp_path / "host_1_2_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="wrote no kernel_details"):
        profile.read_kernels(tmp_path)
    (folder / "kernel_details.csv").write_text(CSV, encoding="utf-8-sig")
    found = profile.read_kernels(tmp_path)
    assert [(kernel.step, kernel.name, kernel.ns) for kernel in found] == [
        (1, "PpMatMulF16Kernel", 12040), (1, "RmsNormKernel", 3500)
    ]  # fmt: skip
    (folder / "kernel_details.csv").write_text("Name,Duration\nx,1\n")
    with pytest.raises(UserError, match="a row that is not understood"):
        profile.read_kernels(tmp_path)


def test_torch_npus_profiler_is_asked_as_its_documentation_says(tmp_path, compiled, monkeypatch):
    """A stand-in module that records calls and writes the file as the real one does when it is left."""
    calls = []

    class Profiler:
        ProfilerLevel = SimpleNamespace(Level1="level1")
        AiCMetrics = SimpleNamespace(PipeUtilization="pipes")
        ProfilerActivity = SimpleNamespace(CPU="cpu", NPU="npu")

        @staticmethod
        def _ExperimentalConfig(**settings):
            calls.append(("config", settings))
            return settings

        @staticmethod
        def schedule(**settings):
            calls.append(("schedule", settings))
            return settings

        @staticmethod
        def tensorboard_trace_handler(folder):
            return folder

        class profile:
            def __init__(self, *, activities, schedule, on_trace_ready, experimental_config):
                calls.append(("profile", activities))
                self.folder = Path(on_trace_ready)

            def __enter__(self):
                return self

            def step(self):
                calls.append(("step", None))

            def __exit__(self, *error):
                folder = self.folder / "host_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
                folder.mkdir(parents=True)
                rows = "".join(
                    f"{step},{name},{i}.0,2.5\n"
                    for i, (step, name, _) in enumerate(kernels_of(compiled, ["prefill", "decode"]))
                )
                (folder / "kernel_details.csv").write_text(f"Step Id,Name,Start Time(us),Duration(us)\n{rows}")

    class Engine:
        def generate(self, prompts, params, on_step):
            on_step(SimpleNamespace(phase="prefill", tokens_in=24, tokens_out=2, seconds=0.1))
            on_step(SimpleNamespace(phase="decode", tokens_in=2, tokens_out=2, seconds=0.1))

    from llmc.runtime import npu

    monkeypatch.setattr(npu, "_module", lambda name: SimpleNamespace(profiler=Profiler))
    monkeypatch.setattr(npu, "synchronize", lambda: calls.append(("synchronize", None)))
    made = profile.on_npu(Engine(), compiled, [[0] * 12] * 2, SimpleNamespace(max_tokens=2))
    settings = {"profiler_level": "level1", "aic_metrics": "pipes", "l2_cache": False}
    assert calls[0] == ("config", settings)
    assert ("profile", ["cpu", "npu"]) in calls
    assert calls[-4:] == [("synchronize", None), ("step", None)] * 2
    assert [len(step.pieces) for step in made.steps] == [len(compiled.lowered[p].nodes) for p in ("prefill", "decode")]
