"""The command line: parses and prints. The functions behind it take and return plain values.

Torch is imported only by the commands that compute (run, demo, convert).
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from llmc.compiler.diagnostics import DiagnosticError, UserError, did_you_mean, visible
from llmc.compiler.terminal import columns, fold

WRONG_USAGE = "E601"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. 0 done, 1 something the user can mend, 2 wrong usage, 130 interrupted."""
    words = sys.argv[1:] if argv is None else list(argv)
    _say_what_can_be_said()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow
        from llmc.compiler.completion import complete

        complete(make_parser, COMMANDS)
    command = next((i for i, word in enumerate(words) if not word.startswith("-")), 0)
    if asks_for_json(words[:command]):  # the one flag that may also stand before the command
        words = [*words[command:], "--json"]
    try:
        args, unknown = make_parser(words).parse_known_args(words)
        if unknown:
            args.error(f"unrecognized arguments: {' '.join(unknown)}")
        code = _run(args)
        if sys.stdout is not None:  # closed by `>&-`
            sys.stdout.flush()  # here, so that a closed pipe or a full disk is found while it can be told
        return code
    except KeyboardInterrupt:
        if asks_for_json(words):
            report(UserError("interrupted"), as_json=True)
        else:
            print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `llmc show ... | head`
        _drop_stdout()
        return 0
    except OSError as error:  # what no command expected of this machine: a full disk, a file that may not be read
        if error.errno != errno.ENOSPC and not error.filename:
            raise
        where = error.filename or "the output cannot be written"
        if not error.filename:
            _drop_stdout()
        report(UserError(f"{where}: {error.strerror}"), as_json=bool(error.filename) and asks_for_json(words))
        return 1


def _run(args: argparse.Namespace) -> int:
    try:
        return args.run(args) or 0
    except UserError as error:
        report(error, args.json)
        return 2 if error.code == WRONG_USAGE else 1


def _say_what_can_be_said() -> None:
    """Characters that the terminal's encoding lacks (LANG=C, PYTHONIOENCODING=ascii) are escaped, not fatal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """What is still buffered goes nowhere, or Python would complain about it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(error: UserError, as_json: bool) -> None:
    """The message on stderr; with --json one object on stdout."""
    if as_json:
        print(json.dumps({"ok": False, "problems": error.problems()}, indent=1))
    else:
        text = f"llmc: {error}" if not isinstance(error, DiagnosticError) else str(error)
        print(fold(text, columns(sys.stderr)), file=sys.stderr)


def asks_for_json(words: Sequence[str]) -> bool:
    """Of a command line that may not be parsed; argparse takes every beginning of a flag for the flag."""
    flags = words[: words.index("--")] if "--" in words else words
    return any(word.startswith("--j") and "--json".startswith(word) for word in flags)


