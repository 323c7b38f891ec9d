"""Steps that happen whole or not at all: a journal of what to put back, one thread at a time, Ctrl-C at a safe moment."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.cache_utils import DynamicLayer

from .certificate import Recorder
from .errors import CacheStateError
from .interrupts import uninterrupted
from .layers import CertifiedLayer
from .parallel import Alone
from .precision import guards_open, leave_all_but

# Attributes that a copy does not take over.
JOURNAL = ("_journal", "_step_length", "_step_thread", "_irreversible", "_broken", "_turn")


class StepJournal:
    """The part of a cache that undoes steps which fail. One `update` a layer makes a step."""

    layers: list[Any]
    recorder: Recorder
    ranks: Alone

    def _begin_journal(self) -> None:
        self._journal: dict[int, Callable[[], None]] = {}
        self._step_length: int | None = None
        self._step_thread: threading.Thread | None = None
        self._irreversible = False
        self._broken: str | None = None
        self._turn = _Turn()

    @property
    def certified_layers(self) -> list[CertifiedLayer]:
        """The layers that are quantised."""
        return [layer for layer in self.layers if isinstance(layer, CertifiedLayer)]

    def _enter(self, layer_idx: int) -> None:
        """A layer is about to be updated: note what it is now, so that whatever happens from here on can be undone."""
        layer = self.layers[layer_idx]
        if not self._journal:
            self._begin_step(layer_idx)
        self._journal[layer_idx] = _checkpoint(layer)
        if _counted(layer):
            self._check_lengths(layer_idx, _length_of(layer))

    def _begin_step(self, layer_idx: int) -> None:
        """Refuse what was the middle of a step until that step was undone, by another thread or after an error."""
        if any([_counted(layer) and _length_of(layer) for layer in self.layers[: max(layer_idx, 0)]]):
            raise CacheStateError(
                f"A step begins with the first layer, and this one with layer {layer_idx}: the step under way was undone, or "
                "another thread uses this cache. Call `rollback()` and begin the forward pass again."
            )
        self._step_thread = threading.current_thread()

    def _check_lengths(self, layer_idx: int, length: int) -> None:
        """Refuse to go on where an earlier forward pass ended between two layers, outside this cache's sight."""
        if self._step_length is None:
            self._step_length = length
        elif length != self._step_length:
            raise CacheStateError(
                f"Layer {layer_idx} holds {length} tokens, an earlier layer held {self._step_length} before this step: "
                "an earlier forward pass was interrupted between layers, or another model used the cache. Call `rollback()` to "
                "go on with the tokens that all layers hold, or `reset()`."
            )

    @contextmanager
    def step_guard(self) -> Iterator[None]:
        """Undo the step under way, in every layer, when what runs inside fails.

        Raises: CacheStateError: another thread is inside.
        """
        with self._one_thread():
            try:
                yield
            except GeneratorExit:  # Ctrl-C came behind what ran inside; by now, when this is forgotten, others may be under way
                raise
            except BaseException:
                with uninterrupted():
                    self._undo_step()
                raise

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        """Refuse a second thread while one is inside; nothing has changed then."""
        visit = _Visit()
        try:
            try:
                self._turn.take(visit)
                yield
            finally:
                self._turn.give_back(visit)
        finally:
            self._turn.give_back(visit)  # again: Ctrl-C may have kept the first from beginning

    def _undo_step(self) -> None:
        self.recorder.discard()
        journal, self._journal = self._journal, {}
        self._step_length = None
        for layer_idx, undo in journal.items():
            try:
                undo()
            except Exception as error:  # a device error while a copy is waited for
                self._broken = f"layer {layer_idx}: {error}"
        if self._irreversible:
            self._broken = "its linear-attention states had been overwritten"
        self._irreversible = False

    def _end_step(self) -> None:
        """The step under way is over: its records count, unless it never came to its end; it can no longer be undone.

        Raises: CacheStateError: it is another thread's, and that one has not come through all layers.
        """
        theirs = self._step_thread not in (None, threading.current_thread()) and self._step_thread.is_alive()
        if theirs and self._journal and any([length and i not in self._journal for i, length in self._held().items()]):
            raise CacheStateError(
                "Another thread is in the middle of a step on this cache. Give each thread its own cache, or take turns; if "
                "that thread has given up, call `rollback()`."
            )
        self._close_step()

    def _close_step(self) -> None:
        """Whatever step there was is over."""
        with uninterrupted():
            if len(self._lengths() - {0}) > 1:
                self.recorder.discard()
            self._journal.clear()
            self._step_length = None
            self._irreversible = False
            self.recorder.commit()
            self.recorder.step += 1

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Between steps: end the one before; put every layer's attributes back when what runs inside fails."""
        with self._one_thread():
            self._end_step()
            before = [_everything(layer) for layer in self.layers]
            try:
                with self.ranks.together():
                    yield
            except GeneratorExit:  # as in `step_guard`
                raise
            except BaseException:
                with uninterrupted():
                    for undo in before:
                        undo()
                raise

    def rollback(self) -> int:
        """Make all layers hold the same tokens again after a forward pass that ended between two of them (Ctrl-C, an error).

        What only some layers hold is removed, exactly. Where nothing is amiss, nothing happens. Under tensor parallelism all
        ranks must call this, and hold the same tokens afterwards.

        Returns: the tokens held now: go on from there.
        Raises: CacheStateError: a layer that this package does not own cannot go back; call `reset()`.
        """
        if len(self._lengths()) > 1 and self._journal:
            with self._one_thread(), uninterrupted():
                self._undo_step()
        broken, shortest, longest = self.ranks.extent(self._broken is not None, self._lengths())
        if not broken and longest > shortest:
            with self._all_or_nothing():
                if shortest == 0:  # as new, so that another batch may come
                    for layer in self.certified_layers:
                        layer.reset()
                carry_out = [layer.prepare_crop(shortest - _length_of(layer)) for layer in self.certified_layers]
                for i, length in self._held().items():
                    if not isinstance(self.layers[i], CertifiedLayer) and length > shortest:
                        _crop(self.layers[i], i, shortest - length)
                with uninterrupted():
                    for part in carry_out:
                        part()
        if broken or len(self._lengths()) > 1:
            why = self._broken or ("another rank's" if broken else f"they hold {sorted(self._lengths())} tokens")
            raise CacheStateError(f"The layers cannot be brought to one length: {why}. Call `reset()`.")
        return max(self._lengths(), default=0)

    def _lengths(self) -> set[int]:
        """The numbers of tokens that layers hold; one number between steps."""
        return {_length_of(layer) for layer in self.layers if _counted(layer)}

    def _held(self) -> dict[int, int]:
        """The numbers of tokens that layers hold, by index."""
        return {i: _length_of(layer) for i, layer in enumerate(self.layers) if _counted(layer)}


