"""Start the ranks of `llmc run --tp N` (or another command) on this host, with the agent of torchrun in this process.

Enters the command line of one rank; leaves an exit code. Ranks are `python -m llmc.run`, each in a session of its own.
What torchrun would do is done, but a rank that does not end when it is told to is killed after a moment, not after half
a minute, and the table of failures is one sentence.

    code = launch(["run", "--model-path", "w", "--artifact", "build/x"], world_size=2)
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from llmc.compiler.diagnostics import UserError
from llmc.runtime.machine import cores
from llmc.runtime.ranks import LAUNCHER

HOST = "127.0.0.1"
GRACE_SECONDS = 2  # from SIGTERM to SIGKILL
POLL_SECONDS = 0.05
SAID = (1, 2)  # exit codes of a rank that has told why: an error, or wrong usage


def launch(words: Sequence[str], *, world_size: int) -> int:
    """Run `world_size` ranks with this command and its flags until all have ended; their exit code. UserError for a
    rank that died without a word, KeyboardInterrupt when the user interrupts them."""
    settings = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // world_size))),
        LAUNCHER: str(os.getpid()),
        "PYTHONSAFEPATH": "1",  # `-m` would import from the current directory, which may be a checkpoint's
    }
    # The agent's store: the system chooses a free port, so that two runs on one host have two.
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
    handler = StaticTCPRendezvous(HOST, store.port, 0, 1, uuid.uuid4().hex, timeout=60)
    spec = WorkerSpec(
        role="llmc",
        local_world_size=world_size,
        entrypoint=sys.executable,
        args=("-u", "-m", "llmc.run", *(word.replace("$", "$$") for word in words)),  # the agent expands ${local_rank}
        rdzv_handler=handler,
        max_restarts=0,
        monitor_interval=POLL_SECONDS,
        master_addr=HOST,
        master_port=store.port,
    )
    logs = DefaultLogsSpecs(log_dir=os.devnull)  # ranks write where this process writes
    agent = Agent(spec, logs_specs=logs, exit_barrier_timeout=1, shutdown_timeout=GRACE_SECONDS)
    with quiet_agent(), environment(settings), kept_signals():
        try:
            result = agent.run()
        except SignalException as stop:
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            return 128 + stop.sigval
    return outcome(agent.ended) if result.is_failed() else 0


class Agent(LocalElasticAgent):
    """torchrun's agent. `ended`: the ranks that ended badly by themselves -> exit code, or minus the signal."""

    ended: Mapping[int, int] = {}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        pids = {worker.global_rank: int(worker.id) for worker in worker_group.workers}
        self.ended = {rank: code for rank, pid in pids.items() if (code := exit_code(pid))}
        if self.ended:
            end_sessions(list(pids.values()))
        return super()._monitor_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = GRACE_SECONDS) -> None:
        # Not the signal that this process got: a rank in a collective would only note an interrupt.
        end_sessions([int(worker.id) for worker in self.get_worker_group().workers if worker.id])
        super()._shutdown(signal.SIGTERM, min(timeout, GRACE_SECONDS))


def exit_code(pid: int) -> int:
    """Code of a child that has ended, minus the signal that killed it, 0 while it runs. It can still be waited for."""
    try:
        state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    if state is None:
        return 0
    return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status


def end_sessions(pids: Sequence[int]) -> None:
    """SIGTERM, and after a moment SIGKILL, to the session of each child. One that is stopped must go on to end."""
    for numbers in ((signal.SIGTERM, signal.SIGCONT), (signal.SIGKILL,)):
        for pid in pids:
            for number in numbers:
                signal_group(pid, number)
        until = time.monotonic() + GRACE_SECONDS
        while any(map(running, pids)) and time.monotonic() < until:
            time.sleep(0.01)


def signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):  # all of it has ended
        return


def running(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def outcome(ended: Mapping[int, int]) -> int:
    """The exit code, or what to say of a rank that could not say it itself."""
    if {130, -signal.SIGINT} & set(ended.values()):
        raise KeyboardInterrupt
    for rank, code in ended.items():
        if code < 0:
            raise killed(rank, -code)
    rank, code = next(iter(ended.items()), (0, 1))
    if code not in SAID:
        raise UserError(f"rank {rank} ended with code {code} and gave no reason")
    return code


def killed(rank: int, number: int) -> UserError:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number == signal.SIGKILL:
        hint = "the system was out of memory (`dmesg` tells): more ranks, a smaller batch, or a shorter sequence"
    elif number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        hint = "somebody stopped it"
    else:
        hint = "a crash in native code; PYTHONFAULTHANDLER=1 shows where"
    return UserError(f"rank {rank} was killed by {name}, and the other ranks were ended", hint=hint)


@contextmanager
def quiet_agent() -> Iterator[None]:
    """The agent tells on its log what `outcome` tells in a sentence."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that children inherit."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def kept_signals() -> Iterator[None]:
    """The agent installs handlers and leaves them; here they end with it."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    mine = threading.current_thread() is threading.main_thread()  # elsewhere Python, and so the agent, sets none
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in numbers if mine}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
