"""Greedy text from a model whose heads are split over several processes, and one certificate report of all of them.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py --model NAME_OR_PATH

Each rank's cache holds the keys and values of its own heads. Decisions about a whole layer are made by all ranks together, and
an error on one rank ends the step on all (hf_certkv/parallel.py). Nothing has to be said about it: transformers writes into the
config of a model that it has split that it did so. Without `--model` the embedded model `prose` is used where its heads can be
split by the number of processes, else a small random one, whose text is nonsense.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hf_certkv import CertifiedQuantizedCache, gather_report
from hf_certkv.embedded import resolve_model

PROMPT = (
    "It was a bright cold morning in the little town by the sea, and the old man who kept the lighthouse had come down to the "
    "market, as he did every week, to buy bread and to hear the news. "
)


def random_model(folder: Path, processes: int) -> Path:
    """A small random Llama with as many KV heads as there are processes, for the tokenizer of `prose`; the same on each."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64 * processes,
        intermediate_size=128 * processes,
        num_hidden_layers=2,
        num_attention_heads=2 * processes,
        num_key_value_heads=processes,
        head_dim=32,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main(
    model: Annotated[str, typer.Option(help="A Hub name, a folder, or an embedded model.")] = "",
    prompt: Annotated[str, typer.Option(help="What to continue.")] = PROMPT * 8,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 64,
    rtol: Annotated[float, typer.Option(min=0.0, help="Relative tolerance.")] = 0.05,
    json: Annotated[Path | None, typer.Option(help="Where to write the merged report.")] = None,
) -> None:
    """Generate with one model on all processes of torchrun."""
    logging.disable_progress_bar()
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    with tempfile.TemporaryDirectory() as folder:
        where = resolve_model(model or "prose")
        words: Any = AutoTokenizer.from_pretrained(where)
        if not model and AutoConfig.from_pretrained(where).num_key_value_heads % processes:
            where = str(random_model(Path(folder), processes))
        split = {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=processes)} if processes > 1 else {}
        loaded: Any = AutoModelForCausalLM.from_pretrained(where, **split).eval()
    inputs = words(prompt, return_tensors="pt", return_token_type_ids=False).to(loaded.device)
    cache = CertifiedQuantizedCache(loaded, rtol=rtol)
    ids = loaded.generate(**inputs, past_key_values=cache, max_new_tokens=tokens, do_sample=False)
    report = gather_report(cache)  # every process calls this
    if rank == 0:
        print(words.decode(ids[0, inputs["input_ids"].shape[1] :]))
        print(report)
        if json is not None:
            report.to_json(json)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
