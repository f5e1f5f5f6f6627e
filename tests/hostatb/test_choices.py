"""The faster candidate is taken whatever the machine, by a clock of the test's own; the file of answers only helps."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from llmc.runtime import machine as cpu
from llmc.runtime.hostatb import choices
from llmc.runtime.hostatb.choices import FILE, Choices, machine


class Bench:
    """Candidates that take as long as they are said to, on a clock that only they move."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.now, self.calls = seconds, 0.0, 0

    def clock(self) -> float:
        return self.now

    def prepare(self):
        return {name: lambda name=name: self.work(name) for name in self.seconds}

    def work(self, name: str) -> None:
        self.calls += 1
        self.now += self.seconds[name]

    def pick(self, directory: Path | None, question: str = "product", **more) -> str:
        return Choices(lambda: directory, self.clock, **more).pick(question, list(self.seconds), self.prepare)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"packed": 3e-3, "plain": 1e-3, "float32": 2e-3}, "plain"),  # an EPYC with avx512_bf16
        ({"packed": 3e-3, "plain": 4e-3, "float32": 2e-3}, "float32"),  # a Xeon with avx512_bf16
        ({"packed": 1e-3, "plain": 1.5e-3, "float32": 5e-3}, "packed"),  # a Xeon with AMX
        ({"plain": 9e-3, "float32": 1e-3}, "float32"),  # nothing but AVX2
        ({"packed": 1e-3, "plain": 0.97e-3}, "packed"),  # 3 % are noise: the first stays
    ],
)
def test_the_fastest_is_taken_on_every_machine(seconds, chosen, tmp_path):
    assert Bench(**seconds).pick(tmp_path) == chosen


def test_the_answer_is_remembered_by_the_next_process_and_by_this_one(tmp_path):
    bench = Bench(a=2e-3, b=1e-3)
    one = Choices(lambda: tmp_path, bench.clock)
    assert [one.pick("q", ["a", "b"], bench.prepare) for _ in range(3)] == ["b"] * 3
    calls = bench.calls
    assert Choices(lambda: tmp_path, bench.clock).pick("q", ["a", "b"], lambda: pytest.fail("measured again")) == "b"
    assert bench.calls == calls


@pytest.mark.parametrize("change", ["cpu", "isa", "threads", "torch"])
def test_another_machine_measures_anew(change, tmp_path, monkeypatch):
    assert Bench(a=1e-3, b=2e-3).pick(tmp_path) == "a"
    if change == "cpu":
        monkeypatch.setattr(choices, "cpu_model", lambda: "another")
    elif change == "isa":
        monkeypatch.setattr(choices, "cpu_isa", lambda: ("avx2",))
    elif change == "threads":
        monkeypatch.setattr(choices.torch, "get_num_threads", lambda: 77)
    else:
        monkeypatch.setattr(choices.torch, "__version__", "9.9")
    assert Bench(a=2e-3, b=1e-3).pick(tmp_path) == "b"
    assert len(json.loads((tmp_path / FILE).read_text())) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "[" * 10000, '{"x": 3}', "\x00\xff", '{"%s": {"product": 5}}', '{"%s": ["product"]}',
     '{"%s": {"product": "gone"}}'],
)  # fmt: skip
def test_a_damaged_file_is_measured_again_and_mended(text, tmp_path):
    (tmp_path / FILE).write_text(text.replace("%s", machine().replace('"', "")), encoding="latin-1")
    assert Bench(a=2e-3, b=1e-3).pick(tmp_path) == "b"
    assert json.loads((tmp_path / FILE).read_text())[machine()]["product"] == "b"


def test_without_a_place_to_write_the_run_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    assert Bench(a=2e-3, b=1e-3).pick(tmp_path / "file") == "b"
    assert Bench(a=2e-3, b=1e-3).pick(None) == "b"
    (tmp_path / FILE).mkdir()
    assert Bench(a=2e-3, b=1e-3).pick(tmp_path) == "b"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_ranks_that_measure_at_once_leave_a_whole_file(tmp_path):
    def rank(number: int) -> None:
        for question in range(10):
            Bench(a=2e-3, b=1e-3).pick(tmp_path, question=f"{number}.{question}")

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(json.loads((tmp_path / FILE).read_text())[machine()].values()) == {"b"}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_measuring_stops_where_it_has_taken_long_enough(tmp_path, monkeypatch):
    told: list[str] = []
    bench = Bench(a=2e-3, b=1e-3)
    some = Choices(lambda: tmp_path, bench.clock, tell=told.append)
    some.spent_s = choices.BUDGET_S + 1
    assert some.pick("q", ["a", "b"], bench.prepare) == "a"
    assert (bench.calls, "not measured" in told[0]) == (0, True)


def test_what_is_chosen_is_told_with_the_times(tmp_path):
    told: list[str] = []
    Bench(a=2e-3, b=1e-3).pick(tmp_path, tell=told.append)
    Bench(a=2e-3, b=1e-3).pick(tmp_path, tell=told.append)
    assert told == ["product: b (a 2000 us, b 1000 us)", "product: b (remembered)"]


def test_the_cache_directory_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LLMC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cpu.cache_directory() == tmp_path / ".cache" / "llmc"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cpu.cache_directory() == tmp_path / "x" / "llmc"
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path / "own"))
    assert cpu.cache_directory() == tmp_path / "own"
