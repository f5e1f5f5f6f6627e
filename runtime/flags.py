"""The flags of `llmc run`, and of all commands that run a checkpoint: a table, both spellings, no torch.

Enters an argparse parser; leaves it with the flags of the original `run_fa.py` and `run_pa.py`, and some of ours.

    add_flags(parser, RUN_FLAGS)
    parser.parse_args(["--model_path", "w", "--max-output-length", "64"]).max_output_length      # 64

A flag that this program cannot honour is accepted with its neutral value; other values are refused with a reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llmc.compiler.diagnostics import UserError
from llmc.compiler.ops.attention import BLOCK_SIZE
from llmc.compiler.passes.phase import LOGITS

DEFAULT_QUESTION = "What's deep learning?"


def positive(text: str) -> int:
    return _integer(text, at_least=1, want="a whole number of at least 1")


def ranks(text: str) -> int:
    """-1, the old scripts' default, means: not given."""
    count = whole(text)
    if count == 0:
        raise argparse.ArgumentTypeError("'0' is not a number of ranks")
    return count


def whole(text: str) -> int:
    return _integer(text, at_least=-1, want="a whole number (-1 means: not given)")


def _integer(text: str, *, at_least: int, want: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = at_least - 1
    if value < at_least:
        raise argparse.ArgumentTypeError(f"{text!r} is not {want}")
    return value


def utf8(text: str) -> str:
    """Words of the command line as UTF-8, also where the locale (LANG=C) made Python read them as bytes."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from None


def true_or_false(text: str) -> bool:
    """The old scripts read "False" as true; here it means false."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return values[text.lower()]


@dataclass(frozen=True)
class Flag:
    """One row. `type` None: a switch. `many`: one or more values. `bare`: what the flag means without a value."""

    name: str
    type: Callable[[str], Any] | None
    default: Any
    help: str
    source: str
    many: bool = False
    bare: Any = None
    aliases: tuple[str, ...] = ()


SEED, PA, FA, OURS = "seed 1.4", "run_pa", "run_fa", "llmc"  # mindie-stack reference sections 1.4, 2.1, 2.2/2.3
PARALLEL = ("dp", "pp", "sp", "cp", "moe_tp", "moe_ep", "microbatch_size")
MODEL_FLAGS: tuple[Flag, ...] = (
    Flag("model_path", str, None, "checkpoint directory: config.json, safetensors, tokenizer", SEED),
    Flag("graph", str, None, "YAML of the variant, or its name (default: found from config.json)", OURS),
    Flag(
        "ignore_config",
        utf8,
        None,
        "keys of config.json that are taken as absent: of those llmc does not know",
        OURS,
        many=True,
    ),
    Flag("artifact", str, None, "directory written by `llmc compile`; nothing is compiled then", OURS),
    Flag(
        "device",
        str,
        None,
        "host or atlas-800i-a2: what to compile for (default: an NPU that is there, else host)",
        OURS,
    ),
    Flag("torch_device", str, None, "where tensors live: cpu, cuda:N or npu:N (default: the device's)", OURS),
    Flag(
        "threads",
        positive,
        None,
        "threads a rank computes with on a CPU (default: OMP_NUM_THREADS, else the cores, shared by the ranks)",
        OURS,
    ),
    Flag(
        "host_compile",
        None,
        False,
        "compile the decode step of the whole batch with a C++ compiler (on a CPU; takes half a minute)",
        OURS,
    ),
    Flag("dtype", str, None, "float16, bfloat16, on host also float32 (default: the checkpoint's)", OURS),
    Flag("is_bf16", None, False, "the same as --dtype bfloat16", SEED),
    Flag("attention", str, None, "paged (default) or flash", OURS),
    Flag(
        "is_flash_causal_lm",
        true_or_false,
        None,
        "True: paged, False: flash (the old scripts' meaning)",
        SEED,
        bare=True,
    ),
    Flag(
        "is_flash_model",
        true_or_false,
        None,
        "bare or False: flash, True: paged (the old scripts' meaning)",
        PA,
        bare=False,
    ),
    Flag(
        "logits",
        str,
        None,
        "of a prefill: last (default; of each prompt's last token) or all (--prompt-logprobs asks for it by itself)",
        OURS,
    ),
    Flag("max_position_embeddings", positive, None, "longest sequence (default and at most: the model's)", PA),
    Flag(
        "tp",
        ranks,
        None,
        "ranks of tensor parallelism, started here (default: what the model offers on the device; under torchrun: its)",
        PA,
        aliases=("world_size",),
    ),
    Flag("backend", str, None, "of collectives between NPUs: lccl or hccl (default: what the board has)", OURS),
    Flag("allow_unsupported", None, False, "compile also what the model's `support:` does not offer", OURS),
    Flag("allow_extends", str, None, "directories that the graph's `extends:` may read too", OURS, many=True),
)
INPUT_FLAGS: tuple[Flag, ...] = (
    Flag(
        "input_text",
        utf8,
        None,
        f"one or more questions (default: {DEFAULT_QUESTION!r})",
        SEED,
        many=True,
        aliases=("input_texts",),
    ),
    Flag("input_ids", str, None, "one or more prompts as comma-separated token ids", PA, many=True),
    Flag("input_file", str, None, "prompts or conversations: .jsonl; a question a line: text; ids: .csv or .npy", SEED),
    Flag("is_chat_model", None, False, "wrap the prompts in the chat template", PA, aliases=("chat",)),
    Flag("chat_template", utf8, None, "a Jinja file or the template itself, instead of the checkpoint's", PA),
    Flag("system", utf8, None, "system message for --chat", OURS),
    Flag(
        "max_input_length", positive, None, "longer prompts are cut to their first tokens (default: none is cut)", SEED
    ),
    Flag("max_output_length", positive, 20, "most tokens to generate", SEED),
)
ROOM_FLAGS: tuple[Flag, ...] = (  # batch and cache
    Flag(
        "batch_size",
        positive,
        None,
        "one prompt is repeated so often; with several their count is the batch",
        SEED,
        aliases=("max_batch_size",),
    ),
    Flag("max_prefill_batch_size", whole, None, "accepted; the prefill budget decides", PA),
    Flag("max_prefill_tokens", whole, -1, "most prompt tokens in one prefill (default: all prompts of the batch)", PA),
    Flag("block_size", positive, BLOCK_SIZE, f"tokens in a block of the paged cache; always {BLOCK_SIZE}", PA),
    Flag("num_blocks", positive, None, "blocks of the paged cache (default: enough for the batch)", OURS),
    Flag("memory", str, None, "of one rank, as 32GiB or 29GB: the cache gets what is left (or MAX_MEMORY_GB)", OURS),
)
SAMPLING_FLAGS: tuple[Flag, ...] = (
    Flag("temperature", float, None, "above 0; 0 is greedy (default 1.0)", PA),
    Flag("top_k", int, None, "1 is greedy, 0 or -1 off (default: 1, or 0 when other sampling flags ask to sample)", PA),
    Flag("top_p", float, None, "within 0 and 1; 0 and 1 are off (default 0.0)", PA),
    Flag("do_sample", true_or_false, None, "False: greedy whatever else; True: sample", FA, bare=True),
    Flag("seed", int, None, "of the random draws; repeatable output", OURS),
    Flag("repetition_penalty", float, 1.0, "above 0; 1 is off", PA),
    Flag("presence_penalty", float, 0.0, "-2 to 2", PA),
    Flag("frequency_penalty", float, 0.0, "-2 to 2", PA),
    Flag("stop", utf8, None, "strings that end an answer; they are not printed", OURS, many=True),
    Flag("ignore_eos", None, False, "always generate max_output_length tokens", PA),
    Flag("logprobs", int, None, "of each token of an answer, and of so many likeliest ones; printed with --json", OURS),
    Flag("prompt_logprobs", int, None, "likewise of each token of a prompt", OURS),
)
OUTPUT_FLAGS: tuple[Flag, ...] = (
    Flag("json", None, False, "one JSON object on stdout and nothing else", OURS),
    Flag("quiet", None, False, "no progress bar", OURS),
    Flag("verbose", None, False, "tell on stderr which CPU and threads compute, and which kernels are chosen", OURS),
)
RUN_FLAGS: tuple[Flag, ...] = (
    *MODEL_FLAGS,
    *INPUT_FLAGS,
    *ROOM_FLAGS,
    *SAMPLING_FLAGS,
    Flag("stream", None, False, "print text as it comes (one prompt)", OURS),
    *OUTPUT_FLAGS,
    # accepted for old command lines
    Flag("use_refactor", true_or_false, None, "accepted and ignored: there is one code path", SEED, bare=True),
    Flag("enable_atb_torch", None, False, "accepted and ignored: there is one code path", PA),
    Flag("load_tokenizer", true_or_false, True, "False: --input-ids only, ids instead of text", PA, bare=True),
    Flag("num_beams", int, 1, "1: beam search is not offered", PA),
    Flag("length_penalty", float, 1.0, "1.0: it belongs to beam search", PA),
    Flag("min_length", int, None, "accepted and ignored, as in run_fa", FA),
    Flag("quantize", str, None, "not offered yet", PA),
    Flag("trust_remote_code", None, False, "refused: no code of a checkpoint is run", PA),
    Flag("is_embedding_model", None, False, "refused: this program generates text", PA),
    Flag("distributed_enable", None, False, "refused: torchrun starts ranks on several hosts", PA),
    *(Flag(name, whole, -1, "-1 or 1: not offered", PA) for name in PARALLEL),
    Flag("lora_modules", str, None, "refused: LoRA is not offered", PA),
    Flag("input_dict", str, None, "refused: LoRA is not offered", PA),
    Flag("max_loras", int, 0, "0: LoRA is not offered", PA),
    Flag("max_lora_rank", int, 0, "0: LoRA is not offered", PA),
    Flag("kw_args", str, "", "accepted when empty", PA),
)
BENCH_FLAGS: tuple[Flag, ...] = (
    *MODEL_FLAGS,
    Flag("cases", str, "[[256,256]]", "pairs of prompt and answer tokens: [[256,256],[1024,128]]", OURS),
    Flag(
        "batch",
        str,
        "1",
        "sequences at a time: 1,4 for every case, or a list for each: [[1,4],[8]]",
        OURS,
    ),
    Flag("repeats", positive, 3, "runs of each case that are counted", OURS),
    Flag("warm_up", whole, 1, "runs of each case before them that are not counted", OURS),
    Flag("seed", int, 0, "of the random prompts", OURS),
    Flag("random_weights", None, False, "config.json is enough: weights are made up, of the model's shapes", OURS),
    Flag(
        "max_batch_under",
        float,
        None,
        "search each case's largest batch whose median time of a token after the first is at most so many ms",
        OURS,
    ),
    Flag(
        "batch_range",
        str,
        None,
        "where --max-batch-under searches, ends included: [1,64], or a pair for each case (default [1,256])",
        OURS,
    ),
    Flag("csv", str, None, "write the result there; of a search also FILE's rounds, to a file named _rounds", OURS),
    Flag("formatted", str, None, "the same with | between padded columns, as the original tests write it", OURS),
    Flag("profile", None, False, "time of each operation too, beside what its bytes and FLOPs allow", OURS),
    Flag("top", positive, 12, "operations that --profile prints, the longest first; the rest in one line", OURS),
    Flag("profile_threads", str, None, "1,2 profiles with so many threads each, and tells what does not scale", OURS),
    Flag("chrome", str, None, "write the profile as trace events, for Perfetto or chrome://tracing", OURS),
    *(flag for flag in ROOM_FLAGS if flag.name in ("max_prefill_tokens", "num_blocks", "memory")),
    *OUTPUT_FLAGS,
)

TRACE_FLAGS: tuple[Flag, ...] = (
    *MODEL_FLAGS,
    Flag("fuse", str, None, "fusions to apply, comma separated, or none (default: the device's)", OURS),
    *(flag for flag in INPUT_FLAGS if flag.name != "max_output_length"),
    Flag("decode_steps", int, None, "tokens at the end of each prompt that are read one by one (default 2)", OURS),
    Flag("reference", str, None, "another checkpoint for transformers to compare with (default: the same)", OURS),
    Flag("against", str, None, "compare with a dump, or with another artifact (compiled with --taps)", OURS),
    Flag("dump", str, None, "write the values to this directory; needs no transformers, compares nothing", OURS),
    Flag(
        "at_once",
        whole,
        None,
        "layers looked into at a time, where the error begins (default: all, or what fits the memory; 0: all)",
        OURS,
    ),
    Flag("map", None, False, "print what of transformers each value stands for", OURS),
    *(flag for flag in ROOM_FLAGS if flag.name in ("batch_size", "max_prefill_tokens", "num_blocks", "memory")),
    *OUTPUT_FLAGS,
)

EVAL_FLAGS: tuple[Flag, ...] = (
    *MODEL_FLAGS,
    Flag("text", str, None, 'perplexity of this file: UTF-8 text, or .jsonl with a text or {"text": ...} a line', OURS),
    Flag(
        "window", positive, None, "tokens that are read together (default: the model's positions, 2048 at most)", OURS
    ),
    Flag("stride", positive, None, "tokens from one window to the next (default: the window, so none overlap)", OURS),
    Flag("golden", str, None, "compare each step's logits with logits_N.pth and tokens_N.pth of this directory", OURS),
    Flag(
        "golden_out",
        str,
        None,
        "write such a directory: greedy answers to --input-text, --input-ids, --input-file",
        OURS,
    ),
    Flag("golden_from", str, "llmc", "what answers then: llmc or transformers", OURS),
    Flag("max_kl", float, 1e-3, "most that the distribution of any step may be apart (KL, nats)", OURS),
    Flag("step_kl", float, 1e-4, "what a step may be apart without being counted as an error", OURS),
    Flag("max_error_rate", float, 0.005, "most of the steps that may be errors", OURS),
    Flag("dataset", utf8, None, "its name in the table (default: of the directory)", OURS),
    Flag("csv", str, None, "write the table there", OURS),
    Flag("tasks", str, None, "of lm-eval: boolq,mmlu, names of the original tests, or YAML files of your own", OURS),
    Flag("data", str, None, "directory of the tasks' data: DIR/TASK/SPLIT.jsonl, .csv or .parquet", OURS),
    Flag("shots", whole, None, "examples before each question (default: the task's)", OURS),
    Flag("limit", positive, None, "first so many questions of each task only", OURS),
    Flag(
        "run_generated_code",
        None,
        False,
        "let tasks run the programs that the model writes, in a limited process",
        OURS,
    ),
    Flag("debug_csv", str, None, "of tasks: write each question, its tokens, the answer and the right one there", OURS),
    *INPUT_FLAGS,
    Flag(
        "batch_size",
        positive,
        None,
        "sequences at a time (default: windows of a text one by one, 8 of tasks, else all)",
        OURS,
    ),
    *(flag for flag in ROOM_FLAGS if flag.name in ("max_prefill_tokens", "num_blocks", "memory")),
    *OUTPUT_FLAGS,
)

# Values that can be honoured; anything else is refused. name -> (values, reason)
NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "num_beams": ((1,), "beam search is not offered; use sampling (--temperature, --top-k, --top-p)"),
    "length_penalty": ((1.0,), "it belongs to beam search, which is not offered"),
    "block_size": ((BLOCK_SIZE,), f"the generated code works on cache blocks of {BLOCK_SIZE} tokens"),
    "quantize": ((None,), "quantised checkpoints are not offered yet"),
    "trust_remote_code": ((False,), "code of a checkpoint is never run"),
    "is_embedding_model": ((False,), "this program generates text"),
    "distributed_enable": (
        (False,),
        "start the ranks of every host with torchrun: torchrun --nnodes N ... -m llmc.run",
    ),
    "lora_modules": ((None,), "LoRA is not offered"),
    "input_dict": ((None,), "LoRA is not offered; --input-text or --input-file take the prompts"),
    "max_loras": ((0,), "LoRA is not offered"),
    "max_lora_rank": ((0,), "LoRA is not offered"),
    "kw_args": (("", "{}"), "no extra arguments are known"),
    **dict.fromkeys(PARALLEL, ((-1, 1), "this kind of parallelism is not offered")),
}


