"""The shortest start: load a model, generate with a certified cache, read what was proven.

    python examples/quickstart.py --model Qwen/Qwen2.5-0.5B-Instruct --prompt-file book.txt --rtol 0.05

All options may be left out. The first run compiles the CPU kernels, which takes half a minute, and keeps them on disk.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_certkv import CertifiedQuantizedCache, CertKVConfig
from hf_certkv.embedded import resolve_model

PROMPT = "It was a dark evening, and the old man sat by the fire, and told them of the sea. " * 30


def main(arguments: list[str] | None = None) -> None:
    """Continue one prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="prose", help="a Hub name, a folder, or the embedded 'prose' (the default)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", default=PROMPT, help="the text to continue; a short one is not quantised at all")
    source.add_argument("--prompt-file", type=Path, help="a UTF-8 file with the text to continue")
    parser.add_argument("--rtol", type=float, default=0.02, help="how far an attention output may be off, over its norm")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(arguments)
    try:
        settings = CertKVConfig(rtol=args.rtol)
        text = args.prompt_file.read_text(encoding="utf-8") if args.prompt_file else args.prompt
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(args.model))
        inputs = tokenizer(text, return_tensors="pt")
        if not inputs.input_ids.numel():
            raise ValueError("the prompt is empty")
        model: Any = AutoModelForCausalLM.from_pretrained(resolve_model(args.model), dtype="auto", device_map="auto")
        cache = CertifiedQuantizedCache(model.config, settings=settings)
        ids = model.generate(**inputs.to(model.device), past_key_values=cache, max_new_tokens=args.max_new_tokens)
    except (OSError, ValueError) as error:  # no such file or model, or a setting that cannot be: the message says which
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    print(tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    print(cache.report())


if __name__ == "__main__":
    main()
