"""PyTorch `.bin` checkpoints: enters a directory, leaves a `Plan` (see `plan.py`).

File names are those of the original converter: a leading `pytorch_` goes, `.bin` becomes `.safetensors`, one file out
for one file in. Every name of the `.bin` files is written with its own values, so tensors that share storage (tied
embeddings) are stored twice: readers then need not know which name stands for the other. Pickles are loaded with
`weights_only=True`: a file that wants to run code is refused.

    pytorch_model-00001-of-00002.bin -> model-00001-of-00002.safetensors
"""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler.diagnostics import UserError
from llmc.runtime.convert.plan import PROGRESS_FILE, SAFETENSORS_DTYPES, Plan, Tensor, read_json

if TYPE_CHECKING:
    import torch

# What training scripts leave beside the weights under the same suffix.
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.bin")
# Copied to --output: configuration and tokenizer, recognised by suffix. Weights of any format and indexes stay behind.
SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")


def plan_bin(source: Path, dtype: str | None) -> Plan:
    """Reads the headers of all files; values are read when they are written."""
    paths = _weight_files(source)
    load = lru_cache(maxsize=1)(_load)  # one file mapped at a time
    files: dict[str, tuple[Tensor, ...]] = {}
    owner: dict[str, Path] = {}
    for path in paths:
        name = path.name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"
        files[name] = tuple(
            Tensor(
                name=key,
                shape=tuple(value.shape),
                dtype=dtype if dtype and value.is_floating_point() else str(value.dtype).removeprefix("torch."),
                chunks=partial(_stored, load, path, key, dtype),
            )
            for key, value in load(path).items()
        )
        for tensor in files[name]:
            if tensor.name in owner:
                raise UserError(f"{path}: {tensor.name} is also in {owner[tensor.name].name}; a name must be unique")
            owner[tensor.name] = path
    config = read_json(source / "config.json") if (source / "config.json").exists() else {}
    if dtype and config:
        config["torch_dtype"] = dtype
    return Plan(
        source=source,
        inputs=tuple(paths),
        default_target=source,
        files=files,
        side_files=lambda target: _copy_small_files(source, target),
        config=config,
        settings={"kind": "bin", "dtype": dtype},
    )


def _stored(load: Callable[[Path], Any], path: Path, key: str, dtype: str | None) -> Iterator[torch.Tensor]:
    """Values of one tensor, read from its file when they are wanted."""
    return _values(load(path)[key], dtype)


def _weight_files(source: Path) -> list[Path]:
    """The files of the index if there is one, else `pytorch_model*.bin`, else every `.bin` that holds weights."""
    index = source / "pytorch_model.bin.index.json"
    if index.exists():
        content = read_json(index)
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index} has no weight_map of tensor names to file names")
        names = sorted(set(weight_map.values()))
        if outside := [name for name in names if Path(name).name != name or not name.endswith(".bin")]:
            raise UserError(f"{index} names {outside[0]!r}, which is not a .bin file of this directory")
        if missing := [name for name in names if not (source / name).is_file()]:
            raise UserError(f"{index} names files that are not there: {', '.join(missing)}", hint="download them")
        return [source / name for name in names]
    found = sorted(path for path in source.glob("*.bin") if not NOT_WEIGHTS.fullmatch(path.name))
    paths = [path for path in found if path.name.startswith("pytorch_model")] or found
    if paths:
        return paths
    if any(source.glob("*.safetensors")):
        raise UserError(f"{source} holds safetensors already; nothing to convert")
    if gguf := sorted(source.glob("*.gguf")):
        raise UserError(f"{source} holds no .bin weights", hint=f"give the GGUF file itself: {gguf[0]}")
    raise UserError(f"{source} holds no weights: no *.bin, *.safetensors or *.gguf file")


def _load(path: Path) -> Mapping[str, torch.Tensor]:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; a file that cannot be read is an error below
            # Files from before torch 1.6 are no zip archives and cannot be mapped; they are read whole.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if wants := re.search(r"GLOBAL ([\w.]+)|unrecognized function (.+)", str(error)):
            raise UserError(
                f"{path}: refused, because its pickle wants to use {wants[1] or wants[2]}; "
                "weights are tensors only, and such a file can run code of its author",
                hint="get the weights as safetensors, or from a source that you trust",
            ) from error
        operand = re.search(r"Unsupported operand \d+", str(error))
        raise UserError(
            f"{path} is not a PyTorch file of tensors ({operand[0] if operand else 'damaged pickle'})",
            hint="download it again",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} cannot be read as a PyTorch file: {reason}", hint="download it again") from error
    return _checked(path, content)


def _checked(path: Path, content: Any) -> Mapping[str, torch.Tensor]:
    import torch

    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds a {type(content).__name__}; expected a dictionary of names to tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            found = type(value).__name__
            raise UserError(f"{path}: entry {name!r} is a {found}; expected a dictionary of names to tensors only")
        if value.layout != torch.strided or str(value.dtype).removeprefix("torch.") not in SAFETENSORS_DTYPES:
            raise UserError(f"{path}: {name} has {value.dtype}, {value.layout}, which safetensors cannot hold")
    return content


def _values(value: torch.Tensor, dtype: str | None) -> Iterator[torch.Tensor]:
    import torch

    value = value.detach()
    yield value.to(getattr(torch, dtype)) if dtype and value.is_floating_point() else value


def _copy_small_files(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        weights_or_config = path.name.endswith(".index.json") or path.name in ("config.json", PROGRESS_FILE)
        if path.is_file() and path.suffix in SMALL_FILES and not weights_or_config:
            shutil.copyfile(path, target / path.name)
