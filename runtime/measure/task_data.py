"""Data of lm-eval's tasks from files of the user: nothing is downloaded, and no code of a data set runs.

    with from_files(Path("data"), ["boolq"], one=True, run_code=False):
        lm_eval.tasks.TaskManager().load(["boolq"])         # reads data/boolq/validation.jsonl

A task names a data set of huggingface.co (`aps/super_glue`), perhaps a subset (`boolq`), and splits (`validation`). The
files of a split are found as they lie after `hf download`, or as one file:

    DIR/TASK/SPLIT.jsonl                          .jsonl, .json, .csv or .parquet
    DIR/TASK/SUBSET/SPLIT.jsonl
    DIR/TASK/SUBSET/SPLIT-00000-of-00001.parquet  also in a folder data/

TASK is the task as --tasks names it or as lm-eval does, or the data set with or without its owner; or DIR has the
files itself.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import evaluate
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from llmc.compiler.diagnostics import UserError
from llmc.compiler.files import Unreadable, parse_json
from llmc.runtime.measure.generated_code import CodeEval

ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
READERS = ("json", "csv", "parquet")  # data sets of this name are files that the task's own YAML names


@contextlib.contextmanager
def from_files(folder: Path | None, names: Sequence[str], *, one: bool, run_code: bool) -> Iterator[list[Splits]]:
    """In it lm-eval finds data sets in `folder` only, below the folders of `names`; `one`: what is loaded is one task,
    whose files may lie there without a subset's folder. And of metrics that are scripts it finds `code_eval`, where
    generated code may run. Yields what was found, in order."""
    found: list[Splits] = []

    def load(path: str, name: str | None = None, **more: Any) -> Splits:
        if path in READERS and isinstance(more.get("data_files"), (str, list, dict)):
            found.append(Splits(named_files(more["data_files"]), "the data_files of the task's YAML"))
        else:
            found.append(find(folder, path, name, names, one=one))
        return found[-1]

    def metric(name: str, *_: Any, **__: Any) -> CodeEval:
        if name != "code_eval":
            raise UserError(f"the metric {name} is a script that is downloaded and run, which is not done here")
        if not run_code:
            raise UserError(
                f"{names[0]} runs programs that the model writes",
                hint="--run-generated-code lets it, in a process with little time and memory, no network and an empty "
                "directory",
            )
        return CodeEval()

    before = datasets.load_dataset, evaluate.load
    datasets.load_dataset, evaluate.load = load, metric
    try:
        yield found
    finally:
        datasets.load_dataset, evaluate.load = before


class Splits(dict):
    """Split -> its documents, read when they are asked for. Of one that has no file there are none, which is fine
    where only examples that nobody asks for would come of it; `missing` names such splits."""

    def __init__(self, files: Mapping[str, Sequence[Path]], looked_for: str) -> None:
        super().__init__()
        self.files, self.looked_for, self.missing = files, looked_for, list[str]()

    def __missing__(self, split: str) -> datasets.Dataset:
        if split not in self.files:
            self.missing.append(split)
            return datasets.Dataset.from_dict({})
        tables = [read_table(path) for path in self.files[split]]
        self[split] = datasets.Dataset(pyarrow.concat_tables(tables, promote_options="default"))
        return self[split]


def find(folder: Path | None, path: str, name: str | None, names: Sequence[str], *, one: bool) -> Splits:
    """Files of each split of a data set (`path`) or one of its subsets (`name`)."""
    what = f"{path}{f', subset {name}' if name else ''}"
    if folder is None:
        raise UserError(
            f"{names[0]} needs the data set {what}", hint="--data DIR names the folder that holds its files"
        )
    bases = list(dict.fromkeys([*names, path, path.rpartition("/")[2], ""]))
    inner = [name] if name else []
    inner += [""] if one or not name else []
    inner += [path.rpartition("/")[2], "default"] if not name else []
    tried: list[Path] = []
    for base in bases:
        for place in (matching(folder, base) / one for one in inner):
            tried.append(place)
            if files := split_files(place) or split_files(place / "data"):
                return Splits(files, f"{place}/ (data set {what})")
    shown = ", ".join(dict.fromkeys(f"{place.relative_to(folder)}/" for place in tried))
    raise UserError(
        f"{names[0]}: no files of the data set {what} in {folder}; looked for SPLIT.jsonl, .csv or .parquet (SPLIT as "
        f"validation or test) in its folders {shown}",
        hint=f"get them from huggingface.co/datasets/{path} (its licence is between you and its owner): "
        f"hf download --repo-type dataset {path} --local-dir {folder / names[0]}",
    )


def matching(folder: Path, base: str) -> Path:
    """`folder/base`, also where upper and lower case differ."""
    if not base:
        return folder
    same = (one for one in sorted(folder.glob("*")) if one.name.lower() == base.lower() and one.is_dir())
    return folder / base if (folder / base).is_dir() else next(same, folder / base)


def split_files(place: Path) -> dict[str, list[Path]]:
    """Split -> files: SPLIT.ext, SPLIT-00000-of-00002.ext, SPLIT/0000.ext."""
    found: dict[str, list[Path]] = {}
    if not place.is_dir():
        return found
    for path in sorted(place.iterdir()):
        if path.suffix.lower() in ENDINGS and path.is_file():
            head, _, parts = path.stem.partition("-")
            if not parts or is_part(parts):
                found.setdefault(head, []).append(path)
    for path in sorted(place.glob("*/[0-9][0-9][0-9][0-9].parquet")):
        found.setdefault(path.parent.name, []).append(path)
    for split, files in found.items():
        whole = [path for path in files if path.stem == split]
        if whole and len(files) > 1:
            raise UserError(
                f"{place}: {' and '.join(path.name for path in files)} are both files of the split {split}",
                hint="leave one of them there",
            )
    return found


def is_part(text: str) -> bool:
    number, of, count = text.partition("-of-")
    return bool(of) and number.isdecimal() and count[:5].isdecimal()


def named_files(said: Any) -> dict[str, list[Path]]:
    """`data_files` of a task's YAML, as the library datasets takes it: split -> file or files."""
    by_split = said if isinstance(said, dict) else {"train": said}
    files = {str(k): [Path(one) for one in ([v] if isinstance(v, str) else v)] for k, v in by_split.items()}
    for path in (one for some in files.values() for one in some):
        if not path.is_file():
            raise UserError(f"the task's data_files name {path}: there is no such file", hint="nothing is downloaded")
    return files


