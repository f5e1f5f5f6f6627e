"""`llmc run` with several ranks, from outside: answers, and how every kind of failure ends. Needs processes and torch.

A fault is put into one rank by `faults/sitecustomize.py`. The clock runs from the fault to the end of the command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

LLMC = [sys.executable, "-m", "llmc.run"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
IDS = ["--input-ids", "1,5,9,2", "3,3,3", "--ignore-eos", "--max-output-length", "12", "--load-tokenizer", "False"]
TEXT = ["--input-text", "w5 w9", "--stream", "--ignore-eos"]
SECONDS = 15  # from a failure to the end of everything, on a machine with other work to do


@dataclass
class Run:
    """A command under way, known by a word in the environment of all its processes."""

    process: subprocess.Popen[str]
    word: str
    mark: Path

    def pids(self, rank: int | None = None) -> list[int]:
        """Processes of this run, or those of one rank."""
        wanted = {f"LLMC_TEST_WORD={self.word}".encode(), *([] if rank is None else [f"RANK={rank}".encode()])}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "environ").read_bytes().split(b"\0")
                dead = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if wanted <= set(words) and not dead:
                found.append(int(folder.name))
        return found

    def wait_for_mark(self) -> None:
        until(self.mark.exists, "the fault")

    def end(self) -> tuple[int, str, str]:
        """Code, stdout, stderr, after a look that nothing is left and that a failure took no longer than it may."""
        out, err = self.process.communicate(timeout=120)
        failed = self.mark.stat().st_mtime if self.mark.exists() else time.time()
        assert time.time() - failed < SECONDS, err
        assert self.pids() == []
        return self.process.returncode, out, err


def until(ready, what: str) -> None:
    limit = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < limit, f"{what} did not come"
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path) -> Iterator:
    """start(words, fault="1 load raise", ranks="--tp 2") -> Run; what a failed test leaves is killed."""
    runs: list[Run] = []

    def go(*words: str, fault: str = "", command: list[str] | None = None, **more: str) -> Run:
        word, mark = uuid.uuid4().hex, tmp_path / f"mark{len(runs)}"
        env = {name: value for name, value in os.environ.items() if not name.startswith("LLMC_")}
        env |= {"LLMC_TEST_WORD": word, "LLMC_TEST_MARK": str(mark), "LLMC_TEST_FAULT": fault, "OMP_NUM_THREADS": "1"}
        env |= {"PYTHONPATH": str(Path(__file__).parent / "faults"), **more}
        process = subprocess.Popen(
            [*(command or LLMC), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            start_new_session=True,
        )
        runs.append(Run(process, word, mark))
        return runs[-1]

    yield go
    for run in runs:
        for pid in run.pids():
            os.kill(pid, signal.SIGKILL)


def tokens(out: str) -> list[list[int]]:
    return [output["token_ids"] for output in json.loads(out)["outputs"]]


def error(err: str) -> str:
    """The one message; other lines are its hint."""
    (line,) = [line for line in err.splitlines() if line.startswith("llmc: ")]
    return line


@pytest.fixture(scope="module")
def alone(model) -> list[list[int]]:
    """What one rank answers."""
    done = subprocess.run([*LLMC, *model, *IDS, "--json"], capture_output=True, text=True, check=True)
    return tokens(done.stdout)


def test_two_runs_of_two_and_three_ranks_at_once_answer_as_one_rank(model, alone, start):
    runs = [start(*model, *IDS, "--json", "--tp", tp) for tp in ("2", "3")]
    for run in runs:
        code, out, err = run.end()
        assert (code, err) == (0, "")
        assert tokens(out) == alone


def test_log_probabilities_of_two_ranks_are_those_of_one(model, alone, start):
    words = [*model, *IDS, "--json", "--logprobs", "1", "--prompt-logprobs", "2"]
    found = []
    for tp in ("1", "2"):
        code, out, err = start(*words, "--tp", tp).end()
        assert (code, err) == (0, "")
        assert tokens(out) == alone
        outputs = json.loads(out)["outputs"]
        entries = [entry for o in outputs for key in ("logprobs", "prompt_logprobs") for entry in o[key] if entry]
        assert [len(o["prompt_logprobs"]) for o in outputs] == [o["prompt_tokens"] for o in outputs]
        found.append([one for entry in entries for one in entry])
    one, two = ([said["logprob"] for said in entries] for entries in found)
    assert two == pytest.approx(one, abs=1e-4)
    assert len(one) > 20


def test_under_torchrun_ranks_join_and_one_answers(model, alone, start):
    command = [*TORCHRUN, "--master-port", "20010", "-m", "llmc.run"]
    code, out, err = start(*model, *IDS, "--json", "--use-refactor", command=command).end()
    assert code == 0, err
    assert tokens(out) == alone
    assert err.count("note: --use-refactor") == 1


def test_notes_prompts_and_lines_come_once_and_as_of_one_rank(model, start):
    prompts = ["--input-text", "w5 ${local_rank} $$", "w1 w2 w3", "--max-input-length", "2", "--max-output-length", "3"]
    words = [*model, *prompts, "--use-refactor", "--ignore-eos"]
    one, two = start(*words, "--tp", "1"), start(*words, "--tp", "2")
    (_, out1, err1), (code, out2, err2) = one.end(), two.end()
    assert code == 0
    assert err1 == err2
    assert list(out1.splitlines()[:-1]) == out2.splitlines()[:-1]
    assert "Question[0]: w5 ${local_rank} $$" in out2


def test_torchrun_decides_how_many_ranks_there_are(model, start):
    command = [*TORCHRUN, "--standalone", "-m", "llmc.run"]
    code, out, err = start(*model, *IDS, "--tp", "3", command=command).end()
    assert (code, out) == (1, "")
    assert "--tp 3, but torchrun started 2 ranks" in error(err)


@pytest.mark.parametrize("phase", ["start", "load", "prefill", "decode"])
def test_a_killed_rank_ends_the_others_and_is_named(model, start, phase):
    code, _, err = start(*model, *IDS, "--tp", "2", fault=f"1 {phase} SIGKILL").end()
    assert code == 1
    assert "rank 1 was killed by SIGKILL" in error(err)


@pytest.mark.parametrize(("rank", "phase"), [("1", "load"), ("0", "decode")])
def test_an_error_on_one_rank_is_said_by_it_and_ends_all(model, start, rank, phase):
    code, out, err = start(*model, *IDS, "--tp", "2", fault=f"{rank} {phase} raise").end()
    assert (code, out) == (1, "")
    assert error(err) == f"llmc: rank {rank}: RuntimeError: broken on purpose"


def test_an_error_on_all_ranks_is_said_by_the_first(model, start):
    code, out, _err = start(*model, *IDS, "--tp", "3", "--json", fault="0,1,2 load raise").end()
    assert code == 1
    assert json.loads(out)["problems"][0]["message"] == "rank 0: RuntimeError: broken on purpose"


@pytest.mark.parametrize("fault", ["0 start SIGSTOP", "1 device sleep"])
def test_a_rank_that_hangs_at_start_is_named_by_the_others(model, start, fault):
    code, out, err = start(*model, *IDS, "--tp", "2", fault=fault, LLMC_START_TIMEOUT="2").end()
    assert (code, out) == (1, "")
    assert f"rank {fault[0]} of 2 did not start" in error(err)


def test_under_torchrun_a_rank_that_hangs_at_start_ends_all(model, start):
    command = [*TORCHRUN, "--standalone", "-m", "llmc.run"]
    code, _, err = start(*model, *IDS, command=command, fault="1 start SIGSTOP", LLMC_START_TIMEOUT="2").end()
    assert code == 1
    assert "rank 1 of 2 did not start" in error(err)


def test_a_rank_that_stops_for_longer_than_a_start_may_take_and_goes_on_is_waited_for(model, alone, start):
    run = start(*model, *IDS, "--json", "--tp", "2", fault="1 decode pause", LLMC_START_TIMEOUT="4")
    code, out, err = run.end()
    assert (code, err) == (0, "")
    assert tokens(out) == alone


def test_a_rank_that_stops_while_the_ranks_connect_is_named(model, start):
    code, out, err = start(*model, *IDS, "--tp", "3", fault="1 meet SIGSTOP", LLMC_START_TIMEOUT="3").end()
    assert (code, out) == (1, "")
    assert "rank 1 of 3 did not connect" in error(err)


@pytest.mark.parametrize(("launcher", "phase"), [("llmc", "exit"), ("torchrun", "leave")])
def test_a_rank_that_stops_after_the_answers_is_named_and_ended(model, alone, start, launcher, phase):
    command = [*TORCHRUN, "--standalone", "-m", "llmc.run"] if launcher == "torchrun" else None
    ranks = [] if command else ["--tp", "2"]
    words = [*model, *IDS, "--json", *ranks]
    code, out, err = start(*words, command=command, fault=f"1 {phase} SIGSTOP", LLMC_END_TIMEOUT="2").end()
    assert code == 1
    assert tokens(out) == alone
    assert error(err) == "llmc: the answers are complete, but rank 1 did not end within 2 s and is killed"


def streaming(start, model: list[str], *words: str, **more) -> Run:
    """A run of two ranks that has begun to answer and would go on for a long time."""
    run = start(*model, *TEXT, "--max-output-length", "4000", "--tp", "2", *words, **more)
    assert run.process.stdout is not None
    seen = ""
    while not re.search(r"Answer\[0\]: w\d+ w", seen):
        char = run.process.stdout.read(1)
        assert char, run.process.communicate()
        seen += char
    run.mark.touch()
    return run


def test_an_interrupt_ends_all_with_one_word(model, start):
    run = streaming(start, model)
    os.killpg(run.process.pid, signal.SIGINT)
    code, _, err = run.end()
    assert (code, err) == (130, "interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_without_the_first_process_no_rank_lives_on(model, start, number):
    run = streaming(start, model)
    run.process.send_signal(number)
    run.process.wait(SECONDS)
    until(lambda: run.pids() == [], "the end of the ranks")
    assert run.end()[0] == (-9 if number == signal.SIGKILL else 143)


def test_a_reader_that_leaves_early_is_no_error(model, start):
    run = streaming(start, model)
    assert run.process.stdout is not None
    run.process.stdout.close()
    run.process.stdout = open(os.devnull)  # noqa: SIM115 (what is left to read)
    code, _, err = run.end()
    assert (code, err) == (0, "")
