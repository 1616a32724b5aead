"""Several sweeps of `moesaic distill` as one page: what a mixture gains on real inputs and on their Gaussian twins.

Run as ``python -m benchmarks.distill_table SWEEP... [--probes SWEEP...] --report docs/results/distill``, each SWEEP the
output folder of ``moesaic distill``; of those after --probes only the dictionaries are shown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import write_rows

Sweep = dict[str, Any]


def gather(folders: Iterable[Path]) -> list[Sweep]:
    """What the page shows of each sweep; models and texts by their names, no paths."""
    found = []
    for folder in folders:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        kept = {key: results[key] for key in ("layer", "site", "d_model", "d_ff", "config", "data", "baselines")}
        for source in kept["config"]["data"]["sources"]:
            source["name"] = Path(source["name"]).name
        model = Path(results["model"]).name
        found.append({"model": model, **kept, "students": results["students"], "probe": results["probe"]})
    return found


def page(sweeps: Sequence[Sweep], probes: Sequence[Sweep] = ()) -> str:
    """The page: how each sweep was trained, a row per layer, router and size, the dense curves and baselines; what the
    dictionaries of ``sweeps`` and ``probes`` explain."""
    lines = ["# Is there a sparse mixture in these FFNs?", "", *_conditions(sweeps), "", *_gains(sweeps)]
    lines += ["", "Fraction of variance unexplained (FVU) of the dense students, and without training:", ""]
    return "\n".join([*lines, *_dense(sweeps), "", *_dictionaries([*sweeps, *probes])])


def _conditions(sweeps: Sequence[Sweep]) -> list[str]:
    lines = [
        "Students with h_s shared neurons and k of m one-neuron experts, A = h_s + k active, against dense students of "
        "the same sweep. **Gain**: width of the dense student of equal FVU over A. **Equal MACs**: FVU over that of "
        "the dense student that spends the router's multiply-accumulates on neurons; below 1 the mixture is better. "
        "Everything is trained alike; the rate is chosen per student on a validation split, FVU is of a test split. "
        "Low-rank and full routers start from the same initialisation. One seed. Made by "
        "`benchmarks/distill_table.py` from `moesaic distill`.",
        "",
    ]
    for sweep in sweeps:
        config, tokens = sweep["config"], sweep["data"]["tokens"]
        steps = config["epochs"] * (tokens["train"] // config["batch"])
        text = ", ".join(f"{source['name']}={source['weight']:g}" for source in config["data"]["sources"])
        rates = ", ".join(f"{rate:g}" for rate in config["rates"])
        lines.append(
            f"* {_name(sweep)}: {tokens['train']:,} tokens of {text} (test {tokens['test']:,}), {config['epochs']} "
            f"epochs, {steps:,} steps of {config['batch']}, rates {rates}.{_left_out(sweep)}"
        )
    return lines


def _left_out(sweep: Sweep) -> str:
    data = sweep["data"]
    if not data["left_out"]:
        return ""
    return (
        f" Left out: {data['left_out']:,} tokens of more than {sweep['config']['max_norm']:g} median lengths, which "
        f"hold {data['left_out_energy']:.0%} of the energy."
    )


def _gains(sweeps: Sequence[Sweep]) -> list[str]:
    lines = [
        "| FFN | router | A | FVU real | gain real | FVU Gaussian | gain Gaussian | equal MACs real | router MACs / "
        "neuron MACs | parameters |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for sweep in sweeps:
        mixtures = [row for row in sweep["students"] if row["spec"]["experts"]]
        for real in (row for row in mixtures if row["law"] == "real"):
            twin = next((row for row in mixtures if row["law"] != "real" and row["spec"] == real["spec"]), None)
            equal = real["equal_macs"]
            cells = [_name(sweep), _router(real), str(real["active"]), f"{real['fvu']:.3f}", _times(real["gain"])]
            cells += ["", ""] if twin is None else [f"{twin['fvu']:.3f}", _times(twin["gain"])]
            cells.append("outside" if equal is None else f"{equal['ratio']:.2f}")
            cells += [f"{real['router_macs'] / real['neuron_macs']:.1f}", f"{real['parameters'] / 1e6:.2f} M"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _dense(sweeps: Sequence[Sweep]) -> list[str]:
    widths = sorted({width for sweep in sweeps for width in sweep["config"]["dense_widths"]})
    lines = [f"| FFN | inputs | {' | '.join(map(str, widths))} | affine map | top-64 neurons of the teacher |"]
    lines.append("|---" * (len(widths) + 4) + "|")
    for sweep in sweeps:
        for law in sweep["config"]["laws"]:
            dense = {
                row["active"]: row["fvu"]
                for row in sweep["students"]
                if not row["spec"]["experts"] and row["law"] == law
            }
            base = sweep["baselines"][law]
            cells = [f"{dense[width]:.3f}" if width in dense else "" for width in widths]
            oracle = base["top_k_oracle"].get("64")
            cells += [f"{base['affine']['fvu']:.3f}", "" if oracle is None else f"{oracle:.3f}"]
            lines.append(f"| {_name(sweep)} | {law} | {' | '.join(cells)} |")
    return lines


def _dictionaries(sweeps: Sequence[Sweep]) -> list[str]:
    """What k atoms of a learned dictionary leave of the FFN's inputs, beside k principal directions."""
    found = sorted((s for s in sweeps if s["probe"]), key=lambda sweep: (sweep["model"], sweep["layer"]))
    if not found:
        return []
    ks = sorted({row["top_k"] for sweep in found for row in sweep["probe"]})
    text = (
        "FVU of the FFN's inputs by k atoms of a learned dictionary (a top-k autoencoder of 4 d atoms unless named, "
        "trained as long as the students), and in brackets by the k largest principal directions of the test inputs:"
    )
    lines = [text, "", f"| FFN | inputs | {' | '.join(f'k = {k}' for k in ks)} |", "|---" * (len(ks) + 2) + "|"]
    for sweep in found:
        for law in sweep["config"]["laws"]:
            fvu = {row["top_k"]: row["fvu"] for row in sweep["probe"] if row["law"] == law}
            floor = sweep["baselines"][law]["input_pca_floor"]
            cells = [f"{fvu[k]:.3f} ({floor[str(k)]:.3f})" if k in fvu else "" for k in ks]
            lines.append(f"| {_name(sweep)}{_atoms(sweep)} | {law} | {' | '.join(cells)} |")
    return [*lines, ""]


def _atoms(sweep: Sweep) -> str:
    atoms = sweep["config"]["probe"]["atoms"]
    return "" if atoms == 4 else f", {atoms} d atoms"


def _name(sweep: Sweep) -> str:
    return f"{sweep['model']} layer {sweep['layer']}"


def _router(row: dict[str, Any]) -> str:
    spec = row["spec"]
    rank = f", rank {spec['rank']}" if spec["rank"] else ""
    return f"{spec['router']}{rank}, m = {spec['experts']}"


def _times(gain: float | None) -> str:
    return "outside" if gain is None else f"{gain:.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", type=Path)
    parser.add_argument("--probes", nargs="*", default=[], type=Path, help="sweeps whose dictionaries are shown alone")
    parser.add_argument("--report", type=Path, required=True, help="path without suffix: .md and .json are written")
    arguments = parser.parse_args()
    sweeps, probes = gather(arguments.sweeps), gather(arguments.probes)
    text = page(sweeps, probes)
    arguments.report.with_suffix(".md").write_text(text, encoding="utf-8")
    kept = [*sweeps, *({**probe, "students": []} for probe in probes)]
    write_rows(arguments.report.with_suffix(".json"), kept)
    print(text)


if __name__ == "__main__":
    main()
