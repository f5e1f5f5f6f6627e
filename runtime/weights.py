"""Weights: from the safetensors files of a checkpoint to the tensors that the graph names.

Enters the manifest's "weights" and "splits" objects and a checkpoint directory; leaves name -> tensor, one rank's
share of each. Headers are read first and every problem is told in one table, tensors that the model leaves unread
included (`unused` says which may stay); then the rows and columns of the share are
copied into their place. A file is opened anew for each piece of a tensor: safetensors maps files, and mapped pages
count as resident until the file is closed. So the peak is the share and one piece.

    weights = load_weights(manifest["weights"], Path("llama-2-13b"), splits=manifest["splits"], rank=1, device="cpu")
    weights["layers.0.attn.qkv.weight"]      # [1920, 5120] of 8 ranks, from three tensors of the checkpoint
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmc.compiler.checkpoint_files import indexed_files, nature, present
from llmc.compiler.diagnostics import UserError, one_line
from llmc.runtime.formats import in_format

CHUNK_BYTES = 64 << 20  # one piece: large reads, small beside any model
SUGGESTIONS = 20  # nearest names are looked for this often: each costs a pass over all names
UNFINISHED = ".llmc-convert.json"  # `llmc convert` removes it as its last step
SPLIT_AXIS = {"S(0)": 0, "S(1)": 1}  # by the manifest's "shard"; R is whole on every rank, P on rank 0
MOST_UNUSED = 20  # kinds of unread tensors in a message

# Names in safetensors headers -> torch
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


Run = tuple[int, int]  # start and count on an axis


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of the checkpoint."""

    file: Path
    name: str
    dtype: str  # as in the header, a key of DTYPES
    shape: tuple[int, ...]


def load_weights(
    manifest_weights: Mapping[str, Mapping[str, Any]],
    model_path: Path | str,
    *,
    splits: Mapping[str, Mapping[str, Any]] | None = None,
    unused: Iterable[str] = (),
    device: torch.device | str = "cpu",
    rank: int = 0,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Every weight of the graph, or this rank's share of it. Two weights that are made of the same pieces (tied
    embeddings) are one tensor. `splits` and `unused` are the manifest's: an artifact for one rank has no splits, and
    tensors that a name of `unused` fits may stay unread."""
    splits = splits or {}
    check_rank(rank, splits)
    stored = read_headers(Path(model_path))
    check(manifest_weights, stored, Path(model_path), unused)
    made: dict[str, torch.Tensor] = {}
    result: dict[str, torch.Tensor] = {}
    with progress_bar("weights", len(manifest_weights), progress) as advance:
        for name, weight in manifest_weights.items():
            # "tp" is how the author asked for the share; "shard" and "splits" say what the share is.
            key = json.dumps({k: v for k, v in weight.items() if k != "tp"}, sort_keys=True)
            if key not in made:
                made[key] = in_format(_load(weight, stored, splits, rank).to(device), weight["format"])
            result[name] = made[key]
            advance(1)
    return result


def check_rank(rank: int, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """All splits of an artifact are over its world size."""
    ranks = [len(split["ranks"]) for split in splits.values()]
    if rank < 0 or any(rank >= count for count in ranks):
        legal = f"has the ranks 0 to {min(ranks) - 1}" if ranks else "has no rank below 0"
        raise UserError(f"rank {rank}: the artifact {legal}", hint="compile it for the world size that is started")


def _load(
    weight: Mapping[str, Any], stored: Mapping[str, Stored], splits: Mapping[str, Mapping[str, Any]], rank: int
) -> torch.Tensor:
    """The rank's shares of the sources one after the other on `axis`, each followed by its padding, in the graph's
    dtype. Axes are those of the checkpoint."""
    target = torch.empty(weight["shape"], dtype=getattr(torch, weight["dtype"]))
    if weight["shard"] == "P" and rank:
        return target.zero_()  # the sum over the ranks counts it once
    view = target.t() if weight["transpose"] else target
    axis, at = weight["axis"], 0
    split_axis = SPLIT_AXIS.get(weight["shard"])
    for i, source in enumerate(weight["sources"]):
        shape = _taken(source)
        box = [(0, size) for size in shape]  # what the rank holds of it: start and count on each axis
        if split_axis is not None:
            split = splits[weight["splits"][i if split_axis == axis else 0]]
            shape[split_axis], box[split_axis] = split["local"], split["ranks"][rank]
        part = view.narrow(axis, at, shape[axis])
        held = part[tuple(slice(count) for _, count in box)]
        if held.shape != part.shape:
            part.zero_()
        if held.numel():
            _copy(stored[source["tensor"]], source["rows"], box, held)
        at += shape[axis]
    return target


def _taken(source: Mapping[str, Any]) -> list[int]:
    """Shape of what a source gives to all ranks together."""
    rows, shape = source["rows"], source["shape"]
    return [rows["groups"] * rows["size"], *shape[1:]] if rows else list(shape)


def _copy(source: Stored, rows: Mapping[str, int] | None, box: Sequence[Run], target: torch.Tensor) -> None:
    """Checkpoint -> target, which has the box's shape."""
    # Columns do not count: those of a rank lie on every page of the rows.
    row_bytes = math.prod(source.shape[1:]) * DTYPES[source.dtype].itemsize
    columns = [slice(start, start + count) for start, count in box[1:]]
    into = 0
    for start, count in _pieces(rows or {"stride": 0, "offset": 0, "size": source.shape[0]}, box[0], row_bytes):
        with opened(source.file) as file:
            piece = file.get_slice(source.name)[(slice(start, start + count), *columns)]
            target[into : into + count].copy_(piece)
        into += count


