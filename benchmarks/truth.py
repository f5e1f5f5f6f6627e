"""What is true of this checkout, measured: every proof and every figure in one Markdown report with pictures.

    python benchmarks/truth.py --out report [--model-path DIR [--graph YAML]] [--text FILE] [--only eval trace ...]

Runs the whole test suite, the whole proof that ranks are equal, the vendor's operation tables, `llmc eval`, `llmc
trace` and `llmc bench --profile` on a real model (SmolLM2-135M by default), and the other benchmarks; about an hour on
two cores. A step that fails is a row of the report, and the exit code is 1. The text is by default the help of Python's
own language reference (`pydoc_data.topics`): prose that every Python has, of which the first TEXT_BYTES are read.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import pydoc_data.topics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
LLMC = (sys.executable, "-m", "llmc.compiler.cli")
DTYPES = ("float32", "bfloat16", "float16")
PROMPT_WORDS = 24  # of the text, for `llmc trace`
TEXT_BYTES = 100_000  # some 24,000 tokens of SmolLM2
TAIL, WIDTH = 15, 400  # of a failed step's output, lines and characters of a line that the report shows


@dataclass
class Report:
    """The page as it grows. `rows`: a step, whether it passed, its seconds and a word on it."""

    out: Path
    rows: list[tuple[str, bool, float, str]] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)

    def step(self, title: str, command: Sequence[str]) -> str:
        """Run it; its stdout."""
        say(title)
        started = time.perf_counter()
        done = subprocess.run([*command], cwd=ROOT, capture_output=True, text=True)
        lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
        word = "" if done.stdout.startswith("{") else (lines or [""])[-1].strip()
        self.rows.append((title, done.returncode == 0, time.perf_counter() - started, word))
        if done.returncode:
            last = [*done.stdout.splitlines()[-TAIL:], *done.stderr.splitlines()[-TAIL:]]
            tail = "\n".join(line[:WIDTH] for line in last)
            self.sections.append(f"## Failed: {title}\n\n```\n$ {' '.join(command)}\n{tail}\n```\n")
        return done.stdout

    def facts(self, title: str, command: Sequence[str]) -> dict[str, Any] | None:
        """Of a command with --json: what it found, also where it found that something is not well; None where it could
        not look."""
        text = self.step(title, [*LLMC, *command, "--json"])
        found = json.loads(text) if text.startswith("{") else {"problems": text}
        return None if "problems" in found else found

    def section(self, title: str, text: str, picture: str = "") -> None:
        shown = f"\n![{title}]({picture})\n" if picture else ""
        self.sections.append(f"## {title}\n{shown}\n{text}\n")

    def write(self) -> Path:
        head = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {commit()}"
        steps = table(
            ["step", "", "time", "said"],
            [[title, "ok" if ok else "**failed**", f"{s:.0f} s", word] for title, ok, s, word in self.rows],
        )
        path = self.out / "report.md"
        path.write_text("\n".join([f"# Measured truth\n\n{head}\n\n{steps}\n", *self.sections]), encoding="utf-8")
        return path


def model(asked: argparse.Namespace, dtype: str) -> list[str]:
    """Flags of the model that all parts look at."""
    graph = ["--graph", asked.graph] if asked.graph else []
    return ["--model-path", str(asked.model_path), *graph, "--dtype", dtype, "--quiet"]


def say(text: str) -> None:
    Console(stderr=True).print(text)


def commit() -> str:
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "no commit"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def plot(path: Path, title: str, draw: Callable[[Any], None], *, height: float = 4.0) -> str:
    """A picture beside the report; its name."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as pyplot

    figure, axes = pyplot.subplots(figsize=(9, height), layout="constrained")
    axes.set_title(title)
    draw(axes)
    figure.savefig(path)
    pyplot.close(figure)
    return path.name


# ---- the parts


def tests(report: Report, asked: argparse.Namespace) -> None:
    report.step("the test suite", [sys.executable, "-m", "pytest"])


def ranks(report: Report, asked: argparse.Namespace) -> None:
    report.step("ranks are equal", [sys.executable, "tests/models/equal_ranks.py"])


def conformance(report: Report, asked: argparse.Namespace) -> None:
    text = report.step("the vendor's operation tables", [sys.executable, "tests/conformance/vendor_cases.py"])
    if text:
        report.section("Operation tables", f"```\n{text.strip()}\n```")


def quality(report: Report, asked: argparse.Namespace) -> None:
    """Perplexity against bytes. A kind of numbers is a row: dtypes, and quantisations as they come."""
    rows, points = [], []
    for dtype in DTYPES:
        words = [*model(asked, dtype), "--text", str(asked.text)]
        if (found := report.facts(f"perplexity in {dtype}", ["eval", *words])) is None:
            continue
        size = weight_bytes(asked.model_path, dtype)
        points.append((size / 1e6, found["perplexity"], dtype))
        rows.append([dtype, f"{size / 1e6:.0f} MB", f"{found['perplexity']:.4f}", f"{found['bits_per_byte']:.4f}"])
    if not rows:
        return

    def draw(axes: Any) -> None:
        for size, perplexity, dtype in points:
            axes.plot(size, perplexity, "o", label=dtype)
        axes.set(xlabel="MB of weights", ylabel="perplexity")
        axes.legend()

    picture = plot(asked.out / "quality.svg", "Quality against bytes", draw)
    report.section("Quality against bytes", table(["kind", "weights", "perplexity", "bits per byte"], rows), picture)


