"""Does the size of a neuron's weights tell what it writes? Per layer, on the proxy texts.

    python -m benchmarks.neuron_scores MODEL

MODEL is a local folder. Prints a Markdown table: Spearman correlation of the data-free score with the mean output
energy, and the energy that the 12.5 % of neurons with the lowest score write.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesaic.anatomy import read_anatomy
from moesaic.checkpoint.ffn import load_ffn
from moesaic.checkpoint.reader import Checkpoint
from moesaic.evaluate.proxy import proxy_texts
from moesaic.solvers.energy import mean_output_energy, neuron_norms, neuron_scores


@torch.inference_mode()
def main() -> None:
    """One forward pass over the joined proxy texts, then a row per layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    folder = parser.parse_args().model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    checkpoint = Checkpoint(folder)
    anatomy = read_anatomy(checkpoint.config)
    inputs: dict[str, Tensor] = {}
    for site in anatomy.sites:

        def keep(module: nn.Module, arguments: tuple[Tensor, ...], path: str = site.path) -> None:
            inputs[path] = arguments[0][0]

        model.get_submodule(site.path).register_forward_pre_hook(keep)
    model(tokenizer("\n\n".join(proxy_texts()), return_tensors="pt")["input_ids"])
    print("| layer | Spearman | energy in the lowest 12.5 % |\n|---|---|---|")
    for site in anatomy.sites:
        weights = load_ffn(checkpoint, site, anatomy.activation).to(torch.float32)
        score_F = neuron_scores(*neuron_norms(weights.gate_FD, weights.up_FD, weights.down_DF))
        energy_F = mean_output_energy([weights.hidden(inputs[site.path])], weights.down_DF)
        lowest = score_F.argsort()[: weights.d_ff // 8]
        share = float(energy_F[lowest].sum() / energy_F.sum())
        print(f"| {site.layer} | {spearmanr(score_F, energy_F).statistic:+.2f} | {100 * share:.1f} % |")


if __name__ == "__main__":
    main()
