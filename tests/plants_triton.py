"""Planted bugs in the Triton kernels and their host side: an edit of the source of one function each."""

from __future__ import annotations

from typing import Any

import torch
from plants_base import Detect, Plant
from plants_triton_checks import (
    FEW,
    HERE,
    between,
    capped,
    damaged,
    edited,
    grouped,
    halved,
    hot,
    masked,
    never_certified,
    newest,
    oracle,
    ordinary,
    raised,
    record_of,
    stored_errors,
    tight,
    twin,
    unlike,
    unlike_steps,
)

from hf_certkv import device_decode
from hf_certkv.ladder import Rung
from hf_certkv.verify.planted import (
    clusters,
    dense_cast,
    light_block,
    negative_softcap,
    output_tie,
    rounded_scores,
    sink_near_the_top,
    value_aligned,
    value_triangle,
)

if HERE:
    from hf_certkv.kernels import triton_blocks, triton_certify, triton_climb, triton_dense, triton_pass, triton_step

BRAIN = torch.bfloat16
# Checks that several bugs share, so that they are made once where nothing is planted.
BY_TWIN, OF_A_MASK, OF_GROUPS, OF_UNLIKE = twin(ordinary), twin(masked), twin(grouped), twin(unlike)
OF_CHUNKS = twin(ordinary, tokens=66, tiles=FEW)
RAISED, RAISED_AT_ONCE, ERRORS = raised(), raised(refine="off"), stored_errors()
SERVED_DENSELY = oracle(tight, value_triangle, rtol=1e-12)
DAMAGED = damaged(Rung.DENSE_HEAD, rtol=1e-12)
RECORD = record_of()


def plant(name: str, text: str, module: Any, function: str, old: str, new: str, detect: Detect) -> Plant:
    """One of these. Args: old, new: what the function's source has, and what it has with the bug."""
    return Plant(f"Triton kernels: {name}", "triton", text, edited(module, function, old, new), detect)


