"""The RULER tasks of lm-evaluation-harness: its prompts and its scores, each sample answered with every cache.

lm-eval makes 500 samples of a context, one after the other from one random state, and goes on for ever where not even the
smallest fits. Here its own functions are asked for as many as are wanted, from a state that only the seed decides, and are
stopped where they get nowhere. With seed 0 the samples are those that lm-eval makes for one task and context by itself.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError, MissingDependencyError
from .caches import DENSE
from .task import Filled, Makers, Metric, Outcome, Row, Task, text_hash

OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")  # all else downloads
QUESTIONS = {"ruler_qa_squad": "read_squad", "ruler_qa_hotpot": "read_hotpotqa"}  # and what downloads them
MAKERS = ("generate_samples", "sys_word_pair_random", "sys_vartrack_w_noise_random", "sys_kwext")  # lm-eval's, by module
PYTHON_SEED, NUMPY_SEED, CWE_SEED = 0, 1234, 42  # lm-eval's own
TRIES = 50  # that a sample may take; lm-eval's need one, or two
CHARACTERS = 64  # of English for one token: more, and a tokenizer cannot measure a text
LONGEST = 2**20  # tokens of a context that is looked for
STEP = 32  # to which the smallest context is looked for
SHOWN = 300  # characters of an answer that a row keeps
LONGEST_REASON = 160  # characters of lm-eval's own message
SAMPLE = "One of the special magic numbers for quick-fox is: 1234567. The grass is green. " * 50


class _DoesNotFit(Exception):
    """lm-eval finds no samples of that size."""


class _Step(int):
    """By how much lm-eval shortens a sample that is too long: asked `used > step` after each failure, it ends the endless."""

    left: int

    @classmethod
    def of(cls, value: int, left: int) -> _Step:
        """A step that may be asked `left` times."""
        step = cls(value)
        step.left = left
        return step

    def _compared(self, result: bool) -> bool:
        self.left -= 1
        if self.left < 0:
            raise _DoesNotFit("no sample was short enough")
        return result

    def __lt__(self, other: int) -> bool:
        return self._compared(int(self) < int(other))

    def __gt__(self, other: int) -> bool:
        return self._compared(int(self) > int(other))


class Ruler(Task):
    """Samples of RULER tasks, answered greedily; the score is lm-eval's, the share of the wanted strings in the answer.

    Args: tasks: names, with or without `ruler_`; contexts: tokens of prompt and answer; items: samples of each task and
        context; max_new_tokens: of an answer, None leaves it to each task.

    Raises: InputError: an unknown task, sizes out of range or too small for a task, or what a task is made from cannot be
        downloaded; MissingDependencyError: lm-eval, or what its tasks need, is not installed.
    """

    name = "ruler"
    metric = Metric("score", "wanted strings in the answer", "share", higher_is_better=True, right_or_wrong=True)

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: tuple[str, ...],
        contexts: tuple[int, ...],
        items: int,
        seed: int = 0,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__(model, tokenizer, 0)
        if not contexts or min(contexts) < 1:
            raise InputError(f"--context {','.join(map(str, contexts))}: expected whole numbers from 1 on.")
        if items < 1 or (max_new_tokens is not None and max_new_tokens < 1):
            raise InputError(f"--items {items}, --new-tokens {max_new_tokens}: expected at least 1.")
        self.contexts, self.items, self.seed, self.new_tokens = contexts, items, seed, max_new_tokens
        self._check_tokenizer()
        with _quiet():
            files = _files()
            self.tasks = tuple(dict.fromkeys(_known(name, list(files)) for name in tasks))
            if not self.tasks:
                raise InputError(f"--tasks: expected at least one of {', '.join(files)}.")
            self._configs = {name: _load(name, files[name]) for name in self.tasks}
            self._samples = {
                f"{name}/{context}/{index}": (task, instance)
                for name in self.tasks
                for context in contexts
                for task in [self._make(name, context)]
                for index, instance in enumerate(task.instances)
            }
            self.steps = max(instance.args[1]["max_gen_toks"] for _, instance in self._samples.values())
            self._lm = self._harness()

    def _check_tokenizer(self) -> None:
        found = len(self.tokenizer(SAMPLE, verbose=False).input_ids)
        if found * CHARACTERS < len(SAMPLE):
            raise InputError(
                f"the tokenizer makes {found} tokens of {len(SAMPLE):,} characters of English: RULER sizes its prompts by "
                "tokens and cannot with this one; take another --model."
            )

    def _make(self, name: str, context: int) -> Any:
        """lm-eval's task with so many samples of one context, and their requests."""
        try:
            return self._build(name, context)
        except _DoesNotFit as error:
            least = self._least(name, context)
            if least is None:
                raise InputError(f"--tasks {name}: lm-eval can make no samples with this tokenizer ({error}).") from error
            raise InputError(
                f"--context {context}: too small for {self.items} samples of {name} with this tokenizer; the smallest larger "
                f"one that works is --context {least} (in steps of {STEP})."
            ) from error

    def _least(self, name: str, context: int) -> int | None:
        """The smallest larger context that works, a multiple of 32; None where none does. Asked of lm-eval itself."""

        def works(context: int) -> bool:
            try:
                self._build(name, context)
            except _DoesNotFit:
                return False
            return True

        low, high = context // STEP, max(8, 2 * context // STEP)
        while not works(high * STEP):
            low, high = high, 2 * high
            if high * STEP > LONGEST:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if works(middle * STEP) else (middle, high)
        return high * STEP

    def _build(self, name: str, context: int) -> Any:
        from lm_eval.api.task import ConfigurableTask

        config = self._configs[name]
        own = config["custom_dataset"]

        @wraps(own)
        def limited(**metadata: Any) -> Any:
            spaces = own.__globals__
            budget = 1000 + context // 2 + TRIES * self.items
            stand_ins = {key: self._limited(spaces[key]) for key in MAKERS if key in spaces}
            stand_ins["get_tokenizer"] = lambda _: _Counted(self.tokenizer, budget)
            with _seeded(self.seed, spaces), _replaced(spaces, **stand_ins):
                return own(**metadata)

        metadata = {**config["metadata"], "max_seq_lengths": [context], "tokenizer": "loaded"}
        try:
            task = ConfigurableTask(config={**config, "custom_dataset": limited, "metadata": metadata})
        except (ValueError, IndexError, ArithmeticError, RuntimeError) as error:  # what lm-eval ends in where nothing fits
            raise _DoesNotFit(_reason(error)) from error
        if self.new_tokens is not None:
            task.set_config("generation_kwargs", {"max_gen_toks": self.new_tokens}, update=True)
        task.build_all_requests()
        docs = [instance.doc for instance in task.instances]
        if len(docs) < self.items:
            raise _DoesNotFit(f"only {len(docs)} samples fit")
        for doc in docs:
            if not doc["outputs"] or (name not in QUESTIONS and not all(text in doc["input"] for text in doc["outputs"])):
                raise _DoesNotFit("the prompt is too short to hold an answer")
        return task

    def _limited(self, maker: Callable[..., Any]) -> Callable[..., Any]:
        """A function of lm-eval that makes as many samples as are wanted, and ends."""
        parameters = inspect.signature(maker).parameters

        @wraps(maker)
        def limited(*arguments: Any, **options: Any) -> Any:
            if options.get("num_samples") != 1:  # the worked example in prompts of variable tracking
                options["num_samples"] = self.items
            if "incremental" in parameters:
                step = options.get("incremental", parameters["incremental"].default)
                options["incremental"] = _Step.of(step, TRIES * (self.items + 1))
            return maker(*arguments, **options)

        return limited

    def _harness(self) -> Any:
        from lm_eval.models.utils import resolve_max_length

        from .harness_model import CertifiedLM

        needs = {
            piece: len(self.tokenizer(self.prompt(piece), verbose=False).input_ids) + instance.args[1]["max_gen_toks"]
            for piece, (_, instance) in self._samples.items()
        }
        longest = max(needs, key=lambda piece: needs[piece])
        limit = resolve_max_length(self.model.config, self.tokenizer, default=needs[longest])
        if needs[longest] > limit:
            raise InputError(
                f"--context: sample {longest} and its answer take {needs[longest]:,} tokens, and the model reads {limit:,} by "
                "its config; take a smaller --context."
            )
        # lm-eval gives a tokenizer a padding token where it has none: not to the caller's.
        return CertifiedLM(self.model, tokenizer=copy.deepcopy(self.tokenizer), max_length=limit, batch_size=1)

    def settings(self) -> dict[str, Any]:
        """What decides the scores."""
        prompts = "\n".join(map(self.prompt, self._samples))
        return {
            "tasks": list(self.tasks), "contexts": list(self.contexts), "items": self.items, "seed": self.seed,
            "new_tokens": self.new_tokens, "lm_eval": version("lm_eval"), "prompts_sha256": text_hash(prompts),
        }  # fmt: skip

    def pieces(self) -> list[str]:
        """A sample each: task/context/index."""
        return list(self._samples)

    def prompt(self, piece: str) -> str:
        """What the model is given."""
        found: str = self._samples[piece][1].args[0]
        return found

    def measure(self, piece: str, makers: Makers) -> Outcome:
        """Answer one sample with every cache."""
        task, instance = self._samples[piece]
        name, context, _ = piece.split("/")
        scores: dict[str, dict[str, Any]] = {}
        runs: dict[str, list[Filled]] = {}
        dense = ""
        for cache, make in makers.items():
            text, call = self._answer(instance, make)
            found = task.process_results(instance.doc, [text])
            dense = text if cache == DENSE else dense
            scores[cache] = {"score": float(found[context]), "text": text[:SHOWN], "equal": float(text == dense)}
            runs[cache] = [Filled(call.cache, call.new - 1)]  # the first new token comes of the prompt itself
        return Outcome([Row(piece, int(context), {"task": name}, scores)], runs)

    def _answer(self, instance: Any, make: Callable[[], Any]) -> tuple[str, Any]:
        calls: list[Any] = []
        self._lm.make_cache, self._lm.on_call = make, calls.append
        (text,) = self._lm.generate_until([instance], disable_tqdm=True)
        return text, calls.pop()


