"""One rank among several: who it is, how it meets the others, and who of them says what went wrong.

Enters torchrun's environment; leaves a `Place`, and a `Team` that `llmc run` works in.

    place = find_place()                            # None: nobody started ranks, this process is alone
    code = join(place, work, report)                # work(team) -> exit code; report(UserError) prints

The control group (arrival, the tokens of each step) is always gloo on the CPU. What a failure looks like:

    an error on a rank          that rank says it, exits, and torchrun's agent ends the others
    the same error on all       rank 0 says it; the others wait a second before they speak, and are ended meanwhile
    a rank is gone              the others hear of it in a collective; they keep quiet, for the cause is told elsewhere
    a rank never arrives        those that have arrived name it and exit
    a rank stops for a while    the others wait for it, up to the half hour of torch.distributed
    a rank does not end         the first rank of its host names it when the answers are out, and it is killed
    the agent is gone           the system ends its ranks (Linux)

Torch is imported by the functions that need it: before that, this process is tied to the life of its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from llmc.compiler.atb.collective import PORTS, lccl_domain, lccl_port
from llmc.compiler.diagnostics import DiagnosticError, UserError

if TYPE_CHECKING:
    import torch

    from llmc.runtime.engine.sampling import Samples, SamplingState

START_LIMIT = "LLMC_START_TIMEOUT"  # seconds without a sign of any rank before those that are missing count as lost
START_SECONDS = 30.0
END_LIMIT = "LLMC_END_TIMEOUT"  # seconds that ranks have to end when the answers are out
END_SECONDS = 10.0
LAUNCHER = "LLMC_LAUNCHER"  # pid of the `llmc run` that started this rank
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets

FIRST_WORD_SECONDS = 1.0  # ranks other than 0 wait so long before they tell an error that rank 0 may have, too
LOST_SECONDS = 4.0  # a rank whose peer is gone waits so long to be ended
SILENT_SECONDS = 20.0  # a rank that has nothing to say waits so long to be ended
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Who this process is. `local`: among the ranks of its host."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int

    @property
    def comm_domain(self) -> str:
        """Name of the communicator, legal for every backend: a number, the same on all ranks, and as the master port
        another one for every run on a host."""
        return str(lccl_domain(self.master_port, lccl_port(os.environ)))

    @property
    def one_host(self) -> bool:
        return self.local_world_size == self.world_size


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """What torchrun says in the environment; None where it does not start this process."""
    if any(name not in environment for name in NAMES):
        return None
    try:
        rank, local_rank, world_size, local_world_size = (int(environment[name]) for name in NAMES[:4])
        port = int(environment["MASTER_PORT"])
    except ValueError:
        found = " ".join(f"{name}={environment[name]!r}" for name in NAMES)
        raise UserError(
            f"the environment of this rank does not hold numbers: {found}", hint="torchrun sets it"
        ) from None
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} is not a rank of WORLD_SIZE={world_size}", hint="torchrun sets both")
    if not 0 < port <= PORTS[1]:
        raise UserError(f"MASTER_PORT={port} is not a port: 1 to {PORTS[1]}", hint="torchrun --master-port sets it")
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=environment["MASTER_ADDR"],
        master_port=port,
    )


class Gone(Exception):
    """Another rank does not answer any more. Whoever ended it, or it itself, has said why."""


class Missing(UserError):
    """Ranks that did not arrive; told by any rank, about others."""


def join(place: Place, work: Callable[[Team], int], report: Callable[[UserError], None]) -> int:
    """`work` as one rank; its exit code. When it fails, one rank of the team tells it and this process ends."""
    live_with_parent()
    if place.rank:
        logging.disable(logging.ERROR)
        warnings.simplefilter("ignore")
    team = Team(place)
    try:
        team.connect()
        code = work(team)
        return team.leave() or code
    except KeyboardInterrupt:
        if place.rank or LAUNCHER in os.environ:
            end(130)
        raise
    except BrokenPipeError:  # `torchrun ... | head`: nobody reads on, and that is no error
        team.dismiss()
        raise
    except Exception as error:
        team.fail(error, report)


def live_with_parent() -> None:
    """End this process when its parent, the agent that started it, ends in whatever way (Linux)."""
    if not sys.platform.startswith("linux") or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(os.environ.get(LAUNCHER, os.getppid())):  # it was gone before the call
        end(1)


def end(code: int) -> NoReturn:
    """Leave at once: with a peer gone, tearing down groups and devices in order can wait for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # closed: nobody reads it
            continue
    os._exit(code)