def of_the_bound() -> list[Plant]:
    """Terms of the bound."""
    at, climb = triton_certify, triton_climb
    return [
        plant("value errors halved", "half of E_val", at, "merge",
              "value_total += sum_of(part)", "value_total += 0.5 * sum_of(part)", oracle(value_triangle)),
        plant("Sigma of values halved", "half of pi Sigma", at, "merge",
              "(root_step + STEP_FLOOR) * spectral", "(root_step + STEP_FLOOR) * spectral * 0.5", oracle(value_aligned)),
        plant("key errors halved", "half of E_key", at, "bound",
              "part = least(mass_up", "part = 0.5 * least(mass_up", oracle(light_block, 0.5, 3e-3)),
        plant("Lambda halved", "half of pi Lambda", at, "bound",
              "spread = ", "spread = 0.5 * ", BY_TWIN),
        plant("cap halved", "2 V tanh(Delta / 2) without the 2", climb, "total_of",
              "cap = 2 * ", "cap = ", oracle(clusters, 2.0)),
        plant("no E_out", "the output's rounding left out", at, "merge",
              "fixed = (relative * norm + WIDTH**0.5 * absolute) * OUTWARD + rounding",
              "fixed = rounding", oracle(output_tie, BRAIN)),
        plant("no E_fp", "rounding of scores and sums left out", at, "merge",
              "absolute) * OUTWARD + rounding", "absolute) * OUTWARD", oracle(rounded_scores, 101.1)),
        plant("no slip", "what integers round left out", at, "merge",
              "rounding += slip * inflate * OUTWARD", "rounding += 0.0", BY_TWIN),
        plant("no slip in the moment", "what integers round of the inner product left out", at, "bound",
              "inner -= 1.01 * tl.sqrt(size)", "inner -= 0.0 * tl.sqrt(size)", BY_TWIN),
        plant("steps without their part", "float32 steps of values taken for exact", at, "merge",
              "(off + per_step * steps)", "off", BY_TWIN),
        plant("no mu", "masses as computed taken for the largest", at, "merge",
              "inflate = least(grown * (1", "inflate = least(0.0 * grown + 1.0 + 0.0 * (1", BY_TWIN),
        plant("coded scores taken for exact", "`errors` not read", at, "merge",
              "coded = most(coded, max_of(", "coded = most(coded, 0.0 * max_of(", BY_TWIN),
        plant("bias of no size", "the mask's rounding left out", at, "slack_of",
              "(size + bias_size)", "size", OF_A_MASK),
        plant("sign of the softcap", "c in place of |c|", at, "slack_of",
              "tl.abs(softcap) * TANH_ERROR", "softcap * TANH_ERROR", oracle(negative_softcap, 1e5)),
        plant("another level's numbers", "numbers of the plane for blocks without it", at, "merge",
              "level == 1", "level == 0", BY_TWIN),
        plant("eta of another block", "the next block's residuals", at, "merge",
              "numbers = value_numbers + (unit.to(tl.int64) * value_room + block)",
              "numbers = value_numbers + (unit.to(tl.int64) * value_room + (block + 1) % blocks)", BY_TWIN),
        plant("key numbers of another block", "the first block's for all", at, "bound",
              "keys = key_numbers + (unit.to(tl.int64) * key_room + block)",
              "keys = key_numbers + (unit.to(tl.int64) * key_room + 0 * block)", BY_TWIN),
        plant("sign of the inner product", "the moment with + 2 <P, o>", at, "radii_of",
              "moment = (norms - 2 * inner", "moment = (norms + 2 * inner", oracle(light_block, 0.5, 3e-3)),
        plant("cubes and fourth powers", "sums of w^4 for those of w^3", at, "bound",
              "sum_at + 6", "sum_at + 7", BY_TWIN),
        plant("squares by squared weights", "sums by w^2 for those by w", at, "bound",
              "norms = tl.load(sum_at + 2", "norms = tl.load(sum_at + 3", BY_TWIN),
        plant("no remainder", "w^2 taken for a multiple of w", at, "radii_of",
              "+ size * square + rest)", "+ size * square)", BY_TWIN),
        plant("masses that are not lowered", "D_min without exp(-Delta)", at, "bound",
              "mass / (1 + growth)", "mass", BY_TWIN),
        plant("raised blocks outside of D_min", "masses of exact keys not counted", at, "bound",
              "tl.where(active | ~there, 0.0, mass)", "0.0 * mass", raised(refine="off", max_rounds=1)),
        plant("norm before rounding", "the norm of the float32 output", at, "merge",
              "shown = rounded(made, result.dtype.element_ty)", "shown = made", twin(halved)),
        plant("largest value norm of exact tokens only", "V without the blocks", at, "merge",
              "most(key_norm, max_of(keys)), most(value_norm, max_of(values))",
              "most(key_norm, max_of(keys)), value_norm", OF_UNLIKE),
        plant("sink logit outside of the normaliser", "outputs divided by the tokens' weights alone", at, "merge",
              "normaliser, exact_mass = share, share", "normaliser, exact_mass = 0.0 * share, share", OF_UNLIKE),
        plant("met above the budget", "twice the tolerance", climb, "total_of",
              "(found <= budget)", "(found <= 2 * budget)", oracle(between)),
        plant("NaN is not above", "a bound that is not a number counts as met", climb, "total_of",
              "met = (found >= 0) & (found <= budget) & (found < INFINITY)",
              "met = (found == found) & ~(found > budget)", never_certified()),
    ]  # fmt: skip