class Help(argparse.HelpFormatter):
    """Of a flag's spellings (--model-path, --model_path) the first, and its value once."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        words = list(dict.fromkeys(word.replace("_", "-") for word in action.option_strings))
        if action.nargs == 0:
            return ", ".join(words)
        return f"{', '.join(words)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"


class Parser(argparse.ArgumentParser):
    """argparse, but wrong usage is told with what is near to it, and with --json as all problems are."""

    words: Sequence[str] = ()  # the command line

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=Help, **settings)

    def error(self, message: str, near: str = "") -> NoReturn:
        near = near or self.near()
        if asks_for_json(self.words):
            report(UserError(message, hint=near, code=WRONG_USAGE), as_json=True)
        else:
            self.print_usage(sys.stderr)
            text = f"{self.prog}: error: {message}{f' ({near})' if near else ''}"
            print(fold(text, columns(sys.stderr)), file=sys.stderr)
        raise SystemExit(2)

    def near(self) -> str:
        """ "did you mean '--json'?", for flags of the command line that are none."""
        known = {"--json", *self._option_string_actions}
        given = [word.partition("=")[0] for word in self.words if word.startswith("--") and word != "--"]
        unknown = [word for word in given if not any(flag.startswith(word) for flag in known)]
        found = [hint for word in dict.fromkeys(unknown) if (hint := did_you_mean(word, known)).startswith("did")]
        return " ".join(found)


def make_parser(words: Sequence[str]) -> Parser:
    """The parser of a command line. Only its command gets flags, so that compiling imports nothing of the runtime."""
    parser = Parser(prog="llmc", description="Compile a declared model graph for Ascend NPUs, and run it.")
    parser.words = words
    parser.add_argument("--version", action="version", version=f"llmc {version('llmc')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = next((word for word in words if not word.startswith("-")), "")
    if command and command not in COMMANDS:
        parser.error(f"unknown command {command!r}", did_you_mean(command, COMMANDS))
    for name, (run, flags, text) in COMMANDS.items():
        p = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        p.words = words
        if name == command:
            flags(p)
            if "--json" not in p._option_string_actions:  # the commands of the runtime bring their own
                p.add_argument("--json", action="store_true", help="one JSON object on stdout, also of problems")
        p.set_defaults(run=run, error=p.error)
    return parser


def compile_flags(p: argparse.ArgumentParser) -> None:
    graph_flags(p)
    p.add_argument("-o", "--output", type=Path, help="directory to write (default: build/<model>-<device>-...)")
    p.add_argument(
        "--taps",
        metavar="LIST",
        help="nodes whose values leave the graph too, comma separated: layers.3.*, * for all (see llmc trace)",
    )
    p.add_argument("--until", metavar="PASS", default="", help="stop after this pass and write nothing")
    p.add_argument("--print", action="store_true", help="print the graph after the last pass")


def graph_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("graph", help="a YAML file, or the name of a packaged model")
    p.add_argument("--device", default="atlas-800i-a2", help="atlas-800i-a2 (default), atlas-300i-duo or host")
    p.add_argument("--dtype", help="float16, bfloat16; on host also float32 (default: the model's)")
    p.add_argument("--attention", default="paged", help="paged (default) or flash")
    p.add_argument("--logits", default="last", help="of a prefill: last (default; of each prompt's last token) or all")
    p.add_argument(
        "--tp",
        "--world-size",
        type=int,
        dest="tp",
        help="world size of tensor parallelism (default: the smallest that the model offers on the device)",
    )
    p.add_argument("--backend", help="of collectives: lccl or hccl (default: the device's)")
    p.add_argument("--allow-unsupported", action="store_true", help="also what the model's `support:` does not offer")
    extends_flag(p)
    p.add_argument("--fuse", metavar="LIST", help="fusions to apply, comma separated, or none (default: the device's)")
    p.add_argument("--layers-per-segment", type=int, default=0, help="at most so many layers in one ATB graph")


def extends_flag(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--allow-extends",
        metavar="DIR",
        action="append",
        default=[],
        help="`extends:` may read files of this directory too, not only of the model's own (repeatable)",
    )


def diff_flags(p: argparse.ArgumentParser) -> None:
    text = "a model (YAML file or name) with settings after @, or the directory of an artifact"
    p.add_argument("a", metavar="A", help=text)
    p.add_argument("b", metavar="B", help="likewise")
    extends_flag(p)
    p.epilog = (
        "Settings are the flags of `llmc compile`: llama2-13b@tp=8, llama2-7b@tp=2,dtype=bfloat16,attention=flash; "
        "a list is written with +, as in fuse=swiglu+add_norm. The exit code is 0 whether or not there are differences."
    )


def explain_flags(p: argparse.ArgumentParser) -> None:
    graph_flags(p)
    p.add_argument("node", help="a node, or a value, weight or cache of it: layers.0.attn.o")


def show_flags(p: argparse.ArgumentParser) -> None:
    graph_flags(p)
    p.add_argument("--html", type=Path, metavar="FILE", help="write a page that draws the model, for a browser")
    p.add_argument(
        "--times", type=Path, metavar="FILE", help="times for the page, from `llmc bench --profile --json > FILE`"
    )


def plan_flags(p: argparse.ArgumentParser) -> None:
    graph_flags(p)
    p.add_argument("--memory", help="of one rank, as 32GiB or 29GB (default: the device's first board)")
    p.add_argument("--reserve", help="of that memory, for what is not counted (default: the device's)")
    p.add_argument("--batch", "--batch-size", type=int, default=1, help="sequences at a time (default 1)")
    p.add_argument("--prompt", type=int, help="tokens of a prompt (default 1024, or what the model's positions allow)")
    p.add_argument("--answer", type=int, help="tokens of an answer (likewise)")
    p.add_argument(
        "--prefill-tokens",
        "--max-prefill-tokens",
        type=int,
        help="most prompt tokens in one step (default: as in `llmc run`)",
    )
    p.epilog = "Every world size is planned, also those that the model does not offer; --tp N plans that one alone."


def init_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model-path", "--model_path", type=Path, required=True)
    p.add_argument("--name", help="name of the variant (default: the directory's name)")
    p.add_argument(
        "--ignore-config",
        "--ignore_config",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY",
        help="keys of config.json that the model's computation does not depend on; the variant says so",
    )


def ops_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", nargs="?", help="an operator (default: all, a line each)")


def env_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="atlas-800i-a2", help="atlas-800i-a2 (default), atlas-300i-duo or host")
    p.add_argument("--attention", default="paged", help="paged (default) or flash")


def run_flags(p: argparse.ArgumentParser) -> None:
    from llmc.runtime.flags import RUN_FLAGS, add_flags

    p.usage = "llmc run --model-path DIR [--input-text TEXT ...] [flags; -h lists them]"
    p.epilog = "Flags may also be written with _, as in --max_output_length."
    add_flags(p, RUN_FLAGS)


def trace_flags(p: argparse.ArgumentParser) -> None:
    from llmc.runtime.flags import TRACE_FLAGS, add_flags

    p.usage = "llmc trace --model-path DIR [--input-ids 5,6,7] [flags; -h lists them]"
    p.epilog = "The exit code is 1 where a value leaves its error budget. Flags may also be written with _."
    add_flags(p, TRACE_FLAGS)


def bench_flags(p: argparse.ArgumentParser) -> None:
    from llmc.runtime.flags import BENCH_FLAGS, add_flags

    p.usage = 'llmc bench --model-path DIR [--cases "[[256,256]]"] [--batch 1,4] [flags]'
    add_flags(p, BENCH_FLAGS)


def eval_flags(p: argparse.ArgumentParser) -> None:
    from llmc.runtime.flags import EVAL_FLAGS, add_flags

    p.usage = "llmc eval --model-path DIR --text FILE|--tasks A,B|--golden DIR [flags]"
    add_flags(p, EVAL_FLAGS)


def modeltest_flags(p: argparse.ArgumentParser) -> None:
    p.usage = "llmc modeltest [--run] pa_fp16 performance [[256,256]] 1 llama DIR 8"
    p.add_argument("words", nargs="*", metavar="WORD", help="the words behind `bash run.sh` of the original tests")
    p.add_argument("--run", action="store_true", dest="go", help="run the command too; without it, it is printed")
    p.add_argument("--data", default="", metavar="DIR", help="where the files of a precision test are")


def demo_flags(p: argparse.ArgumentParser) -> None:
    from llmc.runtime.demo import add_demo_flags

    add_demo_flags(p)


def convert_flags(p: argparse.ArgumentParser) -> None:
    from llmc.runtime.convert.convert import add_convert_flags

    add_convert_flags(p)


def _options(args: argparse.Namespace) -> Any:
    from llmc.compiler.options import Options

    fusions = None if args.fuse is None else tuple(w for w in args.fuse.split(",") if w and w != "none")
    return Options(
        device=args.device,
        dtype=args.dtype,
        attention=args.attention,
        logits=args.logits,
        world_size=args.tp,
        backend=args.backend,
        allow_unsupported=args.allow_unsupported,
        allow_extends=tuple(args.allow_extends),
        fusions=fusions,
        layers_per_segment=args.layers_per_segment,
        taps=tuple(word for word in (getattr(args, "taps", None) or "").split(",") if word),
    )


def tell(args: argparse.Namespace, facts: Mapping[str, Any], text: Callable[[], str]) -> int:
    """What a command found out: as text, with --json as one object that says ok. The exit code, 0."""
    print(json.dumps({"ok": True, **facts}, indent=1) if args.json else fold(text(), columns(sys.stdout)))
    return 0


def compile_command(args: argparse.Namespace) -> int:
    from llmc.compiler import artifact
    from llmc.compiler.pipeline import compile_model
    from llmc.compiler.reports import show

    start = time.perf_counter()
    compiled = compile_model(args.graph, _options(args), until=args.until, every_layer=bool(args.until or args.print))
    graphs = {phase: show.show_result(result) for phase, result in compiled.phases.items()} if args.print else {}
    if args.until:
        facts: dict[str, Any] = {"model": compiled.model.name, "until": args.until}
        closing = f"{args.graph}: ok up to the pass {args.until}; nothing is written"
    else:
        target = args.output or Path("build") / artifact.default_name(compiled)
        artifact.write(compiled, target)
        facts = {"path": str(target), **show.summary(compiled)}
        closing = f"{target}: {show.summary_line(compiled)} ({time.perf_counter() - start:.2f} s)"
    texts = "".join(f"--- {phase}\n{text}\n" for phase, text in graphs.items())
    return tell(args, {**facts, **({"graphs": graphs} if graphs else {})}, lambda: texts + closing)


def check_command(args: argparse.Namespace) -> int:
    from llmc.compiler.pipeline import compile_model
    from llmc.compiler.reports import show

    compiled = compile_model(args.graph, _options(args), every_layer=False)
    return tell(args, show.summary(compiled), lambda: f"{args.graph}: ok; {show.summary_line(compiled)}")


def show_command(args: argparse.Namespace) -> int:
    from llmc.compiler.pipeline import compile_model
    from llmc.compiler.reports import show

    if args.times and not args.html:
        raise UserError("--times is for the page that --html writes", hint="llmc show GRAPH --html FILE --times FILE")
    compiled = compile_model(args.graph, _options(args))
    if args.html:
        from llmc.compiler.reports import picture
        from llmc.compiler.reports.times import read_times

        times = read_times(args.times, compiled) if args.times else None
        facts = {"path": str(args.html), "bytes": picture.write(compiled, args.html, times)}
        closing = f"{args.html}: a page of {show.head_line(compiled)}; open it in a browser"
        return tell(args, facts, lambda: closing)
    return tell(args, show.summary(compiled), lambda: show.show_model(compiled))


def diff_command(args: argparse.Namespace) -> int:
    from llmc.compiler.reports import diff

    changes = diff.diff(*(_manifest(side, args.allow_extends) for side in (args.a, args.b)))
    facts = {"equal": not changes, "a": args.a, "b": args.b, "changes": changes}
    return tell(args, facts, lambda: diff.show_diff(changes, args.a, args.b))


def _manifest(side: str, allow_extends: Sequence[str]) -> Any:
    """The manifest of one side of `llmc diff`: of an artifact that lies there, or of a model compiled in memory."""
    from llmc.compiler import artifact
    from llmc.compiler.pipeline import compile_model

    if Path(side).is_dir():
        return artifact.read(Path(side)).manifest
    args = _side(side)
    args.allow_extends += allow_extends
    return artifact.make_manifest(compile_model(args.graph, _options(args), every_layer=False))


def _side(side: str) -> argparse.Namespace:
    """`llama2-7b@tp=2,dtype=bfloat16`  ->  what `llama2-7b --tp 2 --dtype bfloat16` would parse to"""
    graph, at, settings = side.rpartition("@")
    if not at or Path(side).exists():
        graph, at = side, ""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    graph_flags(parser)
    known = {flag.lstrip("-") for flag in parser._option_string_actions}
    words = [graph]
    for setting in settings.split(",") if at else ():
        key, equals, value = setting.partition("=")
        if key not in known:
            raise UserError(f"{side}: unknown setting {key!r}", hint=did_you_mean(key, known))
        words.append(f"--{key}={value.replace('+', ',')}" if equals else f"--{key}")

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{side}: {message}", hint="settings are written NAME@tp=2,dtype=bfloat16")

    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args(words)


def explain_command(args: argparse.Namespace) -> int:
    from llmc.compiler.pipeline import compile_model
    from llmc.compiler.reports.explain import explain, show_explanation

    facts = explain(compile_model(args.graph, _options(args)), args.node)
    return tell(args, facts, lambda: show_explanation(facts))


def plan_command(args: argparse.Namespace) -> int:
    from llmc.compiler.reports.plan import Workload, plan, show_plan
    from llmc.compiler.target.device import parse_size

    memory, reserve = (text and parse_size(text) for text in (args.memory, args.reserve))
    work = Workload(batch=args.batch, prompt=args.prompt, answer=args.answer, prefill_tokens=args.prefill_tokens)
    facts = plan(args.graph, _options(args), work, memory=memory, reserve=reserve, environment=os.environ)
    return tell(args, facts, lambda: show_plan(facts))


def init_command(args: argparse.Namespace) -> int:
    from llmc.compiler.language.checkpoint import read_config, variant_from_config

    path = args.model_path.resolve()
    name = args.name or (path.parent if path.is_file() else path).name.lower()
    text = variant_from_config(read_config(args.model_path), name, args.ignore_config)
    if args.json:
        return tell(args, {"name": name, "yaml": text}, text.rstrip)
    print(visible(text), end="")  # a file's lines: never folded
    return 0


def ops_command(args: argparse.Namespace) -> int:
    from llmc.compiler.ops import OPS
    from llmc.compiler.reports import show

    if args.name and args.name not in OPS:
        raise UserError(f"no operator {args.name!r}", hint=did_you_mean(args.name, OPS), code="E107")
    chosen = [OPS[args.name]] if args.name else list(OPS.values())
    keys = ("name", "doc", "inputs", "outputs", "splits", "authored", "source")
    facts = {"operators": [{key: getattr(op, key) for key in keys} for op in chosen]}
    return tell(args, facts, lambda: show.show_op(chosen[0]) if args.name else show.show_ops(chosen))


def env_command(args: argparse.Namespace) -> int:
    from llmc.compiler.target import environment

    facts = environment.facts(args.device, args.attention)
    return tell(args, facts, lambda: environment.exports(args.device, args.attention, columns(sys.stdout)))


def schema_command(args: argparse.Namespace) -> int:
    from llmc.compiler.language.schema import schema

    if args.json:
        return tell(args, {"schema": schema()}, str)
    print(json.dumps(schema(), indent=1))
    return 0


def run_command(args: argparse.Namespace) -> int:
    return _on_ranks(args, "llmc.runtime.run")


def _on_ranks(args: argparse.Namespace, module: str) -> int:
    """`run(args, team)` of this module, alone or as one rank of those that torchrun (or `llmc --tp N`) has started."""
    _keep_backends_out()
    from llmc.runtime import ranks

    def work(team: ranks.Team | None) -> int:
        return import_module(module).run(args, team)

    place = ranks.find_place()
    return ranks.join(place, work, lambda error: report(error, args.json)) if place else work(None)


def trace_command(args: argparse.Namespace) -> int:
    return _on_ranks(args, "llmc.runtime.measure.trace")


def bench_command(args: argparse.Namespace) -> int:
    return _on_ranks(args, "llmc.runtime.measure.bench")


def eval_command(args: argparse.Namespace) -> int:
    return _on_ranks(args, "llmc.runtime.measure.evaluate")


def modeltest_command(args: argparse.Namespace) -> int:
    from llmc.runtime.measure.modeltest import translate

    made = translate(args.words, args.data)
    if args.json and not args.go:
        facts = {"line": made.line, "commands": made.commands, "understood": dict(made.understood), "notes": made.notes}
        return tell(args, facts, str)
    if not args.json:
        understood = ", ".join(f"{what} {word}" for what, word in made.understood)
        said = "\n".join([f"understood: {understood}", *(f"note: {note}" for note in made.notes)])
        print(fold(said, columns(sys.stderr)), file=sys.stderr)
        print(visible(made.line))  # one line, to be copied: never folded
    for words in made.commands if args.go else ():
        if code := main([*words, *(["--json"] if args.json else [])]):
            return code
    return 0


def demo_command(args: argparse.Namespace) -> int:
    _keep_backends_out()
    from llmc.runtime.demo import demo

    return demo(args)


def _keep_backends_out() -> None:
    """torch would import torch_npu by itself, before the device's environment is applied (npu.py imports it then)."""
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def convert_command(args: argparse.Namespace) -> int:
    from llmc.runtime.convert import convert

    return convert.run(args)


