"""Where long texts come from: a file, or a data set of the Hub by name; and windows of so many tokens cut from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InputError, MissingDependencyError
from .task import text_hash

PG19 = ("emozilla/pg19-test", "test", "text")  # the test books of PG-19 as Parquet: the original is a script, which is not run
EACH = 4  # windows taken of one text of a data set


@dataclass(frozen=True)
class Source:
    """One text (`text` and where it came from), or a data set (`name`, `split`, `column`), read as far as needed."""

    text: str | None = None
    file: str | None = None
    name: str | None = None
    split: str = "test"
    column: str = "text"

    @classmethod
    def of(cls, text: Path | None, dataset: str | None, split: str | None = None, column: str | None = None) -> Source:
        """What `--text` or `--dataset` names; `pg19` is the test books of PG-19.

        Raises: InputError: neither or both are given, or the file cannot be read.
        """
        if (text is None) == (dataset is None):
            raise InputError("expected one of --text FILE (plain text, UTF-8) and --dataset NAME (of the Hub, or pg19).")
        if text is not None:
            try:
                found = text.expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"--text {text}: {getattr(error, 'strerror', None) or error}.") from error
            if not found.strip():
                raise InputError(f"--text {text}: the text is empty.")
            return cls(text=found, file=text.name)
        assert dataset is not None
        if dataset == "pg19":
            return cls(None, None, PG19[0], split or PG19[1], column or PG19[2])
        return cls(None, None, dataset, split or "test", column or "text")

    def describe(self) -> dict[str, Any]:
        """For a run's settings: the text by name and SHA-256, or the data set."""
        if self.text is not None:
            return {"text": self.file, "text_sha256": text_hash(self.text)}
        return {"dataset": self.name, "split": self.split, "column": self.column}

    def windows(self, tokenizer: PreTrainedTokenizerBase, tokens: int, count: int) -> Tensor:
        """Windows that do not overlap, int64 `[count, tokens]`: of one text evenly spread, of a data set at most four of each.

        Each begins with what the tokenizer puts before every text.

        Raises: InputError: the text does not have so many.
        """
        if count < 1:
            raise InputError(f"--items {count}: expected at least 1.")
        before = opening(tokenizer).expand(count, -1)
        return torch.cat([before, self._windows(tokenizer, tokens - before.shape[1], count)], dim=1)

    def _windows(self, tokenizer: PreTrainedTokenizerBase, tokens: int, count: int) -> Tensor:
        if self.text is not None:
            return self._spread(tokenizer, self.text, tokens, count)
        found: list[Tensor] = []
        for text in self._texts():
            ids = _ids(tokenizer, text)
            here = min(len(ids) // tokens, EACH, count - len(found))
            found += [ids[start : start + tokens] for start in _starts(len(ids), tokens, here)]
            if len(found) == count:
                return torch.stack(found)
        raise InputError(f"--dataset {self.name}: has {len(found)} windows of {tokens:,} tokens; expected {count} (--items).")

    def _spread(self, tokenizer: PreTrainedTokenizerBase, text: str, tokens: int, count: int) -> Tensor:
        ids = _ids(tokenizer, text)
        if len(ids) < tokens * count:
            raise InputError(
                f"--text {self.file}: has {len(ids):,} tokens, and {count} windows of {tokens:,} need {tokens * count:,}; give "
                "a longer text, or fewer --items."
            )
        return torch.stack([ids[start : start + tokens] for start in _starts(len(ids), tokens, count)])

    def _texts(self) -> Iterator[str]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise MissingDependencyError("--dataset needs datasets: pip install 'hf_certkv[eval]'.") from error
        try:
            rows = load_dataset(self.name, split=self.split, streaming=True)
            for row in rows:
                if not isinstance(row.get(self.column), str):
                    raise InputError(f"--dataset {self.name}: no text column {self.column!r}; there are {', '.join(row)}.")
                yield row[self.column]
        except (OSError, ValueError, RuntimeError) as error:  # unknown, unreachable, or of a kind that is not read
            if isinstance(error, InputError):
                raise
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"--dataset {self.name}, split {self.split}: cannot be read ({reason}).") from error


def opening(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What the tokenizer puts before every text (a BOS token, or nothing): int64 `[0 or 1]`."""
    ids = tokenizer("").input_ids
    return torch.tensor(ids if ids == [tokenizer.bos_token_id] else [], dtype=torch.long)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """int64 `[tokens]`, without special tokens: windows begin in the middle of a text."""
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)


def _starts(length: int, tokens: int, count: int) -> list[int]:
    """Where `count` windows begin, evenly spread, none over another."""
    if count < 2:
        return [0] * count
    return [index * (length - tokens) // (count - 1) for index in range(count)]