class _Visit:
    """One stay inside. Attributes: thread: whose; guards: of `full_precision`, how many that thread had open before."""

    __slots__ = ("guards", "thread")

    def __init__(self) -> None:
        self.thread, self.guards = threading.get_ident(), guards_open()


class _Turn:
    """Whose turn it is: one thread's at a time, which may come in more than once. Asking never waits.

    Whoever comes stands in line, and the thread of the first visit is the one that may go on: the others leave again. To join
    the line and to leave it are single operations on a list, which other threads and Ctrl-C find done or not done. So this
    needs no lock and keeps no signal back, and a visit that is in the line, however that came, can be taken out of it.
    """

    def __init__(self) -> None:
        self._line: list[_Visit] = []

    def take(self, visit: _Visit) -> None:
        """Come in; to be followed by `give_back` whatever happens. Raises: CacheStateError: another thread is inside."""
        self._line.append(visit)
        if self._line[0].thread != visit.thread:
            raise CacheStateError(
                "Another thread is using this cache at the same time. Give each thread its own cache, or take turns."
            )

    def give_back(self, visit: _Visit) -> None:
        """Go out, if inside; what the visit's thread has opened of `full_precision` meanwhile is left."""
        if visit not in self._line:
            return
        if visit.thread == threading.get_ident():  # not so where a guard that Ctrl-C left open is collected in another thread
            leave_all_but(visit.guards)
        self._line.remove(visit)


def _everything(layer: Any) -> Callable[[], None]:
    """What brings a layer back to how it is now, after anything that is done between steps."""
    attributes = dict(layer.__dict__)
    parts: list[Callable[[], None]] = []
    if isinstance(layer, CertifiedLayer) and layer.shadow is not None:
        store, blocks, exact = layer.store, layer.store.blocks, layer.exact
        lengths = [buffer.length for buffer in exact]

        def lengthen() -> None:
            layer.forget()
            store.truncate(blocks)
            for buffer, length in zip(exact, lengths, strict=True):
                buffer.length = length

        parts = [layer.shadow.checkpoint(), lengthen]

    def undo() -> None:
        layer.__dict__.clear()
        layer.__dict__.update(attributes)
        for part in parts:
            part()

    return undo


def _checkpoint(layer: Any) -> Callable[[], None]:
    """What brings a layer back to how it is now. transformers' own layers replace their tensors and keep no others."""
    if isinstance(layer, CertifiedLayer):
        return layer.checkpoint()
    before = dict(layer.__dict__)

    def undo() -> None:
        layer.__dict__.clear()
        layer.__dict__.update(before)

    return undo


def _crop(layer: Any, layer_idx: int, tokens_to_remove: int) -> None:
    """Crop one of transformers' own layers. Raises: CacheStateError: it cannot go back."""
    try:
        layer.crop(tokens_to_remove)
    except RuntimeError as error:
        why = f"Layer {layer_idx} cannot go back by {-tokens_to_remove} tokens: {error}"
        raise CacheStateError(f"{why} Call `reset()`.") from error


def _counted(layer: Any) -> bool:
    """Whether a layer holds every token that it was given, so that its length is that of the others."""
    return isinstance(layer, (CertifiedLayer, DynamicLayer))


def _length_of(layer: Any) -> int:
    """Tokens that a layer has been given."""
    return int(layer.get_seq_length())
