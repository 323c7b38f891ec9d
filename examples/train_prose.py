"""Trains the embedded ``prose`` model, a small Llama that continues English, from a folder of text files.

    python examples/train_prose.py --texts books --held-out books/katrine.txt --out prose
    python examples/train_prose.py --evaluate prose --held-out books/katrine.txt

The model is kept where the held-out loss is best; with so little text, later ones have learned the books by heart.
Ctrl-C is safe: the best model so far stays in the folder, and the same command with ``--resume`` goes on.
"""

from __future__ import annotations

import copy
import math
import signal
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

VOCAB_SIZE = 2048
END = "<|endoftext|>"
BATCH_TOKENS = 8192
SHORT_WINDOW, LONG_WINDOW, LONG_FROM = 256, 1024, 0.6
LEARNING_RATE, LAST_LEARNING_RATE, WARMUP_STEPS = 2.5e-3, 0.03, 50
EVALUATE_EVERY, EVALUATE_WINDOWS = 100, 32
STATE = "training-state.pt"

console = Console()


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 2048 tokens in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )


def make_model() -> LlamaForCausalLM:
    """The untrained model: 4.95 million float32 parameters from torch's global generator."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """All texts as one stream of token ids ``[tokens]``, int64, with the end token between texts."""
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer(text, add_special_tokens=False, verbose=False).input_ids, tokenizer.eos_token_id]
    return torch.tensor(stream[:-1])


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, stream: torch.Tensor, window: int = LONG_WINDOW, windows: int | None = None) -> float:
    """Mean loss in nats a predicted token over windows that do not overlap.

    Args:
        model: in any dtype, on any device.
        stream: token ids ``[tokens]``, int64; what does not fill a window at its end is left out.
        window: tokens a window; the first of each is not predicted.
        windows: at most so many, spread evenly; None takes all.

    Raises:
        ValueError: the stream is shorter than a window.
    """
    parts = stream[: len(stream) // window * window].view(-1, window)
    if not len(parts):
        raise ValueError(f"the held-out text has {len(stream)} tokens, fewer than a window of {window}")
    if windows is not None and windows < len(parts):
        parts = parts[torch.linspace(0, len(parts) - 1, windows).long()]
    training = model.training
    model.eval()
    total = 0.0
    for rows in parts.split(max(1, BATCH_TOKENS // window)):
        rows = rows.to(model.device)
        total += model(input_ids=rows, labels=rows, use_cache=False).loss.float().item() * len(rows)
    model.train(training)
    return total / len(parts)


def learning_rate(done: float, step: int) -> float:
    """The rate after a share ``done`` of the budget: a short warm-up by steps, then a cosine down to 3 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return LEARNING_RATE * warm * (LAST_LEARNING_RATE + (1 - LAST_LEARNING_RATE) * cosine)


def make_optimizer(model: PreTrainedModel) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' vectors alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95))


