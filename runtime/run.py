"""`llmc run`: prompts in, answers out, with what the original scripts print.

Flow: flags -> prompts -> artifact (compiled, or read) -> tokens -> caches sized for them -> weights -> engine -> lines.
Answers and facts go to stdout, everything else to stderr; with --json one object goes to stdout and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from llmc.compiler import artifact as artifacts
from llmc.compiler.build import load_model
from llmc.compiler.checkpoint import check_config, choose_variant, read_config
from llmc.compiler.diagnostics import UserError
from llmc.compiler.hardware import device as device_profile
from llmc.compiler.pipeline import Options, compile_model
from llmc.runtime import npu
from llmc.runtime.blocks import BLOCK_SIZE, blocks_for
from llmc.runtime.engine import Engine, Output
from llmc.runtime.executor import Executor
from llmc.runtime.flags import DEFAULT_QUESTION, attention_of, check_run_flags, dtype_of, sampling_of
from llmc.runtime.runner import is_paged, make_caches, make_constants
from llmc.runtime.sampling import SamplingParams
from llmc.runtime.tokenizer import Tokenizer, load_tokenizer
from llmc.runtime.weights import load_weights

Prompt = str | list[int]


def run(args: argparse.Namespace) -> int:
    """Everything that `llmc run` does; the exit code."""
    check_run_flags(args)
    params = SamplingParams(**sampling_of(args))
    if args.use_refactor is not None:
        note("--use-refactor is ignored: there is one code path")
    tokenizer = load_tokenizer(args.model_path) if args.load_tokenizer else None
    prompts = replicate(read_prompts(args), args.batch_size)
    ids = [encode(prompt, tokenizer, args) for prompt in prompts]
    with contextlib.ExitStack() as cleanup:
        artifact = _artifact(args, cleanup)
        start = time.perf_counter()
        engine = make_engine(args, artifact, tokenizer, ids, params)
        loading = time.perf_counter() - start
        callback = (lambda i, text: print(text, end="", flush=True)) if streams(args, ids) else None
        if callback:
            print(f"Question[0]: {shown(prompts[0])}\nAnswer[0]: ", end="", flush=True)
        outputs = engine.generate(ids, params, callback)
    if args.json:
        print(json.dumps(report(artifact.manifest, prompts, outputs, engine, loading)))
    else:
        print_answers(prompts, outputs, engine, streamed=callback is not None)
    return 0


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def streams(args: argparse.Namespace, ids: Sequence[Any]) -> bool:
    if args.stream and len(ids) > 1:
        note("--stream is for one prompt; the answers follow when all are done")
    return bool(args.stream and not args.json and len(ids) == 1)


# ---- prompts


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Texts, or lists of token ids, in the order given."""
    if args.input_ids is not None:
        return [token_ids(text, "--input-ids") for text in args.input_ids]
    if args.input_file is not None:
        return read_input_file(Path(args.input_file))
    return list(args.input_text or [DEFAULT_QUESTION])


def read_input_file(path: Path) -> list[Prompt]:
    """.csv and .npy: a row of token ids a prompt. .jsonl: an object or string a line. Else: a question a line."""
    prompts: list[Prompt] = []
    try:
        if path.suffix == ".npy":
            import numpy

            array = numpy.load(path, allow_pickle=False)
            if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
                raise UserError(f"{path} must hold one or two axes of whole numbers; found {array.dtype} {array.shape}")
            return [list(map(int, row)) for row in array.reshape(-1, array.shape[-1])]
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--input-file {path} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match path.suffix:
            case ".csv":
                row = next(csv.reader([line]))
                prompts.append(token_ids(",".join(cell for cell in row if cell.strip()), f"{path}:{number}"))
            case ".jsonl":
                prompts.append(_json_prompt(line, f"{path}:{number}"))
            case _:
                prompts.append(line)
    if not prompts:
        raise UserError(f"--input-file {path} holds no prompt")
    return prompts


