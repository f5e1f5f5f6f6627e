"""`llmc eval --tasks`: the tasks of lm-eval, asked of the engine, on data files of the user.

    llmc eval --model-path W --tasks boolq,mmlu --data DIR     # names of lm-eval, of the original suite, or YAML files

Flow: names -> tasks of lm-eval with their data (task_data.py) -> requests -> caches that hold them -> engine -> answers
(harness.py) -> metrics. Rank 0 does all of it; the others take the steps of its engine. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, partialmethod
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmc.compiler import artifact as artifacts
from llmc.compiler.diagnostics import UserError, did_you_mean
from llmc.compiler.files import check_target, csv_text, write_whole
from llmc.compiler.terminal import table
from llmc.runtime.engine.engine import Engine
from llmc.runtime.engine.tokenizer import load_tokenizer
from llmc.runtime.prompts import template_of
from llmc.runtime.ranks import Team
from llmc.runtime.room import Limit, Room
from llmc.runtime.session import engine_in, limit_for, note, positions_of, room_for
from llmc.runtime.weights import progress_bar

if TYPE_CHECKING:
    from llmc.runtime.measure.harness import EngineLM

# Names of the original tests (mindie-stack reference section 8) -> what lm-eval has of it. Prompts are lm-eval's.
ORIGINAL: Mapping[str, tuple[str, ...]] = {
    "boolq": ("boolq",),
    "mmlu": ("mmlu",),
    "ceval": ("ceval-valid",),
    "cmmlu": ("cmmlu",),
    "gsm8k": ("gsm8k",),
    "humaneval": ("humaneval",),
    "truthfulqa": ("truthfulqa_mc1", "truthfulqa_mc2"),
}
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "shots": 1234}  # lm_eval/defaults.py
BATCH = 8
READ_AT_ONCE = 1024  # tokens of a prefill: each has logits of the whole vocabulary
BOOTSTRAPS = 1000  # of metrics that are no mean; lm-eval's 100000 take minutes in one process, for a third digit
COLUMNS = ("Model", "Dataset", "Batchsize", "Shots", "Samples", "Metric", "Filter", "Stderr", "Result")
DEBUG_COLUMNS = ("key", "queries", "input_token_ids", "output_token_ids", "test_result", "golden_result", "pass")


@dataclass
class Suite:
    """What was loaded: lm-eval's tasks and groups by name."""

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)


# ---- what is asked


