"""`llmc convert`: a checkpoint of another format becomes a Hugging Face directory with safetensors.

Enters: a directory with PyTorch `*.bin` files, or one GGUF file. Leaves: `*.safetensors` (with an index when there are
several), for GGUF also config and tokenizer, and a `Summary`.

    llmc convert weights/llama-7b                    # pytorch_model.bin -> model.safetensors, beside it
    llmc convert smollm2.Q4_1.gguf --output smollm2  # config.json, tokenizer.json, model.safetensors, ...

`pytorch_bin.py` and `gguf.py` read a source into a `Plan` (plan.py); this file writes plans. Tensors are written one
after the other, so memory holds one of them (GGUF: a slice of one). Until everything is written the files are called
`*.partial`, and `.llmc-convert.json` lists those that are complete with size and hash: the same command continues an
interrupted run. Then they get their names, `config.json` comes last, and the progress file goes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler import files
from llmc.compiler.checkpoint_files import nature, present
from llmc.compiler.diagnostics import UserError
from llmc.compiler.target.device import DTYPES
from llmc.compiler.terminal import columns, fold
from llmc.runtime.convert.gguf import plan_gguf
from llmc.runtime.convert.plan import PROGRESS_FILE, SAFETENSORS_DTYPES, Plan, Tensor, write_json
from llmc.runtime.convert.pytorch_bin import plan_bin

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000  # the shard size that Hugging Face used for years; copies and retries stay bearable


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was done; `str()` is the closing line."""

    source: Path
    target: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    dtypes: tuple[str, ...]
    continued: int = 0
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        kept = f", {self.continued} kept from an interrupted run" if self.continued else ""
        return (
            f"{self.source} -> {self.target}: {self.tensors} tensors ({', '.join(self.dtypes)}, "
            f"{_size(self.nbytes)}) in {files}{kept}"
        )