def _json_prompt(line: str, place: str) -> Prompt:
    """A string, a list of token ids, or an object with prompt, text, question or content."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}") from None
    if isinstance(value, dict):
        value = next((value[key] for key in ("prompt", "text", "question", "content") if key in value), None)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        return value
    raise UserError(f'{place} must be a text, token ids, or {{"prompt": text}}; found {line[:60]}')


def token_ids(text: str, place: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{place} must be token ids with commas between them; found {text[:60]!r}") from None


def replicate(prompts: list[Prompt], batch_size: int | None) -> list[Prompt]:
    """One prompt is repeated; several are their own batch (the original scripts' rule)."""
    if len(prompts) == 1:
        return prompts * (batch_size or 1)
    return prompts


def encode(prompt: Prompt, tokenizer: Tokenizer | None, args: argparse.Namespace) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UserError("text needs a tokenizer", hint="--input-ids, or leave out --load-tokenizer False")
        if args.is_chat_model or args.chat_template or args.system:
            messages = [{"role": "system", "content": args.system}] if args.system else []
            text = tokenizer.chat([*messages, {"role": "user", "content": prompt}], template=_template(args))
            ids = tokenizer.encode(text, special=False)
        else:
            ids = tokenizer.encode(prompt)
    else:
        ids = prompt
    if args.max_input_length and len(ids) > args.max_input_length:
        note(f"a prompt of {len(ids)} tokens is cut to its first {args.max_input_length} (--max-input-length)")
    return ids[: args.max_input_length]


def _template(args: argparse.Namespace) -> str | None:
    """A file's content, or the text itself."""
    text = args.chat_template
    if text and "{" not in text:
        try:
            return Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"--chat-template {text} cannot be read: {error}") from None
    return text


# ---- artifact and engine


def _artifact(args: argparse.Namespace, cleanup: contextlib.ExitStack) -> artifacts.Artifact:
    """The artifact given, or one compiled now for the checkpoint into a directory that ends with the run."""
    if args.artifact:
        return _as_asked(args, artifacts.read(Path(args.artifact)))
    config = read_config(args.model_path)
    config_path = str(Path(args.model_path) / "config.json")
    graph = args.graph or choose_variant(config, config_path)
    check_config(load_model(graph), config, config_path)
    stored = config.get("dtype") or config.get("torch_dtype")
    options = Options(device=args.device, dtype=dtype_of(args) or stored, attention=attention_of(args))
    target = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="llmc-"))) / "artifact"
    artifacts.write(compile_model(graph, options), target)
    return artifacts.read(target)


def _as_asked(args: argparse.Namespace, artifact: artifacts.Artifact) -> artifacts.Artifact:
    """An artifact is what it was compiled to be; flags that ask for something else are a mistake."""
    silent = (args.attention, args.is_flash_causal_lm, args.is_flash_model) == (None, None, None)
    asked = {"dtype": dtype_of(args), "attention": None if silent else attention_of(args)}
    problems = [
        f"it was compiled for {key} {artifact.manifest[key]}, and {value} is asked for"
        for key, value in asked.items()
        if value not in (None, artifact.manifest[key])
    ]
    if problems:
        raise UserError(f"artifact {artifact.path}: {'; '.join(problems)}", hint="leave the flag out, or compile again")
    return artifact


def backend(manifest: Mapping[str, Any], wanted: str | None) -> tuple[ModuleType, torch.device]:
    """torch_atb where an NPU is asked for or there, else hostatb under the rules of the artifact's chip."""
    on_npu = wanted.startswith("npu") if wanted else manifest["device"] != "host" and npu.available()
    if on_npu:
        profile = device_profile(manifest["device"]).environment
        atb = npu.load({**profile.get("common", {}), **profile.get(manifest["attention"], {})})
        npu.set_device(int((wanted or "npu:0").partition(":")[2] or 0))
        return atb, npu.device()
    from llmc.runtime import hostatb

    if manifest["device"] != "host":
        note(f"no NPU here: the code for {manifest['device']} runs on hostatb, which computes what the chip computes")
    try:
        return hostatb, torch.empty(0, device=wanted or "cpu").device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--torch-device {wanted}: {str(error).splitlines()[0]}") from None


