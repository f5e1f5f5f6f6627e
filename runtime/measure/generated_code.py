"""Programs that a model has written, and the tests they must pass: each in a process of its own, with limits.

    passes("def add(a, b): return a + b", "assert add(2, 3) == 5")         # True
    pass_at(1, total=20, correct=5)                                        # 0.25

code_child.py is that process and says what its limits are. `CodeEval` stands in for the metric `code_eval` of the
library evaluate, which is a script that is downloaded: the same arguments, the same answer.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import comb
from pathlib import Path
from statistics import mean
from typing import Any

WAIT_SECONDS = 30.0  # the process's time on a processor is limited; this is for one that sleeps
CHILD = Path(__file__).with_name("code_child.py")


def passes(program: str, test: str) -> bool:
    """Whether the program with the test behind it comes to its end."""
    word = secrets.token_hex(16)
    request = json.dumps({"program": f"{program}\n{test}", "word": word}).encode()
    with tempfile.TemporaryDirectory(prefix="llmc-", ignore_cleanup_errors=True) as empty:
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=empty,
            env={},
            start_new_session=True,  # an interrupt from the terminal is for this process alone
        ) as process:
            try:
                said, _ = process.communicate(request, timeout=WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                return False
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        return said == word.encode()


def pass_at(k: int, *, total: int, correct: int) -> float:
    """The chance that of k drawn from `total` programs one is correct (Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    return 1.0 - comb(total - correct, k) / comb(total, k)


class CodeEval:
    """`compute` as in the metric code_eval: for each test its programs; {"pass@k": mean}, and what each one did."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,), **_: Any
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        found = {
            i: [passes(program, test) for program in programs]
            for i, (test, programs) in enumerate(zip(references, predictions, strict=True))
        }
        usable = [n for n in k if all(len(results) >= n for results in found.values())]
        return {
            f"pass@{n}": mean(pass_at(n, total=len(results), correct=sum(results)) for results in found.values())
            for n in usable
        }, found