class _Counted:
    """A tokenizer that measures texts for lm-eval, a limited number of times: a loop that shortens in vain ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, left: int) -> None:
        self.tokenizer, self.left = tokenizer, left

    def __call__(self, text: str) -> Any:
        self.left -= 1
        if self.left < 0:
            raise _DoesNotFit("no sample was short enough")
        return self.tokenizer(text, verbose=False)


def _files() -> dict[str, Path]:
    """lm-eval's RULER tasks and where each is described."""
    try:
        import lm_eval.tasks
    except ImportError as error:
        raise MissingDependencyError(f"--tasks of RULER need lm-eval ({error}): pip install 'hf_certkv[eval]'.") from error
    folder = Path(lm_eval.tasks.__file__).parent / "ruler"
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))
    return {name: manager.task_index[name].yaml_path for name in manager.all_subtasks}


def _known(name: str, there: list[str]) -> str:
    for known in (name, f"ruler_{name}"):
        if known in there:
            return known
    more = [known for known in there if known not in OFFLINE]
    raise InputError(
        f"--tasks {name}: no task is called that; there are {', '.join(OFFLINE)}, and with a download {', '.join(more)}."
    )


def _load(name: str, file: Path) -> dict[str, Any]:
    """A task's config with lm-eval's functions in it, and what they read, downloaded where it is not there."""
    try:
        import nltk
        from lm_eval.tasks._yaml_loader import load_yaml

        with _replaced(vars(nltk), download=lambda *_, **__: False):  # importing them would try, needed or not
            config = load_yaml(file)
    except ImportError as error:
        raise MissingDependencyError(
            f"--tasks {name} needs what lm-eval leaves optional ({_reason(error)}): pip install 'hf_certkv[eval]'."
        ) from error
    space = config["custom_dataset"].__globals__
    try:
        if name in QUESTIONS:
            space[QUESTIONS[name]]()
        elif name not in OFFLINE:
            space["get_haystack"](type_haystack="essay")
            nltk.download("punkt_tab", quiet=True)
            nltk.data.find("tokenizers/punkt_tab")
    except Exception as error:  # of the network, of the Hub, of what came from there
        raise InputError(f"--tasks {name}: what it is made of cannot be downloaded ({_reason(error)}).") from error
    return {key: value for key, value in config.items() if key not in ("tag", "group")}


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's progress bars, prints and advice go nowhere."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _replaced(space: dict[str, Any], **stand_ins: Any) -> Iterator[None]:
    """Other values for names of a module, and the old ones again."""
    before = {name: space[name] for name in stand_ins}
    space.update(stand_ins)
    try:
        yield
    finally:
        space.update(before)


@contextmanager
def _seeded(seed: int, space: dict[str, Any]) -> Iterator[None]:
    """Every random state that lm-eval's generators draw from as the seed says, and as it was again."""
    own = space.get("RNG")
    before = random.getstate(), np.random.get_state(), own and own.getstate()
    random.seed(PYTHON_SEED + seed)
    np.random.seed((NUMPY_SEED + seed) % 2**32)
    if own is not None:
        own.seed(CWE_SEED + seed)
        own.shuffle(list(space["WORDS"]))  # as its module has done when it was imported
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        if own is not None:
            own.setstate(before[2])