def make_engine(
    args: argparse.Namespace,
    artifact: artifacts.Artifact,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
) -> Engine:
    """Weights and caches in place. The cache holds the whole batch at its longest, unless --num-blocks says less."""
    manifest = artifact.manifest
    limit = min(manifest["sizes"]["max_positions"], args.max_position_embeddings or manifest["sizes"]["max_positions"])
    longest = min(limit, max(map(len, prompts)) + params.max_tokens)
    max_batch = min(len(prompts), args.batch_size or len(prompts))
    needed = sorted((blocks_for(min(limit, len(p) + params.max_tokens), BLOCK_SIZE) for p in prompts), reverse=True)
    sizes = {"N": args.num_blocks or sum(needed[:max_batch]), "B": max_batch, "S": longest}
    budget = args.max_prefill_tokens if args.max_prefill_tokens > 0 else max(4096, *map(len, prompts), longest)
    atb, device = backend(manifest, args.torch_device)
    caches = make_caches(manifest, sizes, device)
    weights = load_weights(manifest["weights"], args.model_path, device=device, progress=not (args.quiet or args.json))
    executor = Executor(
        artifact, atb, weights=weights, constants=make_constants(manifest, limit, device), caches=caches
    )
    if is_paged(manifest):
        limit = min(limit, sizes["N"] * BLOCK_SIZE)
    return Engine(
        manifest,
        executor,
        tokenizer,
        caches=caches,
        max_batch=max_batch,
        max_prefill_tokens=budget,
        max_length=limit,
        device=device,
    )


# ---- what is printed


def timing(outputs: Sequence[Output], engine: Engine) -> dict[str, float]:
    """Prefill: all prefill steps. Per token: the mean decode step, of the whole batch. Rates: tokens / time."""
    prefill = sum(s.seconds for s in engine.steps if s.phase == "prefill")
    decode = [s for s in engine.steps if s.phase == "decode"]
    decode_s, decoded = sum(s.seconds for s in decode), sum(s.tokens_out for s in decode)
    generated = sum(o.generated_tokens for o in outputs)
    return {
        "prefill_ms": prefill * 1e3,
        "prefill_tokens_per_s": sum(o.prompt_tokens for o in outputs) / prefill if prefill else 0.0,
        "decode_ms_per_token": decode_s / len(decode) * 1e3 if decode else 0.0,
        "decode_tokens_per_s": decoded / decode_s if decode_s else 0.0,
        "tokens_per_s": generated / (prefill + decode_s) if generated else 0.0,
        "total_ms": (prefill + decode_s) * 1e3,
    }


def shown(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else ",".join(map(str, prompt))


def print_answers(prompts: Sequence[Prompt], outputs: Sequence[Output], engine: Engine, *, streamed: bool) -> None:
    for output in outputs:
        i = output.index
        if streamed:
            print()
        else:
            answer = output.text if engine.tokenizer else ",".join(map(str, output.token_ids))
            print(f"Question[{i}]: {shown(prompts[i])}\nAnswer[{i}]: {answer}")
        print(f"Generate[{i}] token num: {output.generated_tokens}")
        print(f"Input[{i}] token num: {output.prompt_tokens}, finished by {output.finish_reason}")
    t = timing(outputs, engine)
    print(
        f"prefill {t['prefill_ms']:.1f} ms ({t['prefill_tokens_per_s']:.1f} tokens/s), "
        f"decode {t['decode_ms_per_token']:.2f} ms per token ({t['decode_tokens_per_s']:.1f} tokens/s), "
        f"all {t['total_ms']:.1f} ms ({t['tokens_per_s']:.1f} tokens/s)"
    )


def report(
    manifest: Mapping[str, Any], prompts: Sequence[Prompt], outputs: Sequence[Output], engine: Engine, loading: float
) -> dict[str, Any]:
    """The --json object."""
    return {
        "ok": True,
        **{key: manifest[key] for key in ("model", "device", "dtype", "attention")},
        "outputs": [
            {
                "index": o.index,
                "prompt": prompts[o.index],
                "text": o.text,
                "token_ids": o.token_ids,
                "prompt_tokens": o.prompt_tokens,
                "generated_tokens": o.generated_tokens,
                "finish_reason": o.finish_reason,
                "first_token_ms": o.first_token_s * 1e3,
                "token_ms": [s * 1e3 for s in o.token_s],
            }
            for o in outputs
        ],
        "timing": {"load_ms": loading * 1e3, **timing(outputs, engine)},
    }
