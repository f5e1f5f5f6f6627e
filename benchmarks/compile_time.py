"""Wall time of `llmc compile`, process start included, beside what importing torch alone costs.

python benchmarks/compile_time.py [--rounds 5] [MODEL ...]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence


def seconds(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["llama2-7b", "llama2-70b"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            f"llmc compile {model}": [
                sys.executable,
                "-m",
                "llmc.compiler.cli",
                "compile",
                model,
                "-o",
                f"{folder}/{model}",
            ]
            for model in args.models
        }
        commands["import torch"] = [sys.executable, "-c", "import torch"]
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(args.rounds + 1):  # interleaved; the first round warms the file cache and is dropped
            for name, command in commands.items():
                times[name].append(seconds(command))
    base = statistics.median(times["import torch"][1:])
    for name, found in times.items():
        median = statistics.median(found[1:])
        print(f"{name:<28} {median:6.3f} s   {median / base:5.2f} x import torch")


if __name__ == "__main__":
    main()