def spellings(name: str) -> list[str]:
    """ "max_output_length" -> --max-output-length, --max_output_length"""
    return list(dict.fromkeys(["--" + name.replace("_", "-"), "--" + name]))


def add_flags(parser: argparse.ArgumentParser, flags: Iterable[Flag]) -> None:
    for flag in flags:
        words = [word for name in (flag.name, *flag.aliases) for word in spellings(name)]
        about = flag.help.replace("%", "%%")
        if flag.type is None:
            parser.add_argument(*words, dest=flag.name, action="store_true", help=about)
            continue
        # "extend": a flag that is given twice adds to its list
        more: dict[str, Any] = {"nargs": "+", "action": "extend"} if flag.many else {}
        if flag.bare is not None:
            more = {"nargs": "?", "const": flag.bare}
        metavar = "TEXT" if flag.type in (str, utf8) else "VALUE"
        parser.add_argument(
            *words, dest=flag.name, type=flag.type, default=flag.default, metavar=metavar, help=about, **more
        )


def words_of(args: argparse.Namespace, flags: Iterable[Flag]) -> list[str]:
    """The command line that gives these values: what the ranks are started with."""
    words = []
    for flag in flags:
        value, name = getattr(args, flag.name), spellings(flag.name)[0]
        if value == flag.default or value is None:
            continue
        if flag.type is None:
            words.append(name)
        else:
            words += [f"{name}={one}" for one in (value if flag.many else [value])]
    return words


