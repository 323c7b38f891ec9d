"""Single flipped bits in what the cache stores: every one is noticed by whoever looks, and repaired from the originals.

Who looks, and when: a promotion at the blocks that it raises; an audited step at all blocks; `cache.scrub()` at all blocks, all
pages of originals and all hot slots; whoever reads a page, at that page. Bits of a block's own checksum count as stored data.

What nobody looks at, with the figures that show what happens then:

- The Triton kernels compare the pages that they read with checksums, but no blocks: with them, promotions do not look.
- Between two looks a fast step uses codes, steps and numbers as they are. Its bound then speaks of other numbers than those
  stored, and may be broken (`unseen_by_a_fast_step`). The next scrub, promotion or audit repairs the block, but not what was
  returned. Scrub as often as the memory deserves.
- Exact tokens on the device (sink blocks, the recent window, the unfinished block) have no second copy and no checksum
  (`exact_tokens`). A bit flipped there is as in any other cache: the model's input has changed, and certificates speak of what
  is there. When such a block is finished, its page is written with what is there.
- A hot slot is read as an original between scrubs, keys and values unchecked; scrub compares it with its page and empties the
  slots. A slot whose number names no block counts as empty (`hot_slots`).
- The unused room of a buffer: nobody reads it, no flip there changes anything, and none is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch

from ..errors import CorruptedPageError
from ..scrub import every_block, repair
from . import kernel
from .cases import judge
from .faults_bits import (
    FORMATS,
    FORMATS_OF_TRITON,
    Format,
    PagePlace,
    Place,
    Subject,
    SumPlace,
    bits_stored,
    buffer_of,
    bytes_of,
    every_page_bit,
    flip,
    random_page,
    random_place,
)
from .faults_state import differences, quiet, state_of
from .faults_unseen import exact_tokens, hot_slots, unused_room
from .parts import Clock, Part

AT_LEAST = 2  # of every route and format, however short the budget
ENOUGH = 60.0  # seconds from which on all formats have a turn where a step takes seconds
# A tolerance that promotes every block of every head; one that promotes some; one that every head meets at once.
ALL, SOME, NONE = 1e-3, 0.05, 50.0


def run(clock: Clock, device: torch.device, seed: int) -> Part:
    """Flip bits by every route, a share of the time each; figures say how many went by which."""
    part = Part("bit flips", "every single flipped bit in stored data is noticed when it is looked at, and repaired", "flips")
    rng = np.random.default_rng([seed, 47])
    routes: Counter[str] = Counter()
    formats: tuple[Format, ...] = FORMATS
    if kernel.chosen() == "triton":
        formats = FORMATS_OF_TRITON[: 1 if kernel.slow() and clock.seconds < ENOUGH else None]
    with quiet():
        for number, form in enumerate(formats):
            # The first one has a third of the time: every bit of it, if that is enough.
            until = Clock((clock.seconds - clock.spent) * (0.33 if number == 0 else 1 / (len(formats) - number)))
            _every_bit(part, routes, Clock(until.seconds * 0.5), form, device, seed)
            _pages(part, routes, Clock(until.seconds * 0.2), form, device, seed, rng)
            _public(part, routes, until, form, device, seed, rng)
            clock.tell(f"{part.checked} bits, {form.name}")
        part.figures["hot_slots"] = hot_slots(part, routes, device, seed, rng)
        part.figures["exact_tokens"] = exact_tokens(part, device, seed, rng)
        part.figures["unused_room"] = unused_room(part, device, seed, rng)
    part.figures["unseen_by_a_fast_step"] = {name: routes.pop(name) for name in sorted(routes) if name.startswith("fast step")}
    part.figures["by_route"] = dict(sorted(routes.items()))
    part.seconds = clock.spent
    return part


def _every_bit(part: Part, routes: Counter[str], clock: Clock, form: Format, device: torch.device, seed: int) -> None:
    """A bit in each of 64 blocks at a time: all must be found and, in every eighth round, repaired."""
    subject = Subject(form, device, seed, blocks=16, batch=2)
    layer, index = subject.layer, every_block(subject.layer)
    before, count = state_of(subject.cache, pages=False), len(index[0])
    sizes = bits_stored(layer)
    tried: Counter[tuple[str, str]] = Counter()
    for turn in range(max(sizes.values())):
        if turn >= AT_LEAST and clock.over():
            break
        for (kind, name), bits in sizes.items():
            buffer = buffer_of(layer, kind, name)
            if turn >= bits or buffer is None:
                continue
            raw = bytes_of(buffer)
            # Every block another bit, every turn another one: in `bits` turns each bit of each block comes round.
            bit = (torch.arange(count, device=raw.device) * 37 + turn * 7919) % bits
            places = tuple(at.to(raw.device) for at in index)
            flip(raw, places, bit)
            if turn % 8:
                found = int(layer.store.damaged(index).sum())
                flip(raw, places, bit)
            else:
                found = repair(layer, index)
            routes["repair of single blocks" if turn % 8 == 0 else "comparison of single blocks"] += count
            part.checked += count
            tried[kind, name] += 1
            if found != count:
                part.fail(f"{form.name}: {count - found} of {count} flips in the {kind}' {name}, turn {turn}, were not seen")
        if turn % 64 == 0 and (wrong := differences(state_of(subject.cache, pages=False), before)):
            part.fail(f"{form.name}: after repairs, turn {turn}: {wrong[:4]}")
            return
    if wrong := differences(state_of(subject.cache, pages=False), before):
        part.fail(f"{form.name}: after all repairs: {wrong[:4]}")
    if tried == sizes:
        part.figures.setdefault("every_bit_of", []).append(f"{form.name}: {count} blocks of {sum(sizes.values())} bits")


def _pages(
    part: Part, routes: Counter[str], clock: Clock, form: Format, device: torch.device, seed: int, rng: np.random.Generator
) -> None:
    """Bits of originals and of their checksums, read at once. Of the first format, every bit of two blocks."""
    layer = Subject(form, device, seed, blocks=10).layer
    whole = [place for block in (9, 0) for place in every_page_bit(layer, block)] if form is FORMATS[0] else []
    done = 0
    while done < AT_LEAST or not clock.over():
        place = whole[done] if done < len(whole) else random_page(layer, rng)
        place.flip(layer)
        try:
            place.read(layer)
            part.fail(f"{form.name}: {place}: was read")
        except CorruptedPageError:
            pass
        place.flip(layer)
        place.read(layer)
        done += 1
    part.checked += done
    routes["read of a page"] += done


def _public(
    part: Part, routes: Counter[str], clock: Clock, form: Format, device: torch.device, seed: int, rng: np.random.Generator
) -> None:
    """Everything through public methods: scrub, audited steps, promotions, reads of pages by steps and crops, fast steps."""
    subjects = {
        name: Subject(form, device, seed, blocks=3, changes=changes)
        for name, changes in {
            "audit": {"audit": True, "rtol": SOME},
            "all": {"rtol": ALL, "max_rounds": 8},
            "some": {"rtol": SOME},
            "none": {"rtol": NONE},
        }.items()
    }
    undisturbed = cache(lambda name: subjects[name].copy().step())

    def step(name: str) -> None:
        _step(part, routes, subjects[name], undisturbed(name), name, random_place(subjects[name].layer, rng))

    acts: list[Callable[[], None]] = [partial(_scrub, part, routes, subjects["some"], rng)]
    acts += [partial(step, name) for name in ("audit", "all", "some", "none")]
    acts += [lambda n=name: _step_over_page(part, routes, subjects[n], undisturbed(n), rng) for name in ("all", "some")]  # type: ignore[misc]
    acts.append(partial(_crop_over_page, part, routes, subjects["some"], rng))
    if kernel.slow():  # a turn takes half a minute: others first with another seed
        acts = [acts[i] for i in rng.permutation(len(acts))]
    done = 0
    while done < AT_LEAST * len(acts) or not clock.over():
        if clock.over() and (kernel.slow() and done >= AT_LEAST):
            break
        acts[done % len(acts)]()
        done += 1


def _scrub(part: Part, routes: Counter[str], subject: Subject, rng: np.random.Generator) -> None:
    """`cache.scrub()` finds and repairs a flip in a block, and raises over one in a page."""
    cache, layer = subject.cache, subject.layer
    before, place, page = state_of(cache), random_place(layer, rng), random_page(layer, rng)
    place.flip(layer)
    found = cache.scrub().repaired
    wrong = differences(state_of(cache), before)
    if found != 1 or wrong or cache.scrub().repaired:
        part.fail(f"{subject.form.name}: {place}: scrub repaired {found}; {wrong[:4]}")
    page.flip(layer)
    try:
        cache.scrub()
        part.fail(f"{subject.form.name}: {page}: scrub did not raise")
    except CorruptedPageError:
        pass
    page.flip(layer)
    part.checked += 2
    routes["cache.scrub(), blocks"] += 1
    routes["cache.scrub(), pages"] += 1


def _step(part: Part, routes: Counter[str], subject: Subject, expected: torch.Tensor, kind: str, place: Place) -> None:
    """A step over a flipped bit. Repaired on the way: the output is the same, bit for bit. Not seen: no promotion looked."""
    subject = subject.copy()
    before, layer = state_of(subject.cache), subject.layer
    already = subject.cache.recorder.repaired
    place.flip(layer)
    output = subject.step()
    found = subject.cache.recorder.repaired - already
    record = subject.cache.recorder.records[-1]
    words = f"{subject.form.name}, {kind}: {place}"
    if found:
        part.checked += 1
        routes["audited step" if kind == "audit" else "promotion in a step"] += 1
        subject.cache.crop(-1)
        if wrong := differences(state_of(subject.cache), before):
            part.fail(f"{words}: after the repair {wrong[:4]}")
        if found != 1 or not torch.equal(output, expected):
            part.fail(f"{words}: {found} repaired, another output")
        return
    # Promoted blocks are all looked at; the record counts them by KV head.
    promoted = record.key_blocks + record.value_blocks
    everything = bool((record.key_blocks == layer.store.blocks).all() or (record.value_blocks == layer.store.blocks).all())
    dense = bool((record.rung >= 4).all())
    if kind == "audit" or (everything and not dense and record.kernel != "triton"):
        part.fail(f"{words}: not seen by an audited step, or one that promotes every block")
    name = "dense" if dense else "not promoted" if promoted.any() else "nothing promoted"
    if record.kernel == "triton" and promoted.any() and not dense:
        name = "some promoted"  # by kernels that look at pages, not at blocks
    breaches = judge(subject.case, output, record, subject.cache.settings).breaches
    routes[f"fast step, {name}: {'beyond its bound' if breaches else 'within its bound'}"] += 1
    if dense and not torch.equal(output, expected) and breaches:
        part.fail(f"{words}: a dense output is wrong: {breaches[:1]}")
    subject.cache.crop(-1)
    if subject.cache.scrub().repaired != 1 or differences(state_of(subject.cache), before):
        part.fail(f"{words}: the scrub behind the step did not repair it")


def _step_over_page(
    part: Part, routes: Counter[str], subject: Subject, expected: torch.Tensor, rng: np.random.Generator
) -> None:
    """A step that reads a damaged page raises and leaves the cache as it was; one that does not is not touched by it.

    A step of the Triton kernels is over when it is told: then what needed the page is NaN, the rest as undisturbed, and a crop
    leads back. What these compare pages with are checksums of their own.
    """
    subject = subject.copy()
    signed = subject.layer.shadow is not None and subject.layer.shadow.signs
    page = random_page(subject.layer, rng)
    place: PagePlace | SumPlace = page
    if signed and page.of_sum:
        place = SumPlace(page.kind, page.row, page.head, page.block, page.bit)
    place.flip(subject.layer)
    before, output = state_of(subject.cache), None
    part.checked += 1
    words = f"{subject.form.name}: {place}"
    try:
        output = subject.called()
        subject.looked_at()
        routes["page that a step did not read"] += 1
    except CorruptedPageError:
        routes["page read by a step" if output is None else "page read by a step, told when the record was looked at"] += 1
        if output is not None:
            groups = output.shape[1] // subject.heads
            mine = slice(place.head * groups, (place.head + 1) * groups)
            if not bool(output[place.row, mine].isnan().all()):
                part.fail(f"{words}: told, and not NaN")
            output[place.row, mine] = expected[place.row, mine]
            if not torch.equal(output, expected):
                part.fail(f"{words}: other heads than those that needed the page have another output")
            subject.cache.crop(-1)
        if wrong := differences(state_of(subject.cache), before):
            part.fail(f"{words}: after the error {wrong[:4]}")
        place.flip(subject.layer)
        output = subject.step()
    if not torch.equal(output, expected):
        part.fail(f"{words}: another output")


def _crop_over_page(part: Part, routes: Counter[str], subject: Subject, rng: np.random.Generator) -> None:
    """A crop that brings a damaged page back raises, and nothing has changed."""
    subject = subject.copy()
    layer = subject.layer
    place = random_page(layer, rng, first=1)
    place.flip(layer)
    before = state_of(subject.cache)
    part.checked += 1
    routes["page read by a crop"] += 1
    try:
        subject.cache.crop(-(layer.sequence_length - 3 * subject.form.block))
        part.fail(f"{subject.form.name}: {place}: the crop brought it back")
    except CorruptedPageError:
        if wrong := differences(state_of(subject.cache), before):
            part.fail(f"{subject.form.name}: {place}: after the error {wrong[:4]}")
