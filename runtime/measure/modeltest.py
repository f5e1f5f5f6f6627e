"""`llmc modeltest`: the command lines of the original performance and precision tests, as commands of llmc.

    translate(["pa_fp16", "performance", "[[256,256]]", "1", "llama", "W", "8"]).line
    # llmc bench --model-path W --dtype float16 --tp 8 --cases '[[256,256]]' --batch 1

Both orders of words are read (mindie-stack reference section 8): today's run.sh, and that of the seed document, where
`llama` is followed by use_refactor. What has no counterpart is refused by name; what was left out, and how a word
was understood that could have meant something else, is said.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from llmc.compiler.checkpoint_files import present, read_object
from llmc.compiler.diagnostics import UserError, did_you_mean
from llmc.compiler.language.checkpoint import stored_dtype
from llmc.runtime.flags import EVAL_FLAGS

ORDER = (
    "[pa_fp16|pa_bf16|fa|basic] MODE [CASES] [SHOTS|TEXTS|RANGE] BATCH MODEL [chat|base] WEIGHTS [trust_remote_code] "
    "CHIPS [PARALLEL] [MAX_POSITIONS]"
)
TYPES = {
    "pa_fp16": ("paged", "float16"),
    "pa_bf16": ("paged", "bfloat16"),
    "fa": ("flash", None),
    "basic": (None, None),
}
TASKS = {name.lower(): name for name in ("BoolQ", "CEval", "CMMLU", "GSM8K", "HumanEval", "MMLU", "TruthfulQA")}
MODES = (
    "performance",
    "performance_maxbs",
    "performance_single",
    "precision_single",
    "full_X",
    "edge_X",
    "simplified_X",
)
PARALLEL = ("dp", "tp", "sp", "moe_tp", "moe_ep", "pp", "microbatch_size", "cp")
PARALLEL_6 = ("dp", "tp", "moe_tp", "moe_ep", "pp", "microbatch_size")  # of performance tests
IN_FRONT = "--data DIR, in front of the line"
DATA = "data"  # of the original tests: a folder for each data set
DEFAULT_RANGE = "[1,2000]"  # run.sh's own


@dataclass(kw_only=True)
class Translation:
    """`commands`: words of each, without `llmc`. `understood`: what the words were taken for. `notes`: the rest."""

    commands: list[list[str]] = field(default_factory=list)
    understood: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """One line that a shell runs."""
        return " && ".join(shlex.join(["llmc", *words]) for words in self.commands)


class Words:
    """The words of the line, one after the other, and what each was taken for."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words, self.at = list(words), 0
        self.taken: list[tuple[str, str]] = []

    def peek(self, ahead: int = 0) -> str:
        return self.words[self.at + ahead] if self.at + ahead < len(self.words) else ""

    def take(self, what: str) -> str:
        if self.at >= len(self.words):
            raise UserError(f"{what} is missing behind {shlex.join(self.words)!r}", hint=ORDER)
        self.at += 1
        self.taken.append((what, self.words[self.at - 1]))
        return self.words[self.at - 1]

    def take_if(self, what: str, pattern: str) -> str:
        """The next word where the whole of it fits, else ""."""
        return self.take(what) if re.fullmatch(pattern, self.peek()) else ""


def translate(words: Sequence[str], data: str = "") -> Translation:
    """The commands for a line of run.sh, with or without `bash run.sh` in front. `data`: where the files of a precision
    test are. UserError for what cannot be translated."""
    given = list(words)
    while given and (given[0] == "bash" or given[0].endswith(".sh")):
        given.pop(0)
    read = Words(given)
    kind = read.take("model type")
    if kind not in TYPES:
        refuse(f"{kind}: unknown model type", did_you_mean(kind, TYPES))
    mode = read.take("test mode")
    made = Translation()
    if mode == "performance":
        base, own = ["bench"], performance(read, made)
    elif mode == "performance_maxbs":
        base, own = ["bench"], largest_batch(read)
    elif mode in ("performance_single", "precision_single"):
        base, own = ["run"], single(read, mode, made)
    elif match := re.fullmatch(r"(full|edge|simplified)_(.+)", mode):
        base, own = ["eval"], precision(read, match[1], match[2], data, made)
    else:
        refuse(
            f"{mode}: unknown test mode", did_you_mean(mode, MODES) if "_" not in mode else f"known: {', '.join(MODES)}"
        )
    model = rest(read, kind, mode, made)
    made.commands = [[*base, *model, *one] for one in own]
    made.understood = read.taken
    return made