class Run:
    """One training run: what it has done, and how it is put away and taken up again.

    ``done`` is the share of the budget that is used; the budget is whichever of tokens and minutes ends first.
    """

    def __init__(self, model: LlamaForCausalLM, out: Path, tokens: int, minutes: float | None, seed: int) -> None:
        self.model, self.out, self.seed = model, out, seed
        self.token_budget, self.second_budget = tokens, math.inf if minutes is None else 60 * minutes
        self.optimizer = make_optimizer(model)
        self.step, self.tokens, self.seconds, self.best = 0, 0, 0.0, math.inf

    @property
    def done(self) -> float:
        return max(self.tokens / self.token_budget, self.seconds / self.second_budget)

    def save(self) -> None:
        """Writes the state so that an interruption leaves the old file or the new one, never half of one."""
        progress = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "best": self.best}
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "progress": progress}
        torch.save(state, self.out / f"{STATE}.new")
        (self.out / f"{STATE}.new").replace(self.out / STATE)

    def load(self) -> None:
        state = torch.load(self.out / STATE, weights_only=True, map_location=self.model.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.__dict__.update(state["progress"])

    def batch(self, stream: torch.Tensor) -> torch.Tensor:
        """Windows ``[batch, window]`` at random places of the stream; the same for the same seed and step."""
        window = SHORT_WINDOW if self.done < LONG_FROM else LONG_WINDOW
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        starts = torch.randint(len(stream) - window + 1, (BATCH_TOKENS // window,), generator=generator)
        return stream[starts[:, None] + torch.arange(window)].to(self.model.device)

    def check(self, held_out: torch.Tensor) -> float:
        """The held-out loss on some windows; the model is kept if it is the best so far."""
        loss = held_out_loss(self.model, held_out, windows=EVALUATE_WINDOWS)
        if loss < self.best:
            self.best = loss
            half: Any = copy.deepcopy(self.model)
            half.to(torch.bfloat16).save_pretrained(self.out)
        self.save()
        return loss


def train(run: Run, stream: torch.Tensor, held_out: torch.Tensor, compiled: bool) -> None:
    """Trains until the budget is used, showing progress; Ctrl-C ends the step and puts the state away."""
    model = run.model.train()
    forward = torch.compile(model) if compiled else model
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    # An exception could come in the middle of an update or of writing a file; a flag is looked at between steps.
    interrupted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupted.append(number))
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("training", total=1.0)
            progress.update(bar, completed=run.done)
            while run.done < 1 and not interrupted:
                started = time.perf_counter()
                for group in run.optimizer.param_groups:
                    group["lr"] = learning_rate(run.done, run.step)
                rows = run.batch(stream)
                with torch.autocast(model.device.type, torch.bfloat16):
                    loss = forward(input_ids=rows, labels=rows, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                run.optimizer.step()
                run.optimizer.zero_grad(set_to_none=True)
                run.step, run.tokens = run.step + 1, run.tokens + rows.numel()
                run.seconds += time.perf_counter() - started
                progress.update(bar, completed=run.done, description=f"{run.tokens:,} tokens, loss {loss.item():.3f}")
                if run.step % EVALUATE_EVERY == 0 or run.done >= 1:
                    progress.console.print(f"step {run.step}: held-out loss {run.check(held_out):.3f}")
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        run.save()
        console.print(f"stopped after step {run.step}; the same command with --resume goes on")
        raise typer.Exit(130)


def evaluate(folder: str, held_out: Path) -> None:
    """Prints a model's loss on the whole of a text, in windows of 1024 of its own tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = held_out.read_text(encoding="utf-8")
    stream = encode(tokenizer, [text])
    loss = held_out_loss(model, stream)
    console.print(
        f"{loss:.3f} nats a token ({len(text) / len(stream):.2f} characters), float32, on {held_out.name}: "
        f"{len(stream) // LONG_WINDOW} windows of {LONG_WINDOW} tokens",
        soft_wrap=True,
    )


def main(
    held_out: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Text that is only measured on.")],
    texts: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Folder of .txt files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write the model and its tokenizer to.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to train on; the schedule is spread over them.")] = 20_000_000,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Time to train for, if that ends sooner.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the order of the windows.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile, which needs a C++ compiler.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run in --out.")] = False,
    evaluate_model: Annotated[
        str | None, typer.Option("--evaluate", help="Train nothing; print this model's loss on --held-out.")
    ] = None,
) -> None:
    """Trains the prose model, or measures one with --evaluate."""
    logging.disable_progress_bar()
    if evaluate_model is not None:
        evaluate(evaluate_model, held_out)
        return
    if texts is None or out is None:
        raise typer.BadParameter("training needs --texts and --out")
    files = [file for file in sorted(texts.glob("*.txt")) if not file.samefile(held_out)]
    if not files:
        raise typer.BadParameter(f"{texts} holds no .txt file besides the held-out one")
    if resume and not (out / STATE).is_file():
        raise typer.BadParameter(f"{out} holds no interrupted run: there is no {STATE}")
    books = [file.read_text(encoding="utf-8") for file in files]
    tokenizer = AutoTokenizer.from_pretrained(out) if resume else train_tokenizer(books)
    tokenizer.save_pretrained(out)
    stream, measured = encode(tokenizer, books), encode(tokenizer, [held_out.read_text(encoding="utf-8")])
    console.print(f"{len(files)} texts, {len(stream):,} tokens; held out: {held_out.name}, {len(measured):,} tokens")
    torch.manual_seed(seed)
    model: Any = make_model()
    run = Run(model.to(device), out, tokens, minutes, seed)
    if resume:
        run.load()
    train(run, stream, measured, compiled)
    (out / STATE).unlink()
    console.print(f"the best model, held-out loss {run.best:.3f}, is in {out}")


if __name__ == "__main__":
    typer.run(main)
