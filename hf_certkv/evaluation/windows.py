"""What tasks over windows of a text share: the windows, their names, and what a run knows them by."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .task import Makers, Outcome, Task, ids_hash
from .texts import Source


class WindowTask(Task):
    """A task whose pieces of work are windows of a text, each measured by itself.

    Args: contexts: tokens of a window; items: windows of each context; more: tokens that a cache holds beyond a window.

    Raises: InputError: too short a text, or more tokens than the model was made for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: Source,
        contexts: tuple[int, ...],
        items: int,
        more: int = 0,
    ) -> None:
        super().__init__(model, tokenizer, max(contexts) + more)
        self.source, self.contexts, self.items = source, contexts, items
        self.windows = {context: source.windows(tokenizer, context, items) for context in contexts}

    def settings(self) -> dict[str, Any]:
        """Which windows."""
        return {
            "contexts": list(self.contexts), "items": self.items, **self.source.describe(),
            "windows_sha256": ids_hash(*self.windows.values()),
        }  # fmt: skip

    def pieces(self) -> list[str]:
        """A window each."""
        return [f"{context}/{index}" for context in self.windows for index in range(self.items)]

    def measure(self, piece: str, makers: Makers) -> Outcome:
        """One window with every cache."""
        context, index = (int(part) for part in piece.split("/"))
        return self.measure_window(piece, self.windows[context][index : index + 1], makers)

    @abstractmethod
    def measure_window(self, piece: str, ids: Tensor, makers: Makers) -> Outcome:
        """One window, int64 `[1, context]`, with every cache; `piece`: its name."""
