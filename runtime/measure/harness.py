"""The engine as a model of lm-eval (`lm_eval.api.model`): what its tasks ask, on the generated code.

    lm = EngineLM(tokenizer, max_length=2048)
    needed = lm.read(task.instances)                # tokens of a sequence -> how many: what the caches must hold
    lm.calls = Calls(engine, team)
    lm_eval.evaluator.evaluate(lm, {"tasks": {...}})

Questions are put to the model as lm-eval's own class for transformers does it (lm_eval/models/huggingface.py, version
0.4.13, called HFLM below): which tokens are context and which are scored, what is cut where a sequence is too long,
what stands before an empty context, where an answer ends. tests/runtime/test_eval_tasks.py compares the two.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llmc.compiler.diagnostics import UserError
from llmc.runtime.engine.engine import Step
from llmc.runtime.engine.logprobs import token_logprobs
from llmc.runtime.engine.sampling import SamplingParams
from llmc.runtime.engine.tokenizer import Tokenizer
from llmc.runtime.measure.calls import Calls

AT_ONCE = 256  # sequences that the engine is given in one call: it keeps all of them in memory
ANSWER_TOKENS = 256  # unless the task says (HFLM.max_gen_toks)
SEED = 1234  # of draws: lm-eval's own for torch
# Of a task's generation_kwargs: those that SamplingParams has too, with what turns each off
SAMPLING = {"top_p": 0.0, "top_k": 0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
SAY = 'tokenizer_config.json says it: "eos_token": "</s>"'
CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "  # as in transformers, utils/chat_template_utils.py

Pair = tuple[array, array]  # ids of a context, and of what is scored behind it


@dataclass(frozen=True)
class Prompt:
    """One that is to be continued. `until`: texts that end the answer, and are cut off."""

    ids: array
    params: SamplingParams
    until: tuple[str, ...]


class EngineLM(TemplateLM):
    """All three kinds of request. Token ids of what was read are kept, as 4 bytes each."""

    calls: Calls

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, template: str | None = None) -> None:
        """`template`: for chats, instead of the checkpoint's."""
        super().__init__()
        self.text, self.max_length, self.template = tokenizer, max_length, template
        self.on_done: Callable[[int], None] = lambda count: None  # is told how many requests are answered
        self.cut = 0  # sequences that were too long, and lost their first tokens
        self.answers: dict[tuple[str, str], list[int]] = {}  # token ids of each answer, for --debug-csv
        self._context: tuple[str, list[int]] | None = None  # the one encoded last: choices of a question share it
        self._pairs: dict[tuple[str, str], Pair] = {}
        self._windows: dict[str, list[Pair]] = {}
        self._prompts: dict[tuple[str, str], Prompt] = {}

    # ---- tokens

    @cached_property
    def begin(self) -> int | None:
        return self._special("bos_token")

    @cached_property
    def end(self) -> int | None:
        return self._special("eos_token")

    def _special(self, name: str) -> int | None:
        """As the tokenizer's own files say it: ids of config.json are not asked."""
        found = self.text.encode(self.text.tokens[name], special=False) if name in self.text.tokens else []
        return found[0] if len(found) == 1 else None

    @property
    def eot_token_id(self) -> int:
        if self.end is None:
            raise UserError("the tokenizer has no eos_token", hint=SAY)
        return self.end

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context: the token that begins a text, else the one that ends it."""
        found = self.end if self.begin is None else self.begin
        if found is None:
            raise UserError(
                "the tokenizer has neither a bos_token nor an eos_token, and one of them stands before a text that "
                "has no context",
                hint=SAY,
            )
        return found

    @cached_property
    def _prefix_text(self) -> str | None:
        found = self.end if self.begin is None else self.begin
        return None if found is None else self.text.decode([found], skip_special=False)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """With the tokens that the checkpoint puts around a text, unless the text brings the first of them."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self._prefix_text)
        return self.text.encode(string, special=add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As in TemplateLM; a context that comes again is not encoded again."""
        stripped = context.rstrip()
        if self._context is None or self._context[0] != stripped:
            self._context = stripped, self.tok_encode(stripped)
        found = self._context[1]
        return found, self.tok_encode(context + continuation)[len(found) :]

    # ---- what is asked

    def read(self, instances: Sequence[Instance]) -> Counter[int]:
        """Encode them; tokens of the sequences that the engine will hold -> how many. UserError for what cannot be
        asked."""
        needed: Counter[int] = Counter()
        for one in instances:
            match one.request_type:
                case "loglikelihood":
                    needed[len(self._input(self._pair(*one.args)))] += 1
                case "loglikelihood_rolling":
                    needed.update(len(self._input(pair)) for pair in self._rolling(*one.args))
                case "generate_until":
                    prompt = self._prompt(*one.args)
                    needed[min(self.max_length, len(prompt.ids) + prompt.params.max_tokens)] += one.repeats
                case _:
                    raise UserError(f"the task {one.task_name} asks for {one.request_type}, which is no kind of text")
        return needed

    def _pair(self, context: str, continuation: str) -> Pair:
        key = (context, continuation)
        if key not in self._pairs:
            if context:
                before, after = self._encode_pair(context, continuation)
            else:
                after = self.tok_encode(continuation, add_special_tokens=False)
                before = [self.prefix_token_id]
                if after[:1] == before:
                    before, after = after[:1], after[1:]
            if not after or not before:
                raise UserError(
                    f"{continuation!r} behind {context[-60:]!r} has no token of its own to be scored",
                    hint="the task's doc_to_text, doc_to_choice and target_delimiter say what is asked",
                )
            if len(after) > self.max_length:
                raise UserError(
                    f"{continuation[:60]!r}... has {len(after)} tokens, and a sequence can have {self.max_length}"
                )
            self.cut += len(before) + len(after) - 1 > self.max_length
            self._pairs[key] = array("I", before), array("I", after)
        return self._pairs[key]

    def _input(self, pair: Pair) -> array:
        """What the model reads: everything but the last token; the first ones are cut."""
        return (pair[0] + pair[1])[-(self.max_length + 1) : -1]

    def _rolling(self, text: str) -> list[Pair]:
        if text not in self._windows:
            found = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs = [make_disjoint_window(pair) for pair in found]
            self._windows[text] = [(array("I", before), array("I", after)) for before, after in pairs]
        return self._windows[text]

    def _prompt(self, context: str, settings: Mapping[str, Any]) -> Prompt:
        key = (context, json.dumps(settings, sort_keys=True, default=str))
        if key not in self._prompts:
            params, until = self._sampling(settings)
            most = self.max_length - params.max_tokens
            if most < 1:
                raise UserError(
                    f"answers of {params.max_tokens} tokens leave no room for a question: a sequence can have "
                    f"{self.max_length}",
                    hint="the task says so as max_gen_toks",
                )
            bos = self.text.tokens.get("bos_token")
            ids = self.text.encode(context, special=not has_bos_prefix(context, bos))
            self.cut += len(ids) > most
            self._prompts[key] = Prompt(ids=array("I", ids[-most:]), params=params, until=until)
        return self._prompts[key]

    def _sampling(self, settings: Mapping[str, Any]) -> tuple[SamplingParams, tuple[str, ...]]:
        """A task's generation_kwargs. Greedy unless they say do_sample or a temperature."""
        said = dict(normalize_gen_kwargs(dict(settings), ANSWER_TOKENS))
        sample, most = said.pop("do_sample", False), said.pop("max_gen_toks")
        ends = None if self.end is None else self.text.decode([self.end], skip_special=False)
        until = tuple(text for text in handle_stop_sequences(said.pop("until", None), eos=ends) if text)
        temperature = float(said.pop("temperature", 0.0))
        seed = int(said.pop("seed", SEED))
        unknown = sorted(set(said) - set(SAMPLING))
        if unknown:
            raise UserError(
                f"generation_kwargs of the task: {', '.join(unknown)} is not known here",
                hint=f"known are until, max_gen_toks, do_sample, temperature, seed, {', '.join(SAMPLING)}",
            )
        drawn = {name: said.get(name, off) for name, off in SAMPLING.items()}
        if not sample or not temperature:
            drawn |= {"temperature": 0.0, "top_k": 1, "top_p": 0.0}
        else:
            drawn |= {"temperature": temperature, "seed": seed}
        ids = () if self.end is None else (self.end,)
        return SamplingParams(max_tokens=most, stop=until, stop_token_ids=ids, **drawn), until

    # ---- answers

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of each continuation: the sum of its tokens' log-probabilities, and whether each is the likeliest."""
        return self._score([self._pair(*request.args) for request in requests], [1] * len(requests))

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return self._score(
            [(array("I", before), array("I", after)) for _, before, after in requests], [1] * len(requests)
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Of each text, every token once: windows of the model's full length, the first one behind the token that
        begins a text."""
        windows = [self._rolling(*request.args) for request in requests]
        last = [int(i == len(pairs) - 1) for pairs in windows for i in range(len(pairs))]
        found = iter(self._score([pair for pairs in windows for pair in pairs], last))
        return [sum(next(found)[0] for _ in pairs) for pairs in windows]

    def _score(self, pairs: Sequence[Pair], counts: Sequence[int]) -> list[tuple[float, bool]]:
        """The longest first; `counts`: how many requests are done with each. What has the same tokens before its last
        one (choices of one letter) is read once."""
        same: dict[bytes, list[int]] = {}
        for i, pair in enumerate(pairs):
            same.setdefault(self._input(pair).tobytes(), []).append(i)
        order = sorted(same, key=lambda key: (-len(key), key))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for start in range(0, len(order), AT_ONCE):
            some = order[start : start + AT_ONCE]

            def answer(index: int, logits: torch.Tensor, some: list[bytes] = some) -> None:
                for i in same[some[index]]:
                    tokens = pairs[i][1].tolist()
                    rows = logits[-len(tokens) :]
                    values, _ = token_logprobs(rows, tokens)
                    # Of tokens that are as likely as each other the first one: what argmax says there, too.
                    greedy = rows.argmax(dim=-1).tolist() == tokens
                    found[i] = values.double().sum().item(), greedy
                    self.on_done(counts[i])

            self.calls.score([array("I", key).tolist() for key in some], answer)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text of each answer up to the first of its stop texts."""
        prompts = [self._prompt(*request.args) for request in requests]
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        texts = [""] * len(prompts)
        for start in range(0, len(order), AT_ONCE):
            some = order[start : start + AT_ONCE]
            # One seed would give repeated questions one answer.
            params = [own(prompts[i].params, i) for i in some]
            done = 0

            def count(step: Step, asked: int = len(some)) -> None:
                nonlocal done
                left = len(self.calls.engine.scheduler.waiting) + len(self.calls.engine.scheduler.running)
                self.on_done(asked - left - done)
                done = asked - left

            outputs = self.calls.generate([prompts[i].ids.tolist() for i in some], params, count)
            for i, output in zip(some, outputs, strict=True):
                text = self.text.decode(output.token_ids)
                texts[i] = postprocess_generated_text(text, list(prompts[i].until), None)
                self.answers[requests[i].args[0], texts[i]] = output.token_ids
        return texts

    def shown(self, asked: Sequence[Instance]) -> tuple[str, list[int], list[int], str]:
        """Of one example's requests: the question and its tokens, the tokens of the answer (of choices, the likeliest),
        and the answer."""
        match asked[0].request_type:
            case "loglikelihood":
                best = max(asked, key=lambda one: one.resps[0][0])
                before, after = self._pair(*best.args)
                return best.args[0], before.tolist(), after.tolist(), best.args[1]
            case "loglikelihood_rolling":
                tokens = [token for _, after in self._rolling(*asked[0].args) for token in after]
                return asked[0].args[0], tokens, [], str(asked[0].resps[0])
            case _:
                context, text = asked[0].args[0], asked[0].resps[0]
                return context, self._prompt(*asked[0].args).ids.tolist(), self.answers[context, text], text

    # ---- chat

    @property
    def tokenizer_name(self) -> str:
        return "llmc"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return (self.template or self.text.template) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without a generation prompt its last message is one that goes on. A template that
        takes no system message gets the conversation without it."""
        try:
            return self._chat(chat_history, add_generation_prompt)
        except UserError:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            return self._chat(without, add_generation_prompt)

    def _chat(self, messages: Sequence[Mapping[str, str]], ends: bool) -> str:
        if ends:
            return self.text.chat(messages, template=self.template)
        last = {**messages[-1], "content": messages[-1]["content"] + CONTINUED}
        text = self.text.chat([*messages[:-1], last], template=self.template, add_generation_prompt=False)
        before, tag, behind = text.rpartition(CONTINUED.strip())
        if not tag:
            raise UserError("the chat template leaves the last message out, which is to be continued", hint="no --chat")
        return before if behind.startswith(" ") else before.rstrip()


def own(params: SamplingParams, number: int) -> SamplingParams:
    return params if params.seed is None else replace(params, seed=params.seed + number)