class Team:
    """This rank and the way to the others: torchrun's store, then a gloo group."""

    def __init__(self, place: Place) -> None:
        self.place, self.alone, self.talks = place, place.world_size == 1, place.rank == 0
        # `llmc run` has read the flags and told about them before it started ranks
        self.says_what_is_asked = self.talks and LAUNCHER not in os.environ
        self.limit = seconds(START_LIMIT, START_SECONDS)
        self.end_limit = seconds(END_LIMIT, END_SECONDS)
        self.arrived = threading.Event()
        self.store: Any = None
        self.told = 0  # how often rank 0 has said something

    def connect(self) -> None:
        """Reach the store that the agent (or rank 0) keeps at MASTER_ADDR:MASTER_PORT."""
        if self.alone:
            return
        import torch.distributed as dist

        where = f"{self.place.master_addr}:{self.place.master_port}"
        if self.place.one_host and sys.platform.startswith("linux"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # also where the host's own name has no address
        try:
            self.store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=self.limit)))
            self.store.set(f"llmc/connected/{self.place.rank}", "")
            threading.Thread(target=self.watch, daemon=True).start()
        except (RuntimeError, ValueError) as error:
            raise Missing(f"the store of the ranks at {where} does not answer: {str(error).splitlines()[0]}") from None

    def watch(self) -> None:
        """Until this rank has its device, which may hang: end when another has failed, or the store is gone. An agent
        ends the ranks of its own host; of the others it knows nothing."""
        while not self.arrived.wait(0.5):
            try:
                failed = self.store.check(["llmc/spoken"])
            except RuntimeError:
                failed = True
            if failed and not self.arrived.wait(LOST_SECONDS):
                end(1)

    def meet(self) -> None:
        """All ranks have their device: wait for those that do not yet, then form the group."""
        if self.alone:
            return
        import torch.distributed as dist

        self.arrived.set()
        try:
            self._wait_for_all()
            # The limit of the start is for connecting only. It stays gloo's for what goes from rank to rank, which
            # therefore names its own (hostatb/collective.py).
            rank, world_size, start = self.place.rank, self.place.world_size, timedelta(seconds=self.limit)
            dist.init_process_group("gloo", store=self.store, rank=rank, world_size=world_size, timeout=start)
            dist.distributed_c10d._set_pg_timeout(dist.default_pg_timeout, dist.group.WORLD)
        except RuntimeError as error:
            raise self._not_connected(str(error).splitlines()[0]) from None

    def _wait_for_all(self) -> None:
        """Until all ranks have arrived. Any news of a rank starts the wait anew."""
        self.store.set(f"llmc/arrived/{self.place.rank}", "")
        signs, since = 0, time.monotonic()
        while missing := self._without("arrived"):
            news = 2 * self.place.world_size - len(missing) - len(self._without("connected"))
            if news > signs:
                signs, since = news, time.monotonic()
            if time.monotonic() - since > self.limit:
                raise self._missing(missing, f"did not start: no sign for {self.limit:g} s after the others")
            time.sleep(0.02)

    def _not_connected(self, why: str) -> Missing:
        """All have arrived, and the group was not made: who does not say so either has stopped meanwhile."""
        try:
            self.store.set(f"llmc/alone/{self.place.rank}", "")
            time.sleep(2 * FIRST_WORD_SECONDS)
            missing = self._without("alone")
        except RuntimeError:
            where = f"{self.place.master_addr}:{self.place.master_port}"
            return Missing(f"the store of the ranks at {where} does not answer any more: {why}")
        if missing:
            return self._missing(missing, f"did not connect to the others within {self.limit:g} s")
        return Missing(f"the ranks cannot connect to each other: {why}", hint="GLOO_SOCKET_IFNAME names the network")

    def _missing(self, ranks: Sequence[int], what: str) -> Missing:
        if LAUNCHER not in os.environ:  # torchrun waits half a minute for a rank that is stopped
            kill(siblings(ranks).values())
        hint = f"a hanging device or a slow disk; {START_LIMIT}=60 (seconds) waits longer"
        return Missing(f"{named(ranks)} of {self.place.world_size} {what}", hint=hint)

    def _without(self, sign: str) -> list[int]:
        """Ranks that have not given this sign."""
        return [rank for rank in range(self.place.world_size) if not self.store.check([f"llmc/{sign}/{rank}"])]

    def least(self, value: int) -> int:
        """The smallest that any rank gives, on every rank."""
        import torch
        import torch.distributed as dist

        if self.alone:
            return value
        shared = torch.tensor(value)
        try:
            dist.all_reduce(shared, op=dist.ReduceOp.MIN)
        except RuntimeError as error:
            raise Gone(str(error)) from None
        return int(shared)

    def gather(self, value: Any) -> list[Any] | None:
        """What every rank gives, in order, on rank 0; None elsewhere."""
        import torch.distributed as dist

        if self.alone:
            return [value]
        found: list[Any] | None = [None] * self.place.world_size if self.place.rank == 0 else None
        try:
            dist.gather_object(value, found)
        except RuntimeError as error:
            raise Gone(str(error)) from None
        return found

    def tell(self, value: Any) -> Any:
        """What rank 0 has, on every rank."""
        import torch.distributed as dist

        told = [value]
        try:
            if not self.alone:
                dist.broadcast_object_list(told)
        except RuntimeError as error:
            raise Gone(str(error)) from None
        return told[0]

    def say(self, value: Any) -> None:
        """From rank 0 to all others, who `hear` it: anything that JSON can say, also before the ranks have met."""
        if self.alone:
            return
        self.store.set(f"llmc/said/{self.told}", json.dumps(value))
        self.told += 1
        if self.told > 2:  # what was said before the last one has been heard: all ranks took steps since
            self.store.delete_key(f"llmc/said/{self.told - 3}")

    def hear(self) -> Any:
        """What rank 0 says next, however long that takes."""
        key = f"llmc/said/{self.told}"
        self.told += 1
        try:
            while not self.store.check([key]):
                time.sleep(0.005)
            return json.loads(self.store.get(key))
        except RuntimeError as error:
            raise Gone(str(error)) from None

    def sampler(self, sampler: Samples) -> Samples:
        """Rank 0's choice, on every rank."""
        return sampler if self.alone else SharedSampler(sampler, self.place.rank)

    def leave(self) -> int:
        """The answers are out, and nobody needs the group any more; the exit code. The first rank of a host gives the
        others a while, names those that do not end, and sees to it that they do: an agent would wait for ever (Linux).
        """
        import torch.distributed as dist

        if self.alone:
            return 0
        if dist.is_initialized():
            dist.destroy_process_group()
        if self.place.local_rank:
            return 0
        others, until = siblings(), time.monotonic() + self.end_limit
        while others := {rank: pid for rank, pid in others.items() if runs(pid)}:
            if time.monotonic() > until:
                who, it = named(list(others)), "is" if len(others) == 1 else "are"
                did = f"did not end within {self.end_limit:g} s and {it} killed"
                print(f"llmc: the answers are complete, but {who} {did}", file=sys.stderr, flush=True)
                if LAUNCHER not in os.environ:  # else `llmc run` ends all, now that this one ends with code 1
                    kill(others.values())
                return 1
            time.sleep(0.02)
        return 0

    def dismiss(self) -> None:
        """Tell the others that rank 0 leaves early, and on purpose."""
        with contextlib.suppress(RuntimeError):  # the store has gone first
            if self.store is not None:
                self.store.set("llmc/over", "")

    def fail(self, error: Exception, report: Callable[[UserError], None]) -> NoReturn:
        """Tell the error once among all ranks, and end with code 1. A rank that comes second waits to be ended."""
        lost = is_gone(error)
        if lost:
            until = time.monotonic() + LOST_SECONDS
            while time.monotonic() < until:
                if self._over():
                    end(0)
                time.sleep(0.1)
        elif self.place.rank:
            time.sleep(FIRST_WORD_SECONDS)
        if not self._first_to_speak():
            time.sleep(SILENT_SECONDS)
            end(1)
        report(self._told(error, lost))
        end(1)

    def _told(self, error: Exception, lost: bool) -> UserError:
        if lost:
            why = next((line for line in str(error).splitlines() if line), type(error).__name__)
            return UserError(f"rank {self.place.rank}: another rank does not answer any more ({why})")
        if self.alone or isinstance(error, (Missing, DiagnosticError)):
            return error if isinstance(error, UserError) else UserError(message_of(error))
        who = f"rank {self.place.rank}: "
        if isinstance(error, UserError):
            return UserError(who + error.message, hint=error.hint, code=error.code)
        if not (isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC)):
            traceback.print_exception(error)  # nothing that a user can mend: whoever reads it wants the place
        return UserError(who + message_of(error))

    def _first_to_speak(self) -> bool:
        try:
            return self.store is None or self.store.add("llmc/spoken", 1) == 1
        except RuntimeError:  # the store is gone, and with it the host that would have spoken
            return True

    def _over(self) -> bool:
        try:
            return self.store is not None and self.store.check(["llmc/over"])
        except RuntimeError:
            return False


