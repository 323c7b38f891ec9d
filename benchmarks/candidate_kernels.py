"""Other ways to attend to the coded tokens of one layer, to compare the shipped CPU kernel with: sketches, not for use.

All read K8 V4 codes of finished blocks, as `hf_certkv.codecs` writes them, and return attention. None makes what a certificate
needs (the sums by block), handles masks, sinks or exact tokens, and all are given their scales in float32, already converted.
Queries are float32 `[heads, rows, channels]`, scaled; results likewise.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from hf_certkv.codecs import MIDDLE, KeyCodec, ValueCodec
from hf_certkv.kernels import threads

compiled_loops: Any = numba.njit(fastmath=True, nogil=True)
BLOCK, GROUP, ROWS, TILE = 64, 32, 4, 4  # tokens a block, channels a value scale, query rows a KV head, blocks a tile


class Coded(NamedTuple):
    """Tokens in codes: `[heads, blocks, ...]`; offsets hold the middle of a cell, so that a number is offset + scale * code."""

    key_codes: Tensor
    key_scale: Tensor
    key_offset: Tensor
    value_codes: Tensor
    value_scale: Tensor
    value_offset: Tensor

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Keys and values in float64: `[heads, tokens, channels]`."""
        keys = self.key_codes.double() * self.key_scale.double().unsqueeze(2) + self.key_offset.double().unsqueeze(2)
        nibbles = torch.cat([self.value_codes & 15, self.value_codes >> 4], dim=-1).double().unflatten(-1, (-1, GROUP))
        values = nibbles * self.value_scale.double().unsqueeze(-1) + self.value_offset.double().unsqueeze(-1)
        return keys.flatten(1, 2), values.flatten(-2).flatten(1, 2)


def encode(keys: Tensor, values: Tensor) -> Coded:
    """Codes of `[heads, tokens, channels]`, whole blocks of them."""
    parts: list[list[Tensor]] = [[] for _ in range(6)]
    for key, value in zip(keys, values, strict=True):  # head by head: the codecs work in float64
        coded = KeyCodec(refine=False).encode(key.unflatten(0, (-1, BLOCK)))
        other = ValueCodec(4, GROUP, refine=False).encode(value.unflatten(0, (-1, BLOCK)))
        for to, part in zip(
            parts, (coded.codes, coded.scale, coded.offset, other.codes, other.scale, other.offset), strict=True
        ):
            to.append(part)
    key_codes, key_scale, key_offset, value_codes, value_scale, value_offset = (torch.stack(part) for part in parts)
    scales = [key_scale.float(), value_scale.float()]
    offsets = [key_offset.float() + MIDDLE * scales[0], value_offset.float() + MIDDLE * scales[1]]
    return Coded(key_codes, scales[0], offsets[0], value_codes, scales[1], offsets[1])


