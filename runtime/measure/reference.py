"""The checkpoint's own model code, transformers, as it computes the values that a compiled model computes.

    o_proj = {"tensor": "model.layers.0.self_attn.o_proj.weight", "rows": None}
    core = {"what": "input", "argument": "", "parts": [o_proj]}
    Reference(path, torch.float32).values({"layers.0.attn.core": core}, tokens)         # name -> [tokens, width]

Which value is which follows from the names of weights (`stands_for` in compiler/passes/tap.py). No code of a checkpoint
is run: a model that transformers does not have itself has no reference here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from llmc.compiler.diagnostics import UserError
from llmc.runtime.foreign import no_questions, quiet_transformers
from llmc.runtime.measure.compare import by_row
from llmc.runtime.weights import check_directory

ROPE = "apply_rotary_pos_emb"
WORDS = {"output": "output of", "input": "input of", "embedding": "rows of", "activation": "activation in"}


class Double(TorchFunctionMode):
    """Where a model says float32 for precision, it gets float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)


class Reference:
    """A model of transformers in one dtype. `rounded`: tensor of the checkpoint -> the dtype that the compiled model
    keeps it in, whose numbers are computed with; `other` is that of tensors it does not name."""

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        *,
        rounded: Mapping[str, torch.dtype] | None = None,
        other: torch.dtype | None = None,
    ) -> None:
        self.path, self.dtype = path, dtype
        self.model = load(path, torch.float32 if dtype is torch.float64 else dtype)
        self.parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        if rounded is not None:
            self._round(rounded, other or dtype)
        if dtype is torch.float64:
            self._widen()
        self.modules = dict(self.model.named_modules())
        self.code = sys.modules[type(self.model).__module__]

    def _round(self, rounded: Mapping[str, torch.dtype], other: torch.dtype) -> None:
        known = {self._spelled(name): dtype for name, dtype in rounded.items()}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(parameter.to(known.get(name, other)))

    def _spelled(self, name: str) -> str:
        """A checkpoint of the bare decoder has names without the prefix that transformers puts in front."""
        prefix = f"{self.model.base_model_prefix}."
        return name if name in self.parameters else prefix + name

    def _widen(self) -> None:
        """float64, with frequencies of rope made anew: transformers makes them in float32 whatever the dtype."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        self.model.double()
        for module in self.model.modules():
            if "inv_freq" not in dict(module.named_buffers(recurse=False)):
                continue
            kind = getattr(module, "rope_type", "default")
            make = ROPE_INIT_FUNCTIONS.get(kind) or getattr(module, "compute_default_rope_parameters", None)
            if make is not None:
                with Double():
                    module.inv_freq, module.attention_scaling = make(module.config)

    def module_of(self, tensor: str) -> str | None:
        """The module that a tensor of the checkpoint belongs to, by name."""
        name = tensor.rpartition(".")[0]
        return next((n for n in (name, f"{self.model.base_model_prefix}.{name}") if n in self.modules), None)

    def counterpart(self, stands_for: Mapping[str, Any] | None) -> str | None:
        """In words what of transformers it is; None where there is nothing."""
        if stands_for is None:
            return None
        names = [self._name(stands_for, part["tensor"]) for part in stands_for["parts"]]
        if not all(names):
            return None
        if stands_for["what"] == "rope":
            return f"{ROPE} ({stands_for['argument']}) in {names[0]}"
        if stands_for["what"] == "activation" and not self._activation(str(names[0])):
            return None
        some = " (some columns)" if any(part["rows"] for part in stands_for["parts"]) else ""
        some = "" if stands_for["what"] in ("input", "activation") else some
        return f"{WORDS[stands_for['what']]} {', '.join(dict.fromkeys(map(str, names)))}{some}"

    def _name(self, stands_for: Mapping[str, Any], tensor: str) -> str | None:
        name = self.module_of(tensor)
        if name is None:
            return None
        if stands_for["what"] in ("rope", "activation"):
            return name.rpartition(".")[0]
        if stands_for["what"] == "output" and isinstance(
            self.modules[name], nn.Embedding
        ):  # tied: the head has no tensor
            head = self.model.get_output_embeddings()
            return next((n for n, module in self.modules.items() if module is head), None)
        return name

    def _activation(self, holder: str) -> nn.Module | None:
        """The one module in there that has no weights and nothing inside: the function between two linears."""
        plain = [m for m in self.modules[holder].children() if not list(m.parameters()) and not list(m.children())]
        return plain[0] if len(plain) == 1 else None

    @torch.no_grad()
    def values(self, wanted: Mapping[str, Mapping[str, Any]], tokens: Sequence[int]) -> dict[str, Tensor]:
        """name -> [tokens, width] for each that has a counterpart, from one forward of this sequence alone."""
        seen: dict[tuple[str, str, str], Tensor] = {}
        need: set[tuple[str, str, str]] = set()
        plan: dict[str, list[tuple[tuple[str, str, str], Any]]] = {}
        for name, stands_for in wanted.items():
            parts = []
            for part in stands_for["parts"]:
                module = str(self._name(stands_for, part["tensor"]))
                what = "output" if stands_for["what"] == "embedding" else stands_for["what"]
                parts.append(((what, module, stands_for["argument"]), part["rows"]))
                if what in ("input", "rope", "activation"):  # of the value itself: the tensors only tell where
                    parts = [(parts[0][0], None)]
            need.update(key for key, _ in parts)
            plan[name] = parts
        with self._watched(need, seen):
            ids = torch.tensor([list(tokens)])
            with Double() if self.dtype is torch.float64 else contextlib.nullcontext():
                self.model(input_ids=ids, use_cache=False)
        found: dict[str, Tensor] = {}
        for name, parts in plan.items():
            if all(key in seen for key, _ in parts):
                pieces = [columns(seen[key], rows) for key, rows in parts]
                found[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
        return found

    @contextlib.contextmanager
    def _watched(self, need: set[tuple[str, str, str]], seen: dict[tuple[str, str, str], Tensor]) -> Iterator[None]:
        """Hooks on modules, and the model's rope function wrapped, for one forward."""
        handles = []
        inside: list[str] = []  # the attention that computes now
        original: Callable | None = getattr(self.code, ROPE, None)

        def keep(key: tuple[str, str, str], value: Any) -> None:
            value = value[0] if isinstance(value, tuple) else value
            seen.setdefault(key, value.detach()[0].reshape(value.shape[1], -1).clone())

        def rotated(*args: Any, **kwargs: Any) -> Any:
            assert original is not None
            q, k = original(*args, **kwargs)
            for argument, value in (("q", q), ("k", k)):
                if inside and ("rope", inside[-1], argument) in need:
                    keep(("rope", inside[-1], argument), value.transpose(1, 2))  # [1, H, T, D] -> [1, T, H, D]
            return q, k

        def hook(module: nn.Module, run: Callable, **options: Any) -> None:
            handles.append(module.register_forward_hook(run, **options))

        for key in sorted(need):
            what, name, _ = key
            module = self.modules[name]
            if what == "output":
                hook(module, lambda m, args, out, key=key: keep(key, out))
            elif what == "input":
                hook(module, lambda m, args, kw, out, key=key: keep(key, [*args, *kw.values()][0]), with_kwargs=True)
            elif what == "activation" and (function := self._activation(name)):
                hook(function, lambda m, args, out, key=key: keep(key, out))
        for name in {name for what, name, _ in need if what == "rope"}:
            module = self.modules[name]
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: inside.append(name)))
            hook(module, lambda m, args, out: inside.pop() and None)
        try:
            if original is not None:
                setattr(self.code, ROPE, rotated)
            yield
        finally:
            if original is not None:
                setattr(self.code, ROPE, original)
            for handle in handles:
                handle.remove()