def check_run_flags(args: argparse.Namespace) -> None:
    """Refuse what cannot be honoured, and flags that contradict each other: all at once."""
    problems = [
        f"{spellings(name)[0]} {getattr(args, name)}: {reason}"
        for name, (values, reason) in NEUTRAL.items()
        if getattr(args, name) not in values
    ]
    given = [name for name in ("input_text", "input_ids", "input_file") if getattr(args, name) is not None]
    if len(given) > 1:
        problems.append(f"{' and '.join(spellings(n)[0] for n in given)} cannot be used together")
    if args.stop and not args.load_tokenizer:
        problems.append("--stop compares text, which --load-tokenizer False does without")
    problems += [
        f"{spellings(name)[0]}: log-probabilities are printed with --json"
        for name in ("logprobs", "prompt_logprobs")
        if getattr(args, name) is not None and not args.json
    ]
    refuse("run", args, problems)


def refuse(command: str, args: argparse.Namespace, problems: Iterable[str] = ()) -> None:
    """What is wrong with the flags of a model, and other problems of the command's flags: all at once."""
    problems = [*model_problems(args), *problems]
    if problems:
        # Without a checkpoint the command itself is incomplete: wrong usage, code 2.
        code = "" if args.model_path else "E601"
        raise UserError("\n".join([f"llmc {command} cannot do this:", *(f"  {p}" for p in problems)]), code=code)


