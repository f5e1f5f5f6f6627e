"""Python imports this before anything else where this folder is in PYTHONPATH. LLMC_TEST_FAULT="RANKS PHASE HOW" breaks
those ranks in that phase (start, device, meet, load, prefill, decode, leave, exit); the file LLMC_TEST_MARK is
made just before."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import time
from pathlib import Path


def act(how: str) -> None:
    Path(os.environ["LLMC_TEST_MARK"]).touch()
    match how:
        case "raise":
            raise RuntimeError("broken on purpose")
        case "exit":
            os._exit(7)
        case "sleep":
            time.sleep(1000)
        case "pause":
            subprocess.Popen(["sh", "-c", f"sleep 5; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        case _:
            os.kill(os.getpid(), getattr(signal, how))


def break_call(owner: object, name: str, how: str, *, call: int, phase: str = "") -> None:
    """The given call (of that phase) of a function acts first."""
    function, count = getattr(owner, name), 0

    def broken(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += not phase or phase in args
        if count == call:
            act(how)
        return function(*args, **kwargs)

    setattr(owner, name, broken)


def install(phase: str, how: str) -> None:
    if phase == "start":
        act(how)
    elif phase == "device":
        import llmc.runtime.session as run

        break_call(run, "open_device", how, call=1)
    elif phase == "meet":
        import torch.distributed as dist

        break_call(dist, "init_process_group", how, call=1)
    elif phase == "leave":
        from llmc.runtime.ranks import Team

        break_call(Team, "leave", how, call=1)
    elif phase == "exit":
        atexit.register(act, how)
    elif phase == "load":
        import llmc.runtime.weights as weights

        break_call(weights, "_load", how, call=3)
    else:  # the first call of each phase warms up
        from llmc.runtime.executor import Executor

        break_call(Executor, "run", how, call=2 if phase == "prefill" else 9, phase=phase)


if fault := os.environ.get("LLMC_TEST_FAULT", ""):
    ranks, phase, how = fault.split()
    if os.environ.get("RANK") in ranks.split(","):
        install(phase, how)