def coarser(a: str, b: str) -> str:
    """The dtype with the shorter mantissa."""
    return max(a, b, key=lambda dtype: torch.finfo(getattr(torch, dtype)).eps)


def columns(value: Tensor, rows: Mapping[str, int] | None) -> Tensor:
    """The columns that some rows of a weight make: in each of `groups` runs of `stride`, `size` from `offset`."""
    if rows is None:
        return value
    starts = [group * rows["stride"] + rows["offset"] for group in range(rows["groups"])]
    return torch.cat([value[:, start : start + rows["size"]] for start in starts], 1)


def load(path: Path, dtype: torch.dtype) -> Any:
    """The model as a user of transformers loads it. UserError where it cannot be had without foreign code."""
    check_directory(path)
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UserError(
            "transformers is not installed, and it is what a trace compares with",
            hint="pip install transformers; or --against DIR, another artifact or a dump",
        ) from None
    try:
        with no_questions(), quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, trust_remote_code=False, local_files_only=True, low_cpu_mem_usage=True
            )
    except Exception as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"transformers cannot load {path}: {why}",
            hint="compare with another artifact or a dump instead (--against)",
        ) from None
    return model.eval()


class Original:
    """transformers as the side that a compiled model is compared with (`compare.Side`)."""

    def __init__(
        self,
        path: Path,
        manifest: Mapping[str, Any],
        tokens: Sequence[Sequence[int]],
        lengths: Sequence[int],
        advance: Callable[[int], None] = lambda prompts: None,
        *,
        other_dtype: str = "",
    ) -> None:
        """Both runs over all prompts, one after the other. `lengths`: tokens of each that are read in prefill.
        `other_dtype`: what the model is compared with was run in another dtype; then errors are those of the coarser
        one, of its rounded weights too."""
        self.traced = coarser(manifest["dtype"], other_dtype or manifest["dtype"])
        traced = getattr(torch, self.traced)
        phases = [manifest["phases"][phase] for phase in ("decode", "prefill")]  # of prefill, where both have a value
        entries = {tap["name"]: tap for phase in phases for tap in phase["taps"]}
        rounded = {
            source["tensor"]: getattr(torch, weight["dtype"])
            for weight in manifest["weights"].values()
            for source in weight["sources"]
        }
        better = torch.float64 if traced is torch.float32 else torch.float32
        same = other_dtype in ("", manifest["dtype"])
        exact = Reference(path, better, rounded=rounded if same else None, other=traced)
        self.counterparts = {name: exact.counterpart(entry["stands_for"]) for name, entry in entries.items()}
        wanted = {name: entry["stands_for"] for name, entry in entries.items() if self.counterparts[name]}
        few = {name for name, entry in entries.items() if entry["shape"][0] == "B" and name in wanted}
        self.exact, self.low, usual = [], [], dict.fromkeys(wanted, (0.0, 0))
        for prompt in tokens:
            self.exact.append(exact.values(wanted, prompt))
            advance(1)
        self.counterparts |= {name: None for name in wanted if any(name not in found for found in self.exact)}
        del exact
        low = Reference(path, traced)
        for prompt, length, truth in zip(tokens, lengths, self.exact, strict=True):
            found = low.values(wanted, prompt)
            for name in truth:
                t = truth[name].double()
                usual[name] = (usual[name][0] + by_row(found[name].double() - t, t), usual[name][1] + len(t))
            # a value of the last tokens only is asked for at these alone: logits of all tokens are large
            first = length - 1
            for values in (truth, found):
                for name in few & set(values):
                    values[name] = values[name][first:].clone()
            self.low.append(found)
            advance(1)
        self.few, self.lengths = few, lengths
        self.errors = {name: (error / rows) ** 0.5 if rows else 0.0 for name, (error, rows) in usual.items()}

    def counterpart(self, phase: str, entry: Mapping[str, Any]) -> str | None:
        return self.counterparts[entry["name"]]

    def truth(self, phase: str, entry: Mapping[str, Any], rows: Sequence[tuple[int, int]]) -> Tensor:
        return self._rows(self.exact, entry["name"], rows)

    def natural(self, phase: str, entry: Mapping[str, Any], rows: Sequence[tuple[int, int]]) -> Tensor | None:
        return self._rows(self.low, entry["name"], rows)

    def nearest(self, phase: str, entry: Mapping[str, Any], rows: Sequence[tuple[int, int]]) -> Tensor:
        return self._rows(self.low, entry["name"], rows)

    def usual(self, phase: str, entry: Mapping[str, Any]) -> float:
        return self.errors[entry["name"]]

    def dtype(self, entry: Mapping[str, Any]) -> str:
        return coarser(entry["dtype"], self.traced)

    def _rows(self, kept: Sequence[Mapping[str, Tensor]], name: str, rows: Sequence[tuple[int, int]]) -> Tensor:
        first = [length - 1 if name in self.few else 0 for length in self.lengths]
        return torch.stack([kept[prompt][name][position - first[prompt]] for prompt, position in rows])
