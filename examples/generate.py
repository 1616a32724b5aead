"""A converted model with transformers, as any other model: load it, let it write.

python examples/generate.py OUT PROMPT [--tokens N]
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import moesaic


def main(arguments: list[str] | None = None) -> str:
    """Write on from a prompt, greedily; prints and returns the text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args(arguments)

    moesaic.register()  # makes the `moesaic` architecture known to transformers; stock architectures do not need it
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    prompt = tokenizer(args.prompt, return_tensors="pt")
    made = model.generate(**prompt, max_new_tokens=args.tokens, do_sample=False)
    text = tokenizer.decode(made[0], skip_special_tokens=True)
    print(text)
    return text


if __name__ == "__main__":
    main()