class SharedSampler:
    """Samples on rank 0 and gives every rank its tokens: logits of two ranks may differ in the last bit (the order of
    lccl's sums is not fixed), and tokens must not."""

    def __init__(self, sampler: Samples, rank: int) -> None:
        self.inner, self.rank = sampler, rank

    def sample(self, logits: torch.Tensor, states: Sequence[SamplingState]) -> list[int]:
        import torch
        import torch.distributed as dist

        chosen = self.inner.sample(logits, states) if self.rank == 0 else [0] * len(states)
        tokens = torch.tensor(chosen, dtype=torch.int64)
        try:
            dist.broadcast(tokens, src=0)
        except RuntimeError as error:
            raise Gone(str(error)) from None
        return tokens.tolist()


def is_gone(error: BaseException | None) -> bool:
    """Whether this is the news that a rank is gone: from the sampler's broadcast, or a collective of the graph."""
    while error is not None:
        if isinstance(error, Gone) or getattr(error, "code", "") == "ERROR_HCCL_FAIL":
            return True
        error = error.__cause__
    return False


def siblings(ranks: Sequence[int] | None = None) -> dict[int, int]:
    """Rank -> pid of these (or all) other ranks of this run on this host: children of this process's parent, known by
    their environment (Linux; nothing elsewhere)."""
    found: dict[int, int] = {}
    run = f"MASTER_PORT={os.environ.get('MASTER_PORT', '')}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.name == str(os.getpid()) or not runs(int(folder.name)):
                continue
            words = (folder / "environ").read_bytes().split(b"\0")
            rank = next((int(word[5:]) for word in words if word.startswith(b"RANK=")), None)
        except (OSError, ValueError):  # it has ended, or belongs to somebody else
            continue
        if rank is not None and run in words and (ranks is None or rank in ranks):
            found[rank] = int(folder.name)
    return found


def runs(pid: int) -> bool:
    """Whether this is a child of this process's parent that has not ended."""
    try:
        state, parent = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return False
    return int(parent) == os.getppid() and state not in "ZX"


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"


def message_of(error: Exception) -> str:
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        return f"{error.filename or 'the output cannot be written'}: {error.strerror}"
    return f"{type(error).__name__}: {error}"


def seconds(variable: str, default: float) -> float:
    """A time limit from the environment."""
    text = os.environ.get(variable, "")
    try:
        found = float(text or default)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e6:
        raise UserError(f"{variable}={text!r} must be seconds above 0")
    return found