# name: what runs, what adds its flags, what it does
COMMANDS: dict[str, tuple[Callable, Callable[[argparse.ArgumentParser], None], str]] = {
    "compile": (compile_command, compile_flags, "write the artifact of a model: generated code and manifest.json"),
    "check": (check_command, graph_flags, "read, type and lower a model; write nothing"),
    "show": (show_command, show_flags, "sizes, types, ATB operations and segments of a model; --html draws it"),
    "diff": (diff_command, diff_flags, "what differs between two models, two world sizes or two artifacts"),
    "explain": (explain_command, explain_flags, "type, sharding, neighbours, ATB calls and rules of one node"),
    "plan": (plan_command, plan_flags, "bytes, traffic, FLOPs and times of one rank, for every world size"),
    "init": (init_command, init_flags, "print the YAML of a new variant from a checkpoint's config.json"),
    "ops": (ops_command, ops_flags, "list the operators of the language, or explain one"),
    "env": (env_command, env_flags, "print the environment variables of a device, with a word on each"),
    "schema": (schema_command, lambda p: None, "print the JSON Schema of model files, for editors"),
    "run": (run_command, run_flags, "generate text with a checkpoint"),
    "trace": (trace_command, trace_flags, "compare with transformers value by value: the first node that errs"),
    "bench": (bench_command, bench_flags, "time prefill and decode of a checkpoint, for cases and batches"),
    "eval": (eval_command, eval_flags, "perplexity of a text, and other measures of a checkpoint's answers"),
    "modeltest": (modeltest_command, modeltest_flags, "command lines of the original tests, as commands of llmc"),
    "demo": (demo_command, demo_flags, "fetch a small real model, compile it and answer a question on this machine"),
    "convert": (convert_command, convert_flags, "turn .bin or GGUF weights into a safetensors checkpoint"),
}


if __name__ == "__main__":
    sys.exit(main())