def refuse(message: str, hint: str = "") -> NoReturn:
    raise UserError(message, hint=hint)


# ---- what each mode has before the model's name


def performance(read: Words, made: Translation) -> list[list[str]]:
    cases, batch = read.take("case pairs"), read.take("batch")
    pairs = numbers_in(cases, "case pairs")
    found = ["--cases", cases, "--batch", flat(batch)]
    if prefill := read.take_if("prefill batch size", r"\d+"):
        prompts = {pair[0] for pair in pairs if isinstance(pair, list) and pair}
        if len(prompts) > 1:
            refuse(
                f"prefill batch size {prefill} with prompts of several lengths",
                "llmc bounds the tokens of a prefill step (--max-prefill-tokens); give one case at a time",
            )
        found += ["--max-prefill-tokens", str(int(prefill) * next(iter(prompts), 1))]
        made.notes.append(
            f"the number behind the batch was understood as the prefill batch size: {prefill} prompts a step"
        )
    if read.take_if("prefill_length", "prefill_length"):
        found += ["--max-prefill-tokens", read.take("prefill length")]
    if read.peek() == "dataset":
        refuse(
            "dataset: prompts of a dataset are not offered; llmc bench makes random ones of the lengths that are given"
        )
    return [found]


def largest_batch(read: Words) -> list[list[str]]:
    cases = read.take("case pairs")
    numbers_in(cases, "case pairs")
    batches = read.take_if("batch range", r"\[.*\]") or DEFAULT_RANGE
    limit = read.take("time limit")
    return [["--cases", cases, "--max-batch-under", limit, "--batch-range", batches]]


def single(read: Words, mode: str, made: Translation) -> list[list[str]]:
    """Own texts: `llmc run`, once for each pair's answer length."""
    pairs = numbers_in(read.take("case pairs"), "case pairs")
    texts, batch = read.take("texts or a file"), read.take("batch")
    found = ["--input-file", texts]
    if texts.startswith("["):
        try:
            asked = json.loads(texts)
        except ValueError:
            refuse(f"texts {texts}: expected a list of texts", '["hello","what is your name"]')
        if not (isinstance(asked, list) and asked and all(isinstance(text, str) for text in asked)):
            refuse(f"texts {texts}: expected a list of texts", '["hello","what is your name"]')
        found = ["--input-text", *asked]
        if len(asked) == 1:
            found += ["--batch-size", flat(batch)]
        else:
            made.notes.append(f"batch {batch} is left out: the batch is as many texts as there are")
    if mode == "performance_single":
        found.append("--ignore-eos")
    made.notes.append("prompts are as long as their texts; of a case pair only the answer's length counts")
    return [[*found, "--max-output-length", str(pair[1])] for pair in pairs]


def precision(read: Words, how: str, name: str, data: str, made: Translation) -> list[list[str]]:
    """full_X and edge_X: a task; simplified_X: logits against those that were stored."""
    offered = {flag.name for flag in EVAL_FLAGS}
    task = name.lower()
    if how == "simplified":
        if "golden" not in offered:
            refuse(f"simplified_{name}: llmc eval does not compare with stored logits in this version")
        if not data:
            refuse(f"simplified_{name}: where are logits_N.pth and tokens_N.pth?", IN_FRONT)
    elif task not in TASKS:
        refuse(
            f"{how}_{name}: this test is not offered", f"offered: {', '.join(f'full_{one}' for one in TASKS.values())}"
        )
    elif "tasks" not in offered:
        refuse(f"{how}_{name}: llmc eval has no tasks in this version; it measures perplexity (--text)")
    if read.take_if("case pairs", r"\[\[.*\]\]"):
        made.notes.append("case pairs are left out: a task's prompts have the lengths that they have")
    shots = (
        read.take("shots") if re.fullmatch(r"\d+", read.peek()) and re.fullmatch(r"[\d,\[\]]+", read.peek(1)) else ""
    )
    if shots:
        made.notes.append(f"of the two numbers the first was understood as the shots: {shots}")
    sizes = flat(read.take("batch")).split(",")
    if how == "simplified":
        found = ["--golden", data, "--dataset", name]
    else:
        if how == "edge" and not data:
            refuse(f"edge_{name}: its questions are a set of their own; where are they?", IN_FRONT)
        found = ["--tasks", task, "--data", data or DATA, *(["--shots", shots] if shots else [])]
        if not data:
            made.notes.append(f"--data {DATA}: the files are looked for in {DATA}/{task}; another place: --data DIR")
        if task == "humaneval":
            made.notes.append("it runs programs that the model writes, and only where you add --run-generated-code")
    return [[*found, "--batch-size", size] for size in sizes]