def of_the_pass() -> list[Plant]:
    """What the pass reads and adds up."""
    at = triton_pass
    return [
        plant("lowest digits lost", "queries of sixteen bits", at, "key_scores",
              "low.to(tl.float32) * unit_step)", "0.0 * low.to(tl.float32))", BY_TWIN),
        plant("highest digits lost", "queries without their highest bits", at, "key_scores",
              "(digits - first) >> 8", "((digits - first) >> 8) & 255", BY_TWIN),
        plant("lower end of a key's cell", "keys without the middle of their cells", at, "key_scores",
              "(CENTRE + MIDDLE)", "CENTRE", BY_TWIN),
        plant("query weights halved", "half of sum |q| S", at, "key_scores",
              "tl.store(l1 + to, ", "tl.store(l1 + to, 0.5 * ", BY_TWIN),
        plant("errors of products left out", "what digits round is 0", at, "key_scores",
              "tl.store(errors + to, ", "tl.store(errors + to, 0.0 * ", ERRORS),
        plant("unit four times too small", "factors beyond their digits", at, "unit_of",
              "((253 + BITS - stored) << 23)", "((255 + BITS - stored) << 23)", BY_TWIN),
        plant("values without lower digits", "weights of eleven bits", at, "by_digits",
              "low = factors - high * (1 << DIGIT)", "low = 0.0 * factors", BY_TWIN),
        plant("values without upper digits", "the lower eleven bits of weights", at, "by_digits",
              "high = whole(factors * (1.0 / (1 << DIGIT)))", "high = 0.0 * factors", BY_TWIN),
        plant("lower end of a value's cell", "values without the middle of their cells", at, "value_step",
              "start += step * MIDDLE", "start += 0.0", BY_TWIN),
        plant("values of the neighbour's group", "steps and offsets of another group", at, "value_step",
              "* GROUPS + g", "* GROUPS + (g + 1) % GROUPS", OF_GROUPS),
        plant("sigma of the first group", "steps of the other groups not counted", at, "read_steps",
              "tl.static_range(GROUPS)", "tl.static_range(1)", OF_GROUPS),
        plant("nibbles swapped", "the last half of channels for the first", at, "add_values",
              "halves(stored & 15)", "halves(stored >> 4)", BY_TWIN),
        plant("slips too small", "roundings of a thousandth of a unit", at, "add_values",
              "(0.75 * LARGEST", "(0.00075 * LARGEST", ERRORS),
        plant("mask not added", "masked tokens weigh as others", at, "settle",
              "if BIAS:", "if False:", OF_A_MASK),
        plant("mask of the first row", "the first query head's biases for all", at, "settle",
              "row[:, None] * bias_row", "0 * row[:, None] * bias_row", OF_A_MASK),
        plant("mask of the first block", "the first block's biases for all", at, "coded_pass",
              "bias + block * TOKENS", "bias + 0 * block * TOKENS", OF_A_MASK),
        plant("softcap dropped", "scores that no tanh has seen", at, "settle",
              "if SOFTCAP:", "if False:", twin(capped)),
        plant("wrong power", "sums of w^2 for those of w^3", at, "settle",
              "tl.sum(square * w, axis=1)", "tl.sum(square, axis=1)", BY_TWIN),
        plant("last token dropped", "one exact token too few", at, "float_pass",
              "held = tl.minimum(exact - first, TOKENS)", "held = tl.minimum(exact - first - 1, TOKENS)", oracle(newest)),
        plant("another unit's blocks", "the first KV head's values for all", at, "coded_pass",
              "value_place = unit.to(tl.int64) * value_room",
              "value_place = 0 * unit.to(tl.int64) * value_room", twin(ordinary, heads=2)),
        plant("hot slot names another block", "originals of one block in the place of another", at, "float_pass",
              "block = tl.load(hot_blocks + at).to(tl.int32)", "block = 1 - tl.load(hot_blocks + at).to(tl.int32)", hot()),
        plant("levels of the step before", "levels are not set back", at, "coded_pass",
              "tl.store(levels + (kind * units + unit).to(tl.int64) * blocks + block, 0)", "pass", unlike_steps()),
    ]  # fmt: skip


def of_chunks() -> list[Plant]:
    """Where chunks and tiles begin and end."""
    at = triton_certify
    return [
        plant("mix from the wrong segment", "chunks of segments that overlap", at, "mix",
              "chunk * CHUNK", "chunk * (CHUNK - 1)", OF_CHUNKS),
        plant("mix without the last segment", "the last segment left out", at, "mix",
              "segment < segments", "segment < segments - 1", OF_CHUNKS),
        plant("merge without the last chunk", "the last chunk left out", at, "merge",
              "there = start + few < chunks", "there = start + few < chunks - 1", OF_CHUNKS),
        plant("normaliser of the first tile", "weights of later segments left out", at, "merge",
              "for start in range(0, segments, TILE)", "for start in range(0, TILE, TILE)", OF_CHUNKS),
        plant("bound from the wrong block", "chunks of blocks that overlap", at, "bound",
              "chunk * CHUNK", "chunk * (CHUNK - 1)", OF_CHUNKS),
        plant("bound of the first chunks", "key errors of later chunks left out", triton_climb, "total_of",
              "range(0, chunks, FEW)", "range(0, FEW, FEW)", OF_CHUNKS),
    ]  # fmt: skip