def add_convert_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `llmc convert`. `--model_path` is the spelling of the original `convert_weights.py`."""
    parser.add_argument("source", nargs="?", type=Path, help="directory with *.bin weights, or a .gguf file")
    parser.add_argument("--model-path", "--model_path", type=Path, dest="model_path", help="the same as SOURCE")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="where to write; default: .bin next to the .bin files, .gguf in a directory of its name",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the result (default: as stored; GGUF blocks: float16)")
    parser.add_argument("--force", action="store_true", help="replace weights that are already in the output directory")
    parser.add_argument("--quiet", "--no-progress", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, also of problems")


def run(args: argparse.Namespace) -> int:
    """`llmc convert` with parsed flags; prints the closing line, or what is known of the result as one object."""
    if (args.source is None) == (args.model_path is None):
        raise UserError("convert needs one source: a directory with .bin weights, or a .gguf file", code="E601")
    source = args.source if args.source is not None else args.model_path
    summary = convert(source, args.output, dtype=args.dtype, progress=not (args.quiet or args.json), force=args.force)
    if args.json:
        facts = {**asdict(summary), "source": str(source), "target": str(summary.target)}
        print(json.dumps({"ok": True, **facts}, indent=1))
        return 0
    for warning in summary.warnings:
        print(fold(f"warning: {warning}", columns(sys.stderr)), file=sys.stderr)
    print(fold(str(summary), columns(sys.stdout)))
    return 0


def convert(
    source: Path,
    target: Path | None,
    *,
    dtype: str | None = None,
    progress: bool = True,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Summary:
    """Convert `source` into `target` (None: the default place). Raises UserError for everything the user can mend."""
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if target is not None and Path(target).exists() and not Path(target).is_dir():
        raise UserError(f"{target} is a file; the output must be a directory")
    if progress and sys.stderr and sys.stderr.isatty():
        print(
            fold(f"reading {source}", columns(sys.stderr)), file=sys.stderr
        )  # the vocabulary of a GGUF file takes seconds
    try:
        plan = _plan(Path(source), dtype, max_shard_bytes)
        return _write(plan, Path(target) if target is not None else plan.default_target, progress, force)
    except OSError as error:
        where = error.filename or target or source
        raise UserError(
            f"convert stopped at {where}: {error.strerror or error}",
            hint="mend that and run the same command again; finished files are kept",
        ) from error


def _plan(source: Path, dtype: str | None, max_shard_bytes: int) -> Plan:
    if not os.path.lexists(source):
        raise UserError(f"{source}: no such file or directory; convert reads a directory with .bin weights, or a .gguf")
    if source.is_dir():
        return plan_bin(source, dtype)
    present(source)
    with source.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return plan_gguf(source, dtype, max_shard_bytes)
    if source.suffix == ".bin":
        raise UserError(f"{source} is one file of a checkpoint", hint=f"convert its directory: {source.parent}")
    if other := nature(source, binary=True):
        raise UserError(f"{source} is not a GGUF file: it is {other[0]}", hint=other[1])
    raise UserError(f"{source} is not a GGUF file: it starts with {magic!r}, not b'GGUF'")


# Writing a plan


def _write(plan: Plan, target: Path, progress: bool, force: bool) -> Summary:
    in_place = target.exists() and target.resolve() == plan.source.resolve()
    finished = _finished(plan, target, in_place, force)
    kept = len(finished)
    _check_space(plan, target, finished)
    target.mkdir(parents=True, exist_ok=True)
    if not kept:
        _remove_weights(target, in_place)

    record = {**_identity(plan), "finished": finished}
    write_json(target / PROGRESS_FILE, record)
    with _progress_bar(plan, progress) as advance:
        for name, tensors in plan.files.items():
            if name in finished:
                advance(name, _bytes(tensors))
                continue
            digest, size = write_safetensors(target / f"{name}.partial", tensors, advance)
            finished[name] = {"size": size, "sha256": digest}
            write_json(target / PROGRESS_FILE, record)

    for name in plan.files:
        if (target / f"{name}.partial").exists():
            os.replace(target / f"{name}.partial", target / name)
    every = [tensor for tensors in plan.files.values() for tensor in tensors]
    if len(plan.files) > 1:
        weight_map = {tensor.name: name for name, tensors in plan.files.items() for tensor in tensors}
        write_json(target / INDEX_FILE, {"metadata": {"total_size": _bytes(every)}, "weight_map": weight_map})
    if not in_place:
        plan.side_files(target)
        write_json(target / "config.json", plan.config)
    (target / PROGRESS_FILE).unlink()
    return Summary(
        source=plan.source,
        target=target,
        files=tuple(plan.files),
        tensors=len(every),
        nbytes=_bytes(every),
        dtypes=tuple(sorted({tensor.dtype for tensor in every})),
        continued=kept,
        warnings=plan.warnings,
    )


def _identity(plan: Plan) -> dict[str, Any]:
    """What must be equal for a run to continue another one."""
    stats = [(path.name, path.stat()) for path in plan.inputs]
    return {
        "format": 1,
        "inputs": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "settings": dict(plan.settings),
        "files": list(plan.files),
    }


def _finished(plan: Plan, target: Path, in_place: bool, force: bool) -> dict[str, dict[str, Any]]:
    """Files that an interrupted run of the same conversion completed, verified by size and hash."""
    progress_file = target / PROGRESS_FILE
    if not present(progress_file):
        taken = [n for n in (*plan.files, INDEX_FILE) if (target / n).exists()] if in_place else _names(target)
        if taken and not force:
            raise UserError(
                f"{target} already holds {_some(taken)}",
                hint="give another --output, or --force to replace the weights there",
            )
        return {}
    try:
        record = files.read_json(progress_file)
    except files.Unreadable:
        record = {}
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("finished"), dict)
        or any(record.get(key) != value for key, value in _identity(plan).items())
    ):
        if not force:
            raise UserError(
                f"{target} holds an unfinished conversion of another source, or with other settings ({PROGRESS_FILE})",
                hint="finish that one, give another --output, or --force to start over",
            )
        return {}
    finished = {}
    for name, entry in record["finished"].items():
        for path in (target / f"{name}.partial", target / name):
            if name in plan.files and isinstance(entry, dict) and present(path) and _is_intact(path, entry):
                finished[name] = entry
                break
    return finished


def _is_intact(path: Path, entry: Mapping[str, Any]) -> bool:
    return path.stat().st_size == entry.get("size") and files.sha256_of(path) == entry.get("sha256")


def _remove_weights(target: Path, in_place: bool) -> None:
    """Start over: no config (so the directory is no model), no older weights that a loader could pick up."""
    if not in_place:
        (target / "config.json").unlink(missing_ok=True)
    (target / INDEX_FILE).unlink(missing_ok=True)
    for pattern in ("model*.safetensors", "*.partial"):
        for path in target.glob(pattern):
            path.unlink()


def _check_space(plan: Plan, target: Path, finished: Mapping[str, Any]) -> None:
    needed = sum(_bytes(tensors) for name, tensors in plan.files.items() if name not in finished)
    existing = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"{target} needs {_size(needed)}, but only {_size(free)} are free there",
            hint="free some space, give another --output, or a smaller --dtype",
        )


def write_safetensors(
    path: Path, tensors: Sequence[Tensor], advance: Callable[[str, int], None] = lambda name, count: None
) -> tuple[str, int]:
    """Write one file; returns its sha256 and size. All sizes are known before, so the header goes first and one chunk
    at a time follows: 8 bytes length of the header, JSON header padded to 8 bytes, values without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # "pt": transformers refuses files without it
    offset = 0
    for tensor in tensors:
        span = [offset, offset + tensor.nbytes]
        code, _ = SAFETENSORS_DTYPES[tensor.dtype]
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    path.unlink(missing_ok=True)  # never through a link that came with a checkpoint
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            file.write(piece)
        for tensor in tensors:
            before = file.tell()
            for chunk in tensor.chunks():
                data = _raw(chunk)
                digest.update(data)
                file.write(data)
                advance(tensor.name, len(data))
            if file.tell() - before != tensor.nbytes:
                raise AssertionError(f"{tensor.name}: wrote {file.tell() - before} bytes, planned {tensor.nbytes}")
        file.flush()
        os.fsync(file.fileno())
        return digest.hexdigest(), file.tell()


def _raw(chunk: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy when it is contiguous."""
    import torch

    return chunk.contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def _progress_bar(plan: Plan, wanted: bool) -> Iterator[Callable[[str, int], None]]:
    """Yields `advance(tensor name, bytes)`; draws only on a terminal."""
    if not wanted or not sys.stderr.isatty():
        yield lambda name, count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    shown = (BarColumn(20), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*shown, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=sum(map(_bytes, plan.files.values())))
        # The end of a name tells more than its beginning, and all of it leaves no room on a terminal of 80.
        yield lambda name, count: bar.update(task, advance=count, description=name[-30:])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