def read_table(path: Path) -> pyarrow.Table:
    try:
        match path.suffix.lower():
            case ".parquet":
                return pyarrow.parquet.read_table(path)
            case ".csv":
                return pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
            case ".json":
                return as_table(json_rows(path))
            case _:  # only line feeds end a line: JSON texts may hold U+2028
                lines = enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1)
                return as_table([json_row(line, f"{path}:{n}") for n, line in lines if line.strip()])
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def json_rows(path: Path) -> list[dict[str, Any]]:
    """A list of objects, or an object that holds one: {"data": [...]}; or an object a line."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except ValueError:
        return [json_row(line, f"{path}:{n}") for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    inside = [v for v in value.values() if is_rows(v)] if isinstance(value, dict) else []
    rows = inside[0] if inside else [value] if isinstance(value, dict) else value
    if not is_rows(rows):
        raise UserError(f"{path}: expected a list of objects; found {text[:60]}")
    return rows


def is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def as_table(rows: Sequence[Mapping[str, Any]]) -> pyarrow.Table:
    """A field that an object does not have is None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])


def json_row(line: str, place: str) -> dict[str, Any]:
    try:
        value = parse_json(line)
    except Unreadable as error:
        raise UserError(f"{place}: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: expected an object; found {line[:60]}")
    return value