def model_problems(args: argparse.Namespace) -> Iterator[str]:
    """Of MODEL_FLAGS: what is missing, and what contradicts another."""
    if not args.model_path:
        yield "--model-path is needed: the checkpoint directory"
    if args.graph is not None and args.artifact is not None:
        yield "--graph and --artifact cannot be used together: an artifact is compiled already"
    for chosen in (dtype_of, attention_of, logits_of):
        try:
            chosen(args)
        except UserError as error:
            yield error.message


def dtype_of(args: argparse.Namespace) -> str | None:
    """The dtype asked for, None for the checkpoint's."""
    if args.is_bf16 and args.dtype not in (None, "bfloat16"):
        raise UserError(f"--is-bf16 contradicts --dtype {args.dtype}")
    return "bfloat16" if args.is_bf16 else args.dtype


def attention_of(args: argparse.Namespace) -> str:
    """paged or flash. In the old scripts "flash causal LM" was the name of the paged model."""
    said: dict[str, str] = {}
    if args.attention is not None:
        if args.attention not in ("paged", "flash"):
            raise UserError(f"--attention {args.attention}: expected paged or flash")
        said["--attention"] = args.attention
    for name in ("is_flash_causal_lm", "is_flash_model"):
        if getattr(args, name) is not None:
            said[spellings(name)[0]] = "paged" if getattr(args, name) else "flash"
    if len(set(said.values())) > 1:
        raise UserError("contradiction: " + ", ".join(f"{flag} asks for {kind}" for flag, kind in said.items()))
    return next(iter(said.values()), "paged")