def of_promotions() -> list[Plant]:
    """Promoted blocks and their pages."""
    at = triton_blocks
    return [
        plant("promoted keys at their base level", "originals of keys not read", at, "load_keys",
              "if level == 2:", "if level == 3:", RAISED_AT_ONCE),
        plant("promoted values at their base level", "originals of values not read", at, "load_values",
              "if level == 2:", "if level == 3:", RAISED_AT_ONCE),
        plant("planes not read", "keys stay in the middle of their cells", at, "load_keys",
              "if level == 1:", "if level == 3:", RAISED),
        plant("nibbles of a plane swapped", "the last half of channels for the first", at, "load_values",
              "channel < HALF, byte & 15, byte >> 4).to(tl.float32) * (1 / 16)",
              "channel < HALF, byte >> 4, byte & 15).to(tl.float32) * (1 / 16)", RAISED),
        plant("page of another unit", "the first KV head's pages for all", at, "load_values",
              "* units + unit)", "* units)", oracle(tight, ordinary, 33, 16, 1, 2, refine="off", dense_head_share=1.0)),
        plant("page not compared", "damage in a promoted page goes unseen", at, "read_page",
              "!= tl.load(sums)",
              "!= tl.sum(tl.sum(words * factors, axis=1), axis=0)", damaged(Rung.VALUES, refine="off", dense_head_share=1.0)),
        plant("sums of promoted blocks not used", "the output of before", triton_climb, "climb",
              "for chunk in range(chunks):\n                mix(",
              "for chunk in range(0):\n                mix(", RAISED_AT_ONCE),
        plant("trouble of the step before", "an earlier step's damage told again", triton_step, "DeviceStep.run",
              "self.trouble.zero_()", "self.trouble", DAMAGED),
    ]  # fmt: skip


def of_the_dense_rung() -> list[Plant]:
    """Heads that are left to the dense rung."""
    at = triton_dense
    return [
        plant("page not compared by the dense rung", "damage in a page goes unseen there", at, "compare",
              "wrong = (found != tl.load(known))", "wrong = (found != found)", DAMAGED),
        plant("the dense rung left out", "flagged heads keep what they had", triton_step, "DeviceStep.run",
              "if self.step.config.certified:", "if False:", SERVED_DENSELY),
        plant("dense flag ignored", "no unit is computed densely", at, "split",
              "if tl.load(dense + unit) == 0:", "if tl.load(dense + unit) >= 0:", SERVED_DENSELY),
        plant("dense rung without the tail", "exact tokens left out", at, "split",
              "blocks + (exact + BLOCK - 1) // BLOCK)", "blocks)", oracle(tight, newest, rtol=1e-12)),
        plant("dense rung without the sink logit", "a dense output divided by the tokens' weights alone", at, "merge",
              "total = exp64(logit - base)", "total = 0.0 * logit", oracle(tight, sink_near_the_top, 2.0, rtol=1e-12)),
        plant("dense bound without E_out", "the dense output's rounding left out", at, "bound_of",
              "rounding + (relative * output_norm + columns * absolute) * OUTWARD",
              "rounding", oracle(tight, dense_cast, BRAIN, 17, rtol=0.0, atol=1e-30)),
        plant("dense bound without E_fp", "rounding of dense scores and sums left out", at, "bound_of",
              "rounding = (moved", "rounding = 0.0 * (moved", oracle(tight, rounded_scores, 101.1, rtol=0.0, atol=1e-30)),
    ]  # fmt: skip


def of_records() -> list[Plant]:
    """What a record says."""
    told = device_decode
    return [
        plant("dense heads counted as fast", "the record does not say dense", told, "DeviceRecord._record",
              "rung[dense] = int(Rung.DENSE_HEAD)", "rung[dense] = int(Rung.FAST)", SERVED_DENSELY),
        plant("norm of before the dense rung", "the record has the coded output's norm", told, "DeviceRecord._record",
              'np.where(dense, norm, figures["NORM"])', 'figures["NORM"]', SERVED_DENSELY),
        plant("counts missing", "promoted blocks are not counted", triton_climb, "climb",
              "tl.store(to + 1, value_raised)", "tl.store(to + 1, 0)", RECORD),
        plant("bytes missing", "planes that were read are not counted", told, "DeviceRecord._record",
              "moved += counts[..., 4].sum() * self.planes[0]", "moved += 0 * self.planes[0]", RECORD),
        plant("facts of the next step", "a record that is kept in scratch", told, "DeviceRecord.__init__",
              "self.told.copy_(told, non_blocking=pinned)", "self.told = told", RECORD),
    ]  # fmt: skip


KINDS = (of_the_bound, of_the_pass, of_chunks, of_promotions, of_the_dense_rung, of_records)
TRITON = [plant for kind in KINDS for plant in kind()] if HERE else []
