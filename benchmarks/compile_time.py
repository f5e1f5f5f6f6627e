"""Wall and CPU time of `llmc compile`, process start included, beside what importing torch alone costs; and how little
of it grows with the number of layers: each model again with two layers only.

python benchmarks/compile_time.py [--rounds 5] [MODEL ...]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def seconds(command: Sequence[str]) -> tuple[float, float]:
    """Wall and CPU."""
    start, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["llama2-7b", "llama2-70b"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for model in args.models:
            two = Path(folder) / f"{model}-of-two-layers.yaml"
            two.write_text(f"extends: {model}\nname: two-layers\nsizes: {{layers: 2}}\n")
            models |= {model: model, f"{model}, 2 layers": str(two)}
        compile_ = [sys.executable, "-m", "llmc.compiler.cli", "compile"]
        commands = {name: [*compile_, path, "-o", f"{folder}/{name}"] for name, path in models.items()}
        commands["import torch"] = [sys.executable, "-c", "import torch"]
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(args.rounds + 1):  # interleaved; the first round warms the file cache and is dropped
            for name, command in commands.items():
                times[name].append(seconds(command))
    medians = {name: tuple(map(statistics.median, zip(*found[1:], strict=True))) for name, found in times.items()}
    for name, (wall, cpu) in medians.items():
        ratio = f"{wall / medians['import torch'][0]:5.2f} x import torch"
        two = medians.get(f"{name}, 2 layers")
        layers = f"   {cpu / two[1]:5.2f} x the CPU time of 2 layers" if two else ""
        print(f"{name:<24} {wall:6.3f} s   {cpu:6.3f} s CPU   {ratio}{layers}")


if __name__ == "__main__":
    main()