def problems(args: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the flags."""
    if args.logits == "last":
        yield "--logits last: tasks need those of every token"
    if not spoken(args.tasks):
        yield f"--tasks {args.tasks!r}: expected names with commas between them, as boolq,mmlu"
    given = [name for name in ("input_text", "input_ids", "input_file") if getattr(args, name) is not None]
    if given:
        yield f"--{given[0].replace('_', '-')} and --tasks cannot be used together: a task brings its questions"
    if args.data is not None and not Path(args.data).is_dir():
        yield f"--data {args.data}: there is no such directory"
    if args.shots is not None and args.shots < 0:
        yield f"--shots {args.shots}: expected 0 or more examples"


def spoken(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def prepare(args: argparse.Namespace, make: Callable[[], artifacts.Artifact], team: Team | None) -> Job:
    """Load the tasks and their data. UserError for what no rank could do."""
    args.logits = "all"
    artifact = make()
    job = Job(artifact=artifact, args=args)
    if team is not None and not team.talks:
        return job
    for name in ("csv", "debug_csv"):
        if getattr(args, name):
            check_target(Path(getattr(args, name)), f"--{name.replace('_', '-')}")
    import_lm_eval()
    from llmc.runtime.measure.harness import EngineLM

    job.suite = load_suite(args)
    template = template_of(args)
    job.lm = EngineLM(
        load_tokenizer(args.model_path), max_length=positions_of(args, artifact.manifest), template=template
    )
    if job.chat and not (template or job.lm.text.template):
        raise UserError("--chat: the checkpoint has no chat template", hint="--chat-template FILE, or leave out --chat")
    return job


def import_lm_eval() -> None:
    """Offline, quiet; UserError where it is not installed."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    os.environ["DISABLE_MULTIPROC"] = "1"  # lm-eval's: a fork of this process would have its threads and weights
    try:
        datasets = import_module("datasets")
        import_module("lm_eval.evaluator")
    except ImportError as error:
        raise UserError(
            f"--tasks needs lm-eval, which is not installed ({error})", hint="pip install 'llmc[eval]'"
        ) from None
    datasets.disable_progress_bars()
    datasets.disable_caching()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither what lm-eval prints, which is no part of a result, nor its bars: our own says how far it is."""
    from tqdm import tqdm

    begin = tqdm.__init__
    tqdm.__init__ = partialmethod(begin, disable=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = begin


def load_suite(args: argparse.Namespace) -> Suite:
    from lm_eval.tasks import TaskManager

    words = spoken(args.tasks)
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
    alone = len(files) == len(words) and not any(is_group(Path(word)) for word in files)
    manager = TaskManager(include_defaults=not alone)  # reading lm-eval's 14000 files takes seconds
    suite = Suite()
    names = [(word, name) for word in words for name in ([word] if word in files else named(word, manager))]
    with progress_bar("reading tasks", len(names), not (args.quiet or args.json)) as advance:
        for word, name in names:
            add(suite, args, word, name, manager)
            advance(1)
    for name, task in suite.tasks.items():
        settle_task(name, task, args)
    return suite


def is_group(path: Path) -> bool:
    try:
        return bool(re.search(r"^[\"']?group[\"']?\s*:", path.read_text(encoding="utf-8"), re.MULTILINE))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--tasks {path} cannot be read: {why}") from None


def named(word: str, manager: Any) -> Sequence[str]:
    """Names of lm-eval for a word of --tasks."""
    if word in manager.task_index:
        return [word]
    if word.lower() in ORIGINAL:
        return ORIGINAL[word.lower()]
    if word.lower() in manager.task_index:
        return [word.lower()]
    likely = did_you_mean(word, [one for one in manager.all_tasks if one[0] == word[0].lower()][:2000])
    raise UserError(
        f"--tasks {word}: lm-eval has no such task",
        hint=likely or "`lm-eval ls tasks` lists them; a YAML file of your own is given by its path",
    )


def add(suite: Suite, args: argparse.Namespace, word: str, name: str, manager: Any) -> None:
    """Load one name. Whatever fails is told as a sentence: configurations and data are foreign."""
    from llmc.runtime.measure.task_data import from_files

    entry = manager.task_index.get(name)
    one = entry is None or str(entry.kind.name).endswith("TASK")
    folder = None if args.data is None else Path(args.data)
    bases = [Path(word).stem] if entry is None else list(dict.fromkeys([word, name]))
    with quiet(), from_files(folder, bases, one=one, run_code=args.run_generated_code) as found:
        try:
            loaded = manager.load([name])
        except Exception as error:
            raise told(error, name, found) from None
    for task, made in loaded["tasks"].items():
        if task in suite.tasks:
            raise UserError(f"--tasks {args.tasks}: {task} is in it twice")
        suite.tasks[task] = made
    suite.groups |= loaded.get("groups", {})


def told(error: BaseException, name: str, found: Sequence[Any]) -> UserError:
    """What went wrong while lm-eval loaded a task."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UserError):
            return inner
        inner = inner.__cause__ or inner.__context__
    if found and found[-1].missing:
        return no_split(name, found[-1], found[-1].missing[-1])
    fields = sorted({field for split in found[-1].values() for field in split.column_names}) if found else []
    return UserError(
        f"{name}: lm-eval cannot make a task of it: {type(error).__name__}: {str(error)[:300]}",
        hint=f"its data have the fields {', '.join(fields)}; the task's configuration may want others"
        if fields
        else "",
    )


def no_split(name: str, splits: Any, split: str) -> UserError:
    there = ", ".join(splits.files) or "none"
    return UserError(f"{name} needs the split {split}: no file of it in {splits.looked_for}; splits there: {there}")


def settle_task(name: str, task: Any, args: argparse.Namespace) -> None:
    """Shots and seeds as lm-eval's simple_evaluate sets them; UserError for what would give wrong metrics silently."""
    own = task.get_config("num_fewshot")
    if args.shots is not None and own == 0 and args.shots:
        note(f"{name} is defined with 0 examples, and --shots {args.shots} does not change that")
    elif args.shots is not None and own != 0:
        task.set_config(key="num_fewshot", value=args.shots)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEEDS["shots"])
    splits = getattr(task, "dataset", None)
    missing = getattr(splits, "missing", [])
    if missing and task.get_config("num_fewshot"):
        raise no_split(f"{name} with {task.get_config('num_fewshot')} examples", splits, missing[0])
    scripts = [key for key, metric in getattr(task, "_metric_fn_list", {}).items() if metric is None]
    if scripts and task.get_config("process_results") is None:
        raise UserError(
            f"{name}: its metric {scripts[0]} is a script that is downloaded and run, which is not done here"
        )
    if getattr(task, "UNSAFE_CODE", False) and not args.run_generated_code:
        raise UserError(f"{name} runs programs that the model writes", hint="--run-generated-code lets it")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{name} shows pictures or plays sounds, and llmc reads text")
    if task.OUTPUT_TYPE == "multiple_choice":
        check_label(name, task)


