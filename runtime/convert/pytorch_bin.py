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
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmc.compiler.checkpoint_files import indexed_files, nature, present, read_object
from llmc.compiler.diagnostics import UserError
from llmc.runtime.convert.plan import PROGRESS_FILE, SAFETENSORS_DTYPES, Plan, Tensor

if TYPE_CHECKING:
    import torch

# What training scripts leave beside the weights under the same suffix.
NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.bin")
MAX_REPEATS = 4  # tied embeddings are stored once and written twice
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
    config = read_object(source / "config.json") if present(source / "config.json") else {}
    if dtype and config:
        config["torch_dtype"] = dtype
    return Plan(
        source=source,
        inputs=tuple(paths),
        default_target=source,
        files=files,
        side_files=partial(_copy, _small_files(source)),
        config=config,
        settings={"kind": "bin", "dtype": dtype},
    )


def _stored(load: Callable[[Path], Any], path: Path, key: str, dtype: str | None) -> Iterator[torch.Tensor]:
    """Values of one tensor, read from its file when they are wanted."""
    return _values(load(path)[key], dtype)


def _weight_files(source: Path) -> list[Path]:
    """The files of the index if there is one, else `pytorch_model*.bin`, else every `.bin` that holds weights."""
    index = source / "pytorch_model.bin.index.json"
    if present(index):
        paths = indexed_files(index, ".bin")
        if missing := [path.name for path in paths if not present(path)]:
            raise UserError(f"{index} names files that are not there: {', '.join(missing)}", hint="download them")
        return paths
    found = sorted(path for path in source.glob("*.bin") if not NOT_WEIGHTS.fullmatch(path.name))
    paths = [path for path in found if path.name.startswith("pytorch_model")] or found
    if paths:
        return [path for path in paths if present(path)]
    if any(source.glob("*.safetensors")):
        raise UserError(f"{source} holds safetensors already; nothing to convert")
    if gguf := sorted(source.glob("*.gguf")):
        raise UserError(f"{source} holds no .bin weights", hint=f"give the GGUF file itself: {gguf[0]}")
    raise UserError(f"{source} holds no weights: no *.bin, *.safetensors or *.gguf file")


def _load(path: Path) -> Mapping[str, torch.Tensor]:
    import torch

    present(path)
    if other := nature(path, binary=True):
        raise UserError(f"{path} is {other[0]}, not a PyTorch file", hint=other[1])
    zipped = _is_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; a file that cannot be read is an error below
            # Files from before torch 1.6 are no zip archives and cannot be mapped; they are read whole.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if wants := re.search(r"GLOBAL ([\w.]+)|unrecognized function (.+)", str(error)):
            raise UserError(
                f"{path}: refused, because its pickle wants to use {wants[1] or wants[2]}; "
                "weights are tensors only, and such a file can run code of its author",
                hint="get the weights as safetensors, or from a source that you trust",
            ) from None
        operand = re.search(r"Unsupported operand \d+", str(error))
        raise UserError(
            f"{path} is not a PyTorch file of tensors ({operand[0] if operand else 'damaged pickle'})",
            hint="download it again",
        ) from None
    except Exception as error:  # a hostile pickle calls torch with anything; the memory that it asks for may not exist
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        if "weights_only" in reason:  # torch goes on to recommend what would run the file's code
            reason = "torch refuses to read it as tensors only"
        raise UserError(f"{path} cannot be read as a PyTorch file: {reason}", hint="download it again") from None
    return _checked(path, content)


def _is_archive(path: Path) -> bool:
    """False for a file from before torch 1.6. torch stores its records as they are, one after the other: UserError for
    compressed or shared ones, which may be of any size."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read as a PyTorch file: {error}", hint="download it again") from None
    names = {record.filename.partition("/")[2] for record in records}
    if "constants.pkl" in names:
        raise UserError(
            f"{path} is a TorchScript archive, a program and not only weights",
            hint="get the weights as safetensors, or save the state_dict of the model",
        )
    if "data.pkl" not in names:
        raise UserError(f"{path} is a zip archive, but not one of PyTorch: it holds {', '.join(sorted(names)[:3])}")
    if packed := [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]:
        raise UserError(f"{path}: {packed[0]} is compressed, as PyTorch never does", hint="save it again with torch")
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise UserError(f"{path}: its records have more bytes than the file", hint="download it again")
    return True


def _checked(path: Path, content: Any) -> Mapping[str, torch.Tensor]:
    import torch

    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds a {type(content).__name__}; expected a dictionary of names to tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            found = type(value).__name__
            raise UserError(f"{path}: entry {name!r} is a {found}; expected a dictionary of names to tensors only")
        if name == "__metadata__" or any("\ud800" <= c <= "\udfff" for c in name):
            raise UserError(f"{path}: {name!r} cannot be the name of a tensor in a safetensors file")
        if value.layout != torch.strided or str(value.dtype).removeprefix("torch.") not in SAFETENSORS_DTYPES:
            raise UserError(f"{path}: {name} has {value.dtype}, {value.layout}, which safetensors cannot hold")
        if value.device.type != "cpu" or value.is_nested or type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise UserError(f"{path}: {name} is not a plain tensor, but {type(value).__name__} on {value.device}")
        if value.nbytes > (stored := value.untyped_storage().nbytes()):
            raise UserError(
                f"{path}: {name} repeats its values: {value.dtype} {list(value.shape)} with strides "
                f"{list(value.stride())} needs {value.nbytes} bytes, and {stored} are stored",
                hint="save it as a tensor of its own: .contiguous()",
            )
    if (total := sum(value.nbytes for value in content.values())) > MAX_REPEATS * path.stat().st_size:
        raise UserError(
            f"{path}: its {len(content)} tensors have {total} bytes, more than {MAX_REPEATS} times the file: "
            "they share their values",
            hint="save each as a tensor of its own, or only one of them",
        )
    return content


def _values(value: torch.Tensor, dtype: str | None) -> Iterator[torch.Tensor]:
    import torch

    value = value.detach().resolve_neg()  # a pickle can say of a tensor that its sign is to be turned
    yield value.to(getattr(torch, dtype)) if dtype and value.is_floating_point() else value


def _small_files(source: Path) -> list[Path]:
    names = [path for path in sorted(source.iterdir()) if path.suffix in SMALL_FILES and not path.is_dir()]
    left = ("config.json", PROGRESS_FILE)
    return [path for path in names if not path.name.endswith(".index.json") and path.name not in left and present(path)]


def _copy(files: Sequence[Path], target: Path) -> None:
    for path in files:
        shutil.copyfile(path, target / path.name)