def _pieces(rows: Mapping[str, int], run: Run, row_bytes: int) -> Iterator[Run]:
    """Where a run of a source's rows lies in the checkpoint: `size` rows from `offset` in each group of `stride`."""
    most = max(1, CHUNK_BYTES // row_bytes)
    at, end = run[0], sum(run)
    while at < end:
        group, inside = divmod(at, rows["size"])
        count = min(most, rows["size"] - inside, end - at)
        yield group * rows["stride"] + rows["offset"] + inside, count
        at += count


# ---- headers


def read_headers(model_path: Path) -> dict[str, Stored]:
    """Tensor name -> where it is stored, over all files. A name in two files is an error."""
    stored: dict[str, Stored] = {}
    twice: list[str] = []
    for file in weight_files(model_path):
        for name, tensor in read_header(file).items():
            if name in stored:
                twice.append(f"  {name}: {stored[name].file.name} and {file.name}")
            stored[name] = tensor
    if twice:
        raise UserError(
            "\n".join([f"{len(twice)} tensors of {model_path} are stored in two files:", *twice]),
            hint="keep one of the two sets of weights in the directory",
            code="E503",
        )
    return stored


def weight_files(model_path: Path) -> list[Path]:
    """The index's files, else model.safetensors, else every *.safetensors of the directory."""
    check_directory(model_path)
    index = model_path / "model.safetensors.index.json"
    if present(index, code="E503"):
        return _indexed(index)
    if present(model_path / "model.safetensors", code="E503"):
        return [model_path / "model.safetensors"]
    files = sorted(p for p in model_path.glob("*.safetensors") if not p.name.startswith("."))
    if files:
        return files
    others = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in model_path.glob(kind))
    if others:
        raise UserError(
            f"{model_path} holds no *.safetensors, but {', '.join(others[:3])}",
            hint=f"llmc convert --model-path {model_path}",
            code="E503",
        )
    raise UserError(f"{model_path} holds no weights (*.safetensors)", code="E503")


def check_directory(model_path: Path) -> None:
    """A directory in which no conversion is under way or was interrupted: half of its weights may be the old ones."""
    if not model_path.is_dir():
        raise UserError(
            f"{model_path} is not a directory" if model_path.exists() else f"{model_path} does not exist",
            hint="--model-path: the checkpoint's directory",
            code="E503",
        )
    try:
        unfinished = UNFINISHED in os.listdir(model_path)
    except OSError as error:
        raise UserError(f"{model_path} cannot be read: {error.strerror}", code="E503") from None
    if unfinished:
        raise UserError(
            f"{model_path} holds an unfinished conversion ({UNFINISHED})",
            hint="repeat the `llmc convert` command, which continues it",
            code="E503",
        )


