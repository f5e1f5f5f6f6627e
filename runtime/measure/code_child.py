"""The process that runs a program which a model has written; generated_code.py starts it as `python -I code_child.py`.

Such a program is nobody's: it may loop, fill memory, delete files or talk to the network, mostly by mistake. So it runs
in an empty directory where the system ends it: after CPU_SECONDS, with no more than MEMORY_BYTES, with files that it
may neither write nor read outside (Landlock, where the kernel has it), without a network (a namespace of its own, where
the kernel gives one) and without other processes. `refuse` says no to the same in Python, where the kernel does not.
That is what an unprivileged process can do; it is no virtual machine.

Enters on stdin: {"program": text, "word": text}. Leaves on stdout the word, when the program has come to its end: one
that exits by itself has not.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import sys
import sysconfig
from typing import Any

CPU_SECONDS = 3  # as the metric code_eval of the library evaluate
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWIPC = 0x10000000, 0x40000000, 0x08000000  # unshare(2)
PR_SET_NO_NEW_PRIVS = 38  # prctl(2)
# landlock(7); the numbers of its calls are the same on all architectures but Alpha
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ = 1 << 2 | 1 << 3  # READ_FILE, READ_DIR
ALL_FILES = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # by version: 13 rights, REFER, TRUNCATE
ALL_TCP = 1 << 0 | 1 << 1  # BIND_TCP, CONNECT_TCP, from version 4
OUTSIDE = 1 << 0 | 1 << 1  # abstract sockets of, and signals to, processes outside, from version 6
READABLE = (
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/lib",
    "/lib64",
    "/usr/share/zoneinfo",
    "/dev/null",
    "/dev/urandom",
)
REFUSED = (
    "socket.", "subprocess.", "ctypes.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill",
    "os.putenv", "pty.", "signal.pthread_kill", "webbrowser.",
)  # fmt: skip


def main() -> None:
    request = json.loads(sys.stdin.buffer.read())
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    confine()
    exec(compile(request["program"], "program.py", "exec"), {})
    os.write(verdict, request["word"].encode())


def confine() -> None:
    """From here on. What a system does not offer is left out."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        libc = ctypes.CDLL(None, use_errno=True)
        if platform.system() == "Linux":
            if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC):
                libc.unshare(CLONE_NEWNET)  # where users may not have spaces of their own, but this is root
            lock_files(libc)
    limits = {
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_DATA: MEMORY_BYTES,
        resource.RLIMIT_AS: 4 * MEMORY_BYTES,  # also mapped files
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for name, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # a system may have its own, lower limits
            resource.setrlimit(name, (value, value))
    sys.addaudithook(refuse)


def refuse(event: str, _: Any) -> None:
    if event.startswith(REFUSED):
        raise PermissionError(f"{event} is not for generated programs")


def lock_files(libc: Any) -> None:
    """Reading below Python's own directories, everything in this (empty) one, and nothing else; no signal to others."""

    class Ruleset(ctypes.Structure):
        _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))

    class Beneath(ctypes.Structure):
        _pack_ = 1
        _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))

    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 1:
        return
    every = ALL_FILES[min(version, max(ALL_FILES))]
    rules = Ruleset(every, ALL_TCP if version >= 4 else 0, OUTSIDE if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(LANDLOCK_CREATE, ctypes.byref(rules), size, 0)
    if ruleset < 0:
        return
    own = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), sys.base_prefix, *READABLE}
    for path, allowed in [*((path, READ) for path in sorted(own)), (os.getcwd(), every)]:
        with contextlib.suppress(OSError):
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            kept = allowed if os.path.isdir(path) else allowed & (1 << 2)
            rule = Beneath(kept, folder)
            libc.syscall(LANDLOCK_ADD, ruleset, 1, ctypes.byref(rule), 0)
            os.close(folder)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.syscall(LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


if __name__ == "__main__":
    main()