def check_label(name: str, task: Any) -> None:
    """Of a label that is none of the choices lm-eval makes a wrong answer, and goes on."""
    doc = task.eval_docs[0]
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    for one in gold if isinstance(gold, list) else [gold]:
        if not (one in choices if isinstance(one, str) else isinstance(one, int) and 0 <= one < len(choices)):
            raise UserError(
                f"{name}: the right answer of its first question is {one!r}, which is none of its choices: {choices}",
                hint=f"the task takes it from {task.get_config('doc_to_target')!r}; its data have the fields "
                f"{', '.join(doc)}",
            )


# ---- the job


@dataclass(kw_only=True)
class Job:
    """Tasks and what they ask. A rank that does not talk knows the artifact only."""

    artifact: artifacts.Artifact
    args: argparse.Namespace
    suite: Suite = field(default_factory=Suite)
    lm: EngineLM | None = None
    team: Team | None = None
    batch: int = BATCH

    unit = "requests"

    @property
    def chat(self) -> bool:
        return bool(self.args.is_chat_model or self.args.chat_template or self.args.system)

    @property
    def total(self) -> int:
        return sum(one.repeats or 1 for task in self.suite.tasks.values() for one in task.instances)

    def flags(self, folder: Path) -> dict[str, Any]:
        return {}

    def engine(self, args: argparse.Namespace, team: Team | None) -> Engine:
        """Build all requests, and caches that hold them."""
        self.team, self.batch = team, args.batch_size or BATCH
        if self.lm is not None:
            needed = self.requests(self.lm)
            if team:
                team.say(list(needed.items()))
        else:
            assert team
            needed = Counter(dict(team.hear()))
        room = partial(self.room, needed)
        limit = limit_for(args, self.artifact.manifest, needed, 1, team)
        return engine_in(args, self.artifact, None, room, limit, team)

    def requests(self, lm: EngineLM) -> Counter[int]:
        """Tokens of the longest sequences that the engine is given at once -> how many."""
        from lm_eval.evaluator_utils import get_sample_size

        seed_all()
        chat = self.chat
        needed: Counter[int] = Counter()
        bar = progress_bar("building requests", len(self.suite.tasks), not (self.args.quiet or self.args.json))
        with bar as advance:
            for name, task in self.suite.tasks.items():
                try:
                    with quiet():
                        task.build_all_requests(
                            limit=get_sample_size(task, self.args.limit),
                            system_instruction=self.args.system,
                            apply_chat_template=chat,
                            fewshot_as_multiturn=chat,
                            chat_template=lm.apply_chat_template if chat else None,
                            tokenizer_name=lm.tokenizer_name if chat else "",
                        )
                    needed += lm.read(task.instances)
                except UserError as error:
                    raise UserError(f"{name}: {error.message}", hint=error.hint) from None
                except Exception as error:  # configurations and data are foreign
                    splits = getattr(task, "dataset", None)
                    raise told(error, name, [splits] if hasattr(splits, "missing") else []) from None
                # `evaluate` builds requests itself; they are there already, and shots would be drawn anew
                task.build_all_requests = lambda **_: None
                advance(1)
        if lm.cut:
            note(
                f"{lm.cut} request{'s are' if lm.cut > 1 else ' is'} longer than the {lm.max_length} tokens of a "
                "sequence and lost the first tokens"
            )
        from llmc.runtime.measure.harness import AT_ONCE

        longest: Counter[int] = Counter()
        for tokens in sorted(needed, reverse=True):
            longest[tokens] = min(needed[tokens], AT_ONCE - longest.total())
        return +longest

    def room(self, needed: Counter[int], limit: Limit | None) -> Room:
        """Answers are part of these lengths."""
        read = max(READ_AT_ONCE, *needed)
        return room_for(self.args, self.artifact.manifest, needed, 0, limit, batch=self.batch, prefill_tokens=read)

    def run(self, engine: Engine, advance: Callable[[int], None], *, talks: bool = True) -> dict[str, Any]:
        """On rank 0 the metrics of all tasks; the others follow its engine."""
        if self.lm is None:
            from llmc.runtime.measure.calls import follow

            assert self.team
            follow(engine, self.team)
            return {}
        from lm_eval.evaluator import evaluate

        from llmc.runtime.measure.calls import Calls

        lm, start = self.lm, time.perf_counter()
        lm.calls, lm.on_done = Calls(engine, self.team), advance
        with quiet():
            found = evaluate(
                lm,
                {"tasks": self.suite.tasks, "groups": self.suite.groups},
                limit=self.args.limit,
                bootstrap_iters=BOOTSTRAPS,
                system_instruction=self.args.system,
                apply_chat_template=self.chat,
                confirm_run_unsafe_code=self.args.run_generated_code,
            )
        lm.calls.end()
        facts = {
            "shots": self.args.shots,
            "limit": self.args.limit,
            "chat": self.chat,
            "batch": self.batch,
            "requests": self.total,
            "cut": lm.cut,
            "tasks": {name: results(name, found) for name in self.suite.tasks},
            "groups": {name: results(name, found) for name in self.suite.groups if name in found["results"]},
            "seconds": time.perf_counter() - start,
        }
        return {**facts, "files": list(self.write(facts, found, lm))}

    def write(self, facts: Mapping[str, Any], found: Mapping[str, Any], lm: EngineLM) -> Iterator[str]:
        """--csv and --debug-csv; their names."""
        if self.args.csv:
            text = csv_text([COLUMNS, *rows_of(self.artifact.manifest["model"], facts)])
            write_whole(Path(self.args.csv), text, "--csv")
            yield self.args.csv
        if self.args.debug_csv:
            rows = [row for name, task in self.suite.tasks.items() for row in debug_rows(name, task, found, lm)]
            write_whole(Path(self.args.debug_csv), csv_text([DEBUG_COLUMNS, *rows]), "--debug-csv")
            yield self.args.debug_csv

    def lines(self, facts: Mapping[str, Any]) -> Iterator[str]:
        heads = ["dataset", "shots", "samples", "metric", "filter", "result", "stderr"]
        cells = []
        for kind in ("groups", "tasks"):
            for name, one in facts[kind].items():
                for metric in one["metrics"]:
                    result, stderr = (number(metric[key]) for key in ("value", "stderr"))
                    cells.append(
                        [
                            name,
                            "-" if one["shots"] is None else str(one["shots"]),
                            str(one["samples"]),
                            metric["metric"],
                            metric["filter"],
                            result,
                            stderr,
                        ]
                    )
        yield from table(heads, cells, left=1)
        written = f"; written: {', '.join(facts['files'])}" if facts["files"] else ""
        count = len(facts["tasks"])
        yield f"{count} task{'s' * (count != 1)}, {facts['requests']} requests in {facts['seconds']:.1f} s{written}"