def _indexed(index: Path) -> list[Path]:
    files = indexed_files(index, ".safetensors", code="E503")
    missing = [file.name for file in files if not present(file, code="E503")]
    if missing:
        raise UserError(
            f"{index} names {len(files)} files, and {len(missing)} of them are missing: {', '.join(missing)}",
            hint="the download is incomplete",
            code="E503",
        )
    return files


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one file; safetensors compares what the header says with the file's length."""
    present(file, code="E503")
    with opened(file) as reader:
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 (not a mapping)
        return {
            name: Stored(file=file, name=name, dtype=s.get_dtype(), shape=tuple(s.get_shape()))
            for name, s in slices.items()
        }


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The file as safetensors reads it; UserError for what it refuses."""
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except SafetensorError as error:
        if file.stat().st_size and (other := nature(file, binary=True)):
            raise _damaged(file, f"it is {other[0]}", hint=other[1]) from None
        raise _damaged(file, f"safetensors says {error} ({file.stat().st_size} bytes)") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}", code="E503") from None


def _damaged(file: Path, what: str, hint: str = "download or convert it again") -> UserError:
    return UserError(f"{file} is damaged: {what}", hint=hint, code="E503")


# ---- the table of problems


def check(
    weights: Mapping[str, Mapping[str, Any]],
    stored: Mapping[str, Stored],
    model_path: Path,
    unused: Iterable[str] = (),
) -> None:
    """Every missing, mis-shaped, mis-typed and unread tensor in one error. A model that leaves tensors out computes
    something else than they were made for, unless its `unused` names them or they are copies of what it reads."""
    wanted: dict[str, tuple[list[int], str]] = {}
    for weight in weights.values():
        for source in weight["sources"]:
            wanted[source["tensor"]] = (list(source["shape"]), weight["dtype"])
    patterns = list(unused)
    unread = [name for name in stored if name not in wanted]
    extra = [name for name in unread if not any(fnmatchcase(name, p) for p in patterns)]
    rows = []
    suggestions = 0
    for name, (shape, dtype) in wanted.items():
        found = stored.get(name)
        if found is None:
            suggestions += 1
            near = _nearest(name, unread) if suggestions <= SUGGESTIONS else ""
            rows.append((name, "missing", f"{dtype} {shape}", f"nearest: {near}" if near else "-"))
        elif list(found.shape) != shape:
            rows.append((name, "shape", str(shape), f"{list(found.shape)} in {found.file.name}"))
        elif not _castable(found.dtype, dtype):
            rows.append((name, "dtype", dtype, f"{found.dtype} in {found.file.name}"))
    if extra and not rows:
        shared = _shared(weights)
        extra = [name for name in extra if not any(_equal(stored[name], stored[other]) for other in shared)]
    if not (rows or extra):
        return
    kinds = _kinds(extra)
    problems, hint = [], ""
    if rows:
        problems.append(f"{len(rows)} of the {len(wanted)} tensors that the model needs do not fit {model_path}")
    if extra:
        problems.append(f"{len(extra)} tensors of {model_path} are not used by the model")
    if not rows:
        pattern = json.dumps(kinds[0][0])
        hint = f"another model (--graph); where they change nothing, its YAML says so:  unused: {{{pattern}: why}}"
    rows += [(names[0], "unused", "-", _kind(stored[names[0]], kind, names)) for kind, names in kinds[:MOST_UNUSED]]
    more = [f"  and {len(kinds) - MOST_UNUSED} more kinds of unused tensors"] if len(kinds) > MOST_UNUSED else []
    lines = [f"{'; '.join(problems)}:", *table(("tensor", "problem", "needed", "found"), rows), *more]
    raise UserError("\n".join(lines), hint=hint, code="E503")


def _kinds(names: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Names that differ only in numbers together: ("model.layers.*.q_norm.weight", [...])."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"(?<![^.])[0-9]+(?![^.])", "*", name), []).append(name)
    return [(kind if len(found) > 1 else found[0], found) for kind, found in kinds.items()]


def _kind(first: Stored, kind: str, names: Sequence[str]) -> str:
    more = f"; {len(names) - 1} more of the kind {kind}" if len(names) > 1 else ""
    return f"{first.dtype} {list(first.shape)} in {first.file.name}{more}"


def _shared(weights: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tensors that several weights are made of: tied embeddings."""
    uses = Counter(
        source["tensor"] for weight in weights.values() for source in weight["sources"] if not source["rows"]
    )
    return [name for name, count in uses.items() if count > 1]


def _equal(a: Stored, b: Stored) -> bool:
    """The same numbers: formats without aliases store a tied embedding under both of its names."""
    if (a.dtype, a.shape) != (b.dtype, b.shape) or not a.shape or a.dtype not in DTYPES:
        return False
    rows = {"stride": 0, "offset": 0, "size": a.shape[0]}
    row_bytes = math.prod(a.shape[1:]) * DTYPES[a.dtype].itemsize
    for start, count in _pieces(rows, (0, a.shape[0]), max(1, row_bytes)):
        with opened(a.file) as one, opened(b.file) as other:
            pieces = (reader.get_slice(t.name)[start : start + count] for reader, t in ((one, a), (other, b)))
            if not torch.equal(*pieces):
                return False
    return True


def _castable(found: str, wanted: str) -> bool:
    """Any float becomes any float; other numbers must be stored as they are used."""
    have, want = DTYPES.get(found), getattr(torch, wanted)
    return have is not None and (have == want or (have.is_floating_point and want.is_floating_point))


def _nearest(name: str, names: Sequence[str]) -> str:
    twin = [n for n in names if n.endswith(f".{name}") or name.endswith(f".{n}")]  # a prefix too many or too few
    close = twin or difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return close[0] if close else ""


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Plain columns: names are never cut, so that they can be searched for."""
    rows = [tuple(one_line(cell) for cell in row) for row in rows]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]


@contextmanager
def progress_bar(what: str, total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """rich on a terminal's stderr, nothing elsewhere."""
    if not (wanted and sys.stderr and sys.stderr.isatty()):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