def weight_bytes(model_path: Path, dtype: str) -> int:
    """Of all weights in this dtype, from the shapes in the headers."""
    from safetensors import safe_open

    count = 0
    for path in model_path.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                count += math.prod(file.get_slice(name).get_shape())
    return count * (4 if dtype == "float32" else 2)


def errors(report: Report, asked: argparse.Namespace) -> None:
    """How far each value is from transformers, along the layers."""
    found, prompt = {}, " ".join(asked.text.read_text(encoding="utf-8").split()[:PROMPT_WORDS])
    for dtype in DTYPES:
        words = [*model(asked, dtype), "--input-text", prompt]
        if (facts := report.facts(f"value by value in {dtype}", ["trace", *words])) is not None:
            found[dtype] = facts
    if not found:
        return

    def draw(axes: Any) -> None:
        for dtype, facts in found.items():
            nodes = [node for node in facts["nodes"] if node["phase"] == "prefill"]
            (line,) = axes.semilogy([max(n["relative"], 1e-9) for n in nodes], label=f"{dtype}, ours")
            natural = [max(n["natural"] or 0, 1e-9) for n in nodes]
            axes.semilogy(natural, ":", color=line.get_color(), label=f"{dtype}, transformers")
        axes.set(xlabel="values of the graph, in order", ylabel="relative error")
        axes.legend()

    rows = [
        [
            dtype,
            len(facts["nodes"]),
            f"{max(n['relative'] for n in facts['nodes']):.2e}",
            (facts.get("first") or {}).get("node") or "none",
        ]
        for dtype, facts in found.items()
    ]
    picture = plot(asked.out / "errors.svg", "Error along the layers", draw)
    head = ["dtype", "values compared", "largest relative error", "first outside its budget"]
    report.section("Error by layer", table(head, rows), picture)


def times(report: Report, asked: argparse.Namespace) -> None:
    """Where the time of a decode step goes, and how long steps take."""
    words = [*model(asked, "bfloat16"), "--cases", "[[128,32]]", "--batch", "1,8"]
    facts = report.facts("time by operation", ["bench", *words, "--profile", "--profile-threads", "1"])
    if facts is None:
        return
    report.section("Time of steps", table(facts["columns"], [[short(c) for c in row] for row in facts["rows"]]))
    for profile in facts["profiles"]:
        (phase,) = (phase for phase in profile["phases"] if phase["phase"] == "decode")
        kinds = sorted(phase["kinds"], key=lambda kind: kind["ms"])

        def draw(axes: Any, kinds: Sequence[Mapping[str, Any]] = kinds) -> None:
            names = [kind["kind"] for kind in kinds]
            axes.barh(names, [kind["ms"] for kind in kinds], label="measured")
            axes.barh(names, [kind["best_ms"] for kind in kinds], height=0.3, label="best by bytes and FLOPs")
            axes.set(xlabel="ms of a decode step")
            axes.legend()

        batch = profile["batch"]
        title = f"Time by kind, decode at batch {batch}"
        picture = plot(asked.out / f"times-{batch}.svg", title, draw)
        rows = [[k["kind"], k["count"], f"{k['ms']:.2f}", f"{k['best_ms']:.2f}"] for k in reversed(kinds)]
        report.section(title, table(["kind", "operations", "ms", "best ms"], rows), picture)


def short(cell: Any) -> Any:
    return f"{cell:.2f}" if isinstance(cell, float) else cell


def benchmarks(report: Report, asked: argparse.Namespace) -> None:
    for name in ("generation", "compile_time", "loading"):
        text = report.step(f"benchmarks/{name}.py", [sys.executable, f"benchmarks/{name}.py"])
        if text:
            report.section(f"benchmarks/{name}.py", f"```\n{text.strip()}\n```")


PARTS: Mapping[str, Callable[[Report, argparse.Namespace], None]] = {
    "tests": tests,
    "ranks": ranks,
    "conformance": conformance,
    "eval": quality,
    "trace": errors,
    "bench": times,
    "benchmarks": benchmarks,
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("report"))
    parser.add_argument("--model-path", type=Path, help="(default: SmolLM2-135M, from its wheel)")
    parser.add_argument("--graph", help="its YAML (default: found from config.json)")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS])
    asked = parser.parse_args(words)
    if not importlib.util.find_spec("matplotlib"):
        parser.error("the pictures need matplotlib: pip install 'llmc[report]'")
    asked.out = asked.out.resolve()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.model_path is None:
        from llmc.runtime.demo import demo_weights

        asked.model_path = demo_weights()
    asked.model_path = asked.model_path.resolve()
    if asked.text is None:
        asked.text = asked.out / "text.txt"
        asked.text.write_text("\n\n".join(pydoc_data.topics.topics.values())[:TEXT_BYTES], encoding="utf-8")
    asked.text = asked.text.resolve()
    report = Report(asked.out)
    for part in asked.only:
        PARTS[part](report, asked)
    path = report.write()
    failed = sum(not ok for _, ok, _, _ in report.rows)
    took = sum(seconds for _, _, seconds, _ in report.rows)
    print(f"{path}: {len(report.rows)} steps in {took:.0f} s, {failed or 'none'} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