def seed_all() -> None:
    import numpy

    random.seed(SEEDS["random"])
    numpy.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])


# ---- results


def results(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of a task or group: {"shots", "samples", "metrics": [{"metric", "filter", "value", "stderr", ...}]}."""
    values = found["results"][name] | found.get("groups", {}).get(name, {})
    better = found["higher_is_better"].get(name) or {}
    metrics = []
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = values.get(f"{metric}_stderr,{chosen}")
            metrics.append(
                {
                    "metric": metric,
                    "filter": chosen,
                    "value": plain(value),
                    "stderr": plain(stderr),
                    "higher_is_better": better.get(metric),
                }
            )
    counted = found["n-samples"].get(name, {}).get("effective", values.get("sample_len"))
    return {"shots": found["n-shot"].get(name), "samples": counted, "metrics": metrics}


def plain(value: Any) -> float | str | None:
    """As JSON can say it; lm-eval says N/A of a standard error that nobody knows."""
    try:
        return None if value in (None, "N/A") else float(value)
    except (TypeError, ValueError):
        return str(value)


def rows_of(model: str, facts: Mapping[str, Any]) -> Iterator[list[Any]]:
    for kind in ("groups", "tasks"):
        for name, one in facts[kind].items():
            for m in one["metrics"]:
                yield [
                    model, name, facts["batch"], one["shots"], one["samples"], m["metric"], m["filter"], m["stderr"],
                    m["value"],
                ]  # fmt: skip


def debug_rows(name: str, task: Any, found: Mapping[str, Any], lm: EngineLM) -> Iterator[list[Any]]:
    """A row an example and filter: the question, its tokens, those of the answer, the answer, the right one, and
    whether it passed: the task's first metric, where that is 0 or 1 of an example."""
    samples = found["samples"][name]
    several = len({sample["filter"] for sample in samples}) > 1
    instances: dict[int, list[Any]] = {}
    for one in task.instances:
        instances.setdefault(one.doc_id, []).append(one)
    for sample in samples:
        asked = sorted(instances[sample["doc_id"]], key=lambda one: one.idx)
        key = f"{name}:{sample['doc_id']}" + (f":{sample['filter']}" if several else "")
        query, read, answer, said = lm.shown(asked)
        filtered = sample["filtered_resps"][0] if asked[0].request_type == "generate_until" else said
        gold = sample["target"]
        if task.OUTPUT_TYPE == "multiple_choice" and isinstance(gold, int):
            gold = task.doc_to_choice(sample["doc"])[gold]
        score = next((sample[metric] for metric in sample["metrics"] if isinstance(sample[metric], (int, float))), None)
        passed = bool(score) if score in (0, 1) else ""
        yield [key, query, " ".join(map(str, read)), " ".join(map(str, answer)), filtered, gold, passed]


def number(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.4f}"