# ---- the model's name and what follows


def rest(read: Words, kind: str, mode: str, made: Translation) -> list[str]:
    """From MODEL to the end, as flags that all commands have."""
    name = read.take("model name")
    made.notes.append(f"the name {name!r} is left out: config.json says which model it is")
    if refactor := read.take_if("use_refactor", r"(?i)true|false"):
        made.notes.append(f"use_refactor {refactor} is left out: there is one code path")
    chat = read.take_if("chat or base", "chat|base")
    if read.take_if("lora", "lora"):
        refuse(f"lora {read.peek()}: LoRA is not offered")
    weights = read.take("weights")
    if read.take_if("trust_remote_code", "trust_remote_code"):
        made.notes.append("trust_remote_code is left out: code of a checkpoint is never run")
    if "encrypt" in read.peek():
        refuse(f"{read.peek()}: encrypted weights are not offered")
    if read.peek() and not re.fullmatch(r"[1-9]\d*", read.peek()):
        refuse(
            f"{read.peek()}, in the place of CHIPS, was understood as a rank table: several hosts are not started here",
            "torchrun --nnodes N ... -m llmc.run COMMAND, on every host",
        )
    chips = read.take("chips")
    if parallel := read.take_if("parallel", r"\[.*\]"):
        check_parallel(parallel, int(chips))
    positions = read.take_if("max positions", r"[1-9]\d*")
    if read.at < len(read.words):
        refuse(f"{read.peek()}: one word too many", ORDER)
    attention, dtype = TYPES[kind]
    stored = dtype_of_checkpoint(weights)
    if dtype and stored and dtype != stored:
        made.notes.append(
            f"config.json says {stored}, for which the original tests refuse {kind}; here weights are cast"
        )
    found = ["--model-path", weights]
    found += ["--dtype", dtype] if dtype else []
    found += ["--attention", attention] if attention == "flash" else []
    found += ["--tp", chips, *(["--max-position-embeddings", positions] if positions else [])]
    if chat == "chat" and mode.startswith(("full", "edge", "precision_single", "performance_single")):
        return [*found, "--chat"]
    if chat:
        made.notes.append(f"{chat} is left out: " + ("it is the default" if chat == "base" else "prompts are ids"))
    return found


def check_parallel(text: str, chips: int) -> None:
    """Tensor parallelism alone; -1 and 1 mean none of a kind."""
    values = numbers_in(text, "parallel")
    names = PARALLEL if len(values) == len(PARALLEL) else PARALLEL_6
    if len(values) != len(names):
        refuse(f"parallel {text}: expected [{','.join(PARALLEL)}] or [{','.join(PARALLEL_6)}]")
    for name, value in zip(names, values, strict=True):
        if value not in (-1, 1) and not (name == "tp" and value == chips):
            refuse(f"parallel {text}: {name} {value} is not offered; only tensor parallelism over all {chips} chips is")


def numbers_in(text: str, what: str) -> list[Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    pairs = what == "case pairs"
    if not (isinstance(value, list) and value) or (
        pairs and not all(isinstance(one, list) and len(one) == 2 for one in value)
    ):
        refuse(f"{what} {text}: expected {'[[256,256]]' if pairs else 'a list of numbers'}", ORDER)
    return value


def flat(batch: str) -> str:
    """`[1,4]` as `1,4`; nested lists stay."""
    return batch if batch.startswith("[[") else batch.strip("[]")


def dtype_of_checkpoint(weights: str) -> str | None:
    """Where the checkpoint is here and says it."""
    file = Path(weights) / "config.json"
    try:
        return stored_dtype(read_object(file)) if present(file) else None
    except UserError:
        return None