def logits_of(args: argparse.Namespace) -> str | None:
    """last or all, None where nothing asks for either."""
    needed = getattr(args, "prompt_logprobs", None) is not None
    if args.logits not in (None, *LOGITS):
        raise UserError(f"--logits {args.logits}: expected {' or '.join(LOGITS)}")
    if needed and args.logits == "last":
        raise UserError("--logits last contradicts --prompt-logprobs, which needs those of every token")
    return "all" if needed else args.logits


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `SamplingParams`.

    The scripts' defaults (temperature 1, top_k 1, top_p 0) are greedy, and stay so. A flag that only makes sense when
    sampling lifts the default of top_k, not a top_k that the user gave.
    """
    wants = args.do_sample or args.seed is not None or args.temperature not in (None, 0.0, 1.0)
    wants = wants or args.top_p not in (None, 0.0, 1.0)
    top_k = args.top_k if args.top_k is not None else (0 if wants else 1)
    return {
        "max_tokens": args.max_output_length,
        "temperature": 1.0 if args.temperature is None else args.temperature,
        "top_k": 1 if args.do_sample is False else top_k,
        "top_p": args.top_p or 0.0,
        "repetition_penalty": args.repetition_penalty,
        "presence_penalty": args.presence_penalty,
        "frequency_penalty": args.frequency_penalty,
        "seed": args.seed,
        "logprobs": args.logprobs,
        "prompt_logprobs": args.prompt_logprobs,
        "stop": tuple(args.stop or ()),
        "ignore_eos": args.ignore_eos,
    }
