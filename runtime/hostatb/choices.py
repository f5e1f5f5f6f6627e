"""Which of several ways to the same numbers is the fastest here: measured, and remembered for the next process.

    CHOICES.pick("product bfloat16 1x1024x1024", ["packed", "plain"], lambda: {"packed": run, "plain": other})

A table of CPUs would be wrong on the next one: float32 units beat 16-bit ones on a Xeon with avx512_bf16 and are 4.5
times slower on an EPYC with it. So each question is measured once per machine (CPU, extensions, threads, torch) in a
few milliseconds, and the answer goes to kernels.json in the cache directory. The file is a help and nothing more: what
cannot be read is measured again, what cannot be written is kept for this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llmc.runtime.machine import cache_directory, cpu_isa, cpu_model

FILE = "kernels.json"
ROUNDS = 12  # calls of each candidate, in turn; the fastest counts, since whatever else runs only adds
HOPELESS = 1.5  # after two rounds, candidates so many times slower than the best are not called again
BUDGET_S = 0.15  # of all measuring in a process: what is asked after that takes its first candidate
MARGIN = 0.95  # a candidate beats those before it by 5 %, or the first one stays: less is noise


class Choices:
    """Answers by question. `directory`: where kernels.json lies, None for nowhere; `clock`: seconds."""

    def __init__(
        self,
        directory: Callable[[], Path | None] = cache_directory,
        clock: Callable[[], float] | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.directory, self.clock, self.tell = directory, clock, tell
        self.spent_s = 0.0
        self._known: dict[tuple[str, str], str] = {}  # machine, question -> candidate

    def pick(
        self, question: str, names: Sequence[str], prepare: Callable[[], Mapping[str, Callable[[], object]]]
    ) -> str:
        """The fastest of these candidates. `prepare` gives a call for each, and is asked only where one measures. The
        first candidate is taken where there is no choice, or no time left to measure."""
        if len(names) == 1:
            return names[0]
        key = (machine(), question)
        if self._known.get(key) not in names:
            found = self._remembered().get(question, "")
            if found in names:
                self._known[key] = found
                self.tell(f"{question}: {found} (remembered)")
            else:
                self._known[key] = self._measured(question, names, prepare)
        return self._known[key]

    def _measured(
        self, question: str, names: Sequence[str], prepare: Callable[[], Mapping[str, Callable[[], object]]]
    ) -> str:
        if self.spent_s > BUDGET_S:
            self.tell(f"{question}: {names[0]} (not measured: {self.spent_s * 1e3:.0f} ms went into other questions)")
            return names[0]
        start = time.thread_time()
        best = self._times(prepare())
        self.spent_s += time.thread_time() - start
        chosen = names[0]
        for name in names[1:]:
            if best[name] < best[chosen] * MARGIN:
                chosen = name
        times = ", ".join(f"{name} {best[name] * 1e6:.0f} us" for name in names)
        self.tell(f"{question}: {chosen} ({times})")
        self._remember(question, chosen)
        return chosen

    def _times(self, candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        # With one thread, time of this thread: what other processes take does not count.
        clock = self.clock or (time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)
        best = dict.fromkeys(candidates, float("inf"))
        for number in range(ROUNDS + 1):
            for name, run in candidates.items():
                if number > 2 and best[name] > HOPELESS * min(best.values()):
                    continue
                start = clock()
                run()
                if number:  # the first call may pack, compile or allocate
                    best[name] = min(best[name], clock() - start)
        return best

    # ---- the file: {machine: {question: candidate}}

    def _remembered(self) -> dict[str, str]:
        return {q: c for q, c in self._read().get(machine(), {}).items() if isinstance(c, str)}

    def _path(self) -> Path | None:
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home directory
            directory = self.directory()
            return None if directory is None else directory / FILE
        return None

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self._path()
        if path is None:
            return {}
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(table, dict):
            return {}
        return {key: entries for key, entries in table.items() if isinstance(entries, dict)}

    def _remember(self, question: str, chosen: str) -> None:
        """Written beside and moved over, so that a reader sees a whole file; of two writers at once the later wins, and
        the other's answer is measured again some day."""
        path = self._path()
        if path is None:
            return
        table = self._read()
        table.setdefault(machine(), {})[question] = chosen
        temporary = ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{FILE}.")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(table, file, indent=1, sort_keys=True)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                if temporary:
                    os.unlink(temporary)


def machine() -> str:
    """What the times depend on."""
    return f"{cpu_model()} | {' '.join(cpu_isa())} | {torch.get_num_threads()} threads | torch {torch.__version__}"


CHOICES = Choices()