@compiled_loops
def _loops(
    query: Any, key_codes: Any, key_scale: Any, key_offset: Any, value_codes: Any, value_scale: Any, value_offset: Any,
    out: Any, start: int, stop: int,
) -> None:  # fmt: skip
    """Online softmax over blocks in plain loops, four rows; the key scales are folded into the query once a block."""
    channels, half = query.shape[2], query.shape[2] // 2
    folded, base = np.empty((ROWS, channels), np.float32), np.empty(ROWS, np.float32)
    scores, held = np.empty((ROWS, BLOCK), np.float32), np.empty((ROWS, channels), np.float32)
    for head in range(start, stop):
        held[:] = 0
        top, mass = np.full(ROWS, -np.inf, np.float32), np.zeros(ROWS, np.float32)
        for block in range(key_codes.shape[1]):
            for r in range(ROWS):
                total = np.float32(0)
                for c in range(channels):
                    folded[r, c] = query[head, r, c] * key_scale[head, block, c]
                    total += query[head, r, c] * key_offset[head, block, c]
                base[r] = total
            for t in range(BLOCK):
                s0, s1, s2, s3 = base[0], base[1], base[2], base[3]
                for c in range(channels):
                    x = np.float32(key_codes[head, block, t, c])
                    s0 += folded[0, c] * x
                    s1 += folded[1, c] * x
                    s2 += folded[2, c] * x
                    s3 += folded[3, c] * x
                scores[0, t], scores[1, t], scores[2, t], scores[3, t] = s0, s1, s2, s3
            for r in range(ROWS):
                most = top[r]
                for t in range(BLOCK):
                    most = max(most, scores[r, t])
                factor = np.exp(top[r] - most) if block > 0 else np.float32(0)
                total = np.float32(0)
                for t in range(BLOCK):
                    scores[r, t] = np.exp(scores[r, t] - most)
                    total += scores[r, t]
                top[r], mass[r] = most, mass[r] * factor + total
                for c in range(channels):
                    held[r, c] *= factor
            for t in range(BLOCK):
                for g in range(half // GROUP):
                    low_scale, low_offset = value_scale[head, block, t, g], value_offset[head, block, t, g]
                    high = g + half // GROUP
                    high_scale, high_offset = value_scale[head, block, t, high], value_offset[head, block, t, high]
                    for r in range(ROWS):
                        w = scores[r, t]
                        low_step, low_start, high_step, high_start = (
                            w * low_scale,
                            w * low_offset,
                            w * high_scale,
                            w * high_offset,
                        )
                        for c in range(g * GROUP, (g + 1) * GROUP):
                            code = value_codes[head, block, t, c]
                            held[r, c] += low_start + low_step * np.float32(code & 15)
                            held[r, half + c] += high_start + high_step * np.float32(code >> 4)
        for r in range(ROWS):
            for c in range(channels):
                out[head, r, c] = held[r, c] / mass[r]


def loops(query: Tensor, coded: Coded) -> Tensor:
    """numba's own vectorisation of loops."""
    out = torch.empty_like(query)
    arrays: list[Any] = [part.numpy() for part in (query, *coded, out)]
    threads.run(lambda start, stop: _loops(*arrays, start, stop), len(query))
    return out


@compiled_loops
def _expand(
    key_codes: Any, key_scale: Any, key_offset: Any, value_codes: Any, value_scale: Any, value_offset: Any,
    keys: Any, values: Any, first: int, start: int, stop: int,
) -> None:  # fmt: skip
    """TILE blocks as float32, from block `first` on."""
    channels, half = keys.shape[2], keys.shape[2] // 2
    for head in range(start, stop):
        for i in range(min(TILE, key_codes.shape[1] - first)):
            block = first + i
            for t in range(BLOCK):
                for c in range(channels):
                    code = np.float32(key_codes[head, block, t, c])
                    keys[head, i * BLOCK + t, c] = key_offset[head, block, c] + key_scale[head, block, c] * code
                for g in range(half // GROUP):
                    high = g + half // GROUP
                    for c in range(g * GROUP, (g + 1) * GROUP):
                        code = value_codes[head, block, t, c]
                        values[head, i * BLOCK + t, c] = value_offset[head, block, t, g] + value_scale[
                            head, block, t, g
                        ] * np.float32(code & 15)
                        values[head, i * BLOCK + t, half + c] = value_offset[head, block, t, high] + value_scale[
                            head, block, t, high
                        ] * np.float32(code >> 4)


def tiles(query: Tensor, coded: Coded, compiled: bool) -> Tensor:
    """256 tokens of all heads into a float32 scratch (by numba, or by torch's own operations), then BLAS, tile by tile."""
    heads, blocks, _, channels = coded.key_codes.shape
    keys, values = torch.empty(heads, TILE * BLOCK, channels), torch.empty(heads, TILE * BLOCK, channels)
    held, mass = torch.zeros_like(query), query.new_zeros(heads, ROWS, 1)
    top = query.new_full((heads, ROWS, 1), -torch.inf)
    arrays: list[Any] = [part.numpy() for part in (*coded, keys, values)]
    for first in range(0, blocks, TILE):
        if compiled:
            threads.run(partial(_expand, *arrays, first), heads)
        else:
            _expand_by_torch(coded, first, keys, values)
        scores = torch.bmm(query, keys.mT)
        most = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
        factor, weights = torch.exp(top - most), scores.sub_(most).exp_()
        mass = mass * factor + weights.sum(dim=-1, keepdim=True)
        held, top = held.mul_(factor).baddbmm_(weights, values), most
    return held / mass


def _expand_by_torch(coded: Coded, first: int, keys: Tensor, values: Tensor) -> None:
    part = Coded(*(one[:, first : first + TILE] for one in coded))
    blocked = keys.unflatten(1, (-1, BLOCK))
    blocked.copy_(part.key_codes).mul_(part.key_scale.unsqueeze(2)).add_(part.key_offset.unsqueeze(2))
    half = values.shape[-1] // 2
    blocked = values.unflatten(1, (-1, BLOCK))
    blocked[..., :half].copy_(part.value_codes & 15)
    blocked[..., half:].copy_(part.value_codes >> 4)
    blocked.unflatten(-1, (-1, GROUP)).mul_(part.value_scale.unsqueeze(-1)).add_(part.value_offset.unsqueeze(-1))


C_SOURCE = r"""
#include <math.h>
#include <stdint.h>
enum { ROWS = 4, BLOCK = 64, CHANNELS = 128, HALF = 64, GROUP = 32, GROUPS = 4 };
void attend(const float *restrict query, const uint8_t *restrict key_codes, const float *restrict key_scale,
            const float *restrict key_offset, const uint8_t *restrict value_codes, const float *restrict value_scale,
            const float *restrict value_offset, float *restrict out, long blocks, long start, long stop) {
  for (long head = start; head < stop; head++) {
    float held[ROWS][CHANNELS] = {{0}}, top[ROWS], mass[ROWS] = {0}, folded[ROWS][CHANNELS], scores[ROWS][BLOCK], base[ROWS];
    const float *q = query + head * ROWS * CHANNELS;
    for (int r = 0; r < ROWS; r++) top[r] = -1e30f;
    for (long block = 0; block < blocks; block++) {
      long at = head * blocks + block;
      for (int r = 0; r < ROWS; r++) {
        float total = 0;
        for (int c = 0; c < CHANNELS; c++) {
          folded[r][c] = q[r * CHANNELS + c] * key_scale[at * CHANNELS + c];
          total += q[r * CHANNELS + c] * key_offset[at * CHANNELS + c];
        }
        base[r] = total;
      }
      for (int t = 0; t < BLOCK; t++) {
        const uint8_t *key = key_codes + (at * BLOCK + t) * CHANNELS;
        float s0 = base[0], s1 = base[1], s2 = base[2], s3 = base[3];
        for (int c = 0; c < CHANNELS; c++) {
          float x = key[c];
          s0 += folded[0][c] * x; s1 += folded[1][c] * x; s2 += folded[2][c] * x; s3 += folded[3][c] * x;
        }
        scores[0][t] = s0; scores[1][t] = s1; scores[2][t] = s2; scores[3][t] = s3;
      }
      for (int r = 0; r < ROWS; r++) {
        float most = top[r], total = 0;
        for (int t = 0; t < BLOCK; t++) most = scores[r][t] > most ? scores[r][t] : most;
        float factor = expf(top[r] - most);
        for (int t = 0; t < BLOCK; t++) { scores[r][t] = expf(scores[r][t] - most); total += scores[r][t]; }
        top[r] = most; mass[r] = mass[r] * factor + total;
        for (int c = 0; c < CHANNELS; c++) held[r][c] *= factor;
      }
      for (int t = 0; t < BLOCK; t++) {
        const uint8_t *value = value_codes + (at * BLOCK + t) * HALF;
        const float *scale = value_scale + (at * BLOCK + t) * GROUPS, *offset = value_offset + (at * BLOCK + t) * GROUPS;
        for (int g = 0; g < GROUPS / 2; g++) {
          int other = g + GROUPS / 2;
          float low[GROUP], high[GROUP];
          for (int c = 0; c < GROUP; c++) {
            uint8_t code = value[g * GROUP + c];
            low[c] = offset[g] + scale[g] * (float)(code & 15);
            high[c] = offset[other] + scale[other] * (float)(code >> 4);
          }
          for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < GROUP; c++) {
              held[r][g * GROUP + c] += scores[r][t] * low[c];
              held[r][HALF + g * GROUP + c] += scores[r][t] * high[c];
            }
        }
      }
    }
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < CHANNELS; c++) out[(head * ROWS + r) * CHANNELS + c] = held[r][c] / mass[r];
  }
}
"""


@lru_cache(maxsize=1)
def compiler() -> str | None:
    """gcc, where there is one."""
    return shutil.which("gcc")


def build(folder: Path) -> Any:
    """The C loops, compiled for this processor: a yardstick only, since users have no compiler."""
    source, library = folder / "attend.c", folder / "attend.so"
    source.write_text(C_SOURCE, encoding="utf-8")
    flags = ["-O3", "-march=native", "-ffast-math", "-mprefer-vector-width=512", "-shared", "-fPIC"]
    subprocess.run([str(compiler()), *flags, str(source), "-o", str(library), "-lm"], check=True)
    function = ctypes.CDLL(str(library)).attend
    function.argtypes, function.restype = [ctypes.c_void_p] * 8 + [ctypes.c_long] * 3, None
    return function


def in_c(query: Tensor, coded: Coded, function: Any) -> Tensor:
    """gcc's vectorisation of loops."""
    out = torch.empty_like(query)
    addresses = [part.data_ptr() for part in (query, *coded, out)]
    blocks = coded.key_codes.shape[1]
    threads.run(lambda start, stop: function(*addresses, blocks, start, stop), len(query))
    return out
