"""Bad inputs of the verbs that train: distill and tune. The same kind of rows as in bad_inputs.py."""

from __future__ import annotations

from tests.cli.bad_inputs import UP, Bad, put, write

DISTILL = [
    Bad("distill: wrong path", "distill nowhere out --layer 0", "'nowhere'|nowhere"),
    Bad("distill: no such layer", "distill model out --layer 2", "layer 2 of a model with 2 layers", "from 0"),
    Bad("distill: onto a folder", "distill model done --layer 0", "output .*done exists"),
    Bad(
        "distill: no number",
        "distill model out --layer 0 --set rates=[fast]",
        "distill: rates.0",
        "rates: Peak learning",
    ),
    Bad(
        "distill: unknown router",
        "distill model out --layer 0 --set routers=[tree]",
        "distill: routers.0",
        "routers: .*product",
    ),
    Bad(
        "distill: option of studies",
        "distill model out --layer 0 --set probe.rate=1",
        "not take probe.rate",
        "config={'probe': {'rate': 1}}",
    ),
    Bad(
        "distill: flag",
        "distill model out --layer 0 --set data.tokens=9",
        "--set does not take data.tokens",
        "--tokens",
    ),
    Bad("distill: unknown setting", "distill model out --layer 0 --set heads=3", "no option 'heads'", "epochs"),
    Bad(
        "distill: no grid",
        "distill model out --layer 0 --set routers=[product] --set experts=[997]",
        "no grid of pairs",
        "factors",
    ),
    Bad("distill: too little text", "distill model out --layer 0 --tokens 2000", "fewer than ten windows", "--tokens"),
    Bad("distill: text missing", "distill model out --layer 0 --data no.txt", "no.txt' does not exist", "wikitext"),
    Bad("distill: no process", "distill model out --layer 0 --processes 0", "0 processes", "give 1 to"),
    Bad(
        "distill: no atom",
        "distill model out --layer 0 --config s.yaml",
        "probe.top_k.0",
        "top_k: Active atoms",
        write("s.yaml", "probe: {top_k: [0]}"),
    ),
    Bad(
        "distill: staging folder of somebody else",
        "distill model out --layer 0 --restart",
        "in the way",
        arrange=write("out.partial/mine", "x"),
    ),
]

TUNE = [
    Bad("tune: wrong path", "tune nowhere out", "nowhere is not an output of moesaic"),
    Bad("tune: no output", "tune model out --baseline model", "not an output of moesaic"),
    Bad("tune: no dense model", "tune done out", "dense model is missing", "--baseline"),
    Bad("tune: another baseline", "tune done out --baseline model", "not the model that", "--baseline", put(UP, 0.5)),
    Bad("tune: onto a folder", "tune done model --baseline model", "output .*model exists"),
    Bad("tune: unknown preset", "tune done out --preset magic", "unknown preset 'magic'", "distill"),
    Bad("tune: unknown setting", "tune done out --set epochs=3", "no option 'epochs'", "lora"),
    Bad("tune: no number", "tune done out --set lora.rank=many", "lora.rank", "Default: 8"),
    Bad("tune: option of studies", "tune done out --set gate_spread=1", "not take gate_spread", "tune.tune"),
    Bad("tune: no section", "tune done out --set lora=1 --set lora.rank=2", "lora holds no mapping"),
    Bad("tune: nothing trained", "tune done out --set lora=null --set router_rate=0", "nothing is trained", "lora"),
    Bad("tune: text missing", "tune done out --baseline model --data no.txt", "no.txt' does not exist", "wikitext"),
    Bad(
        "tune: text too short",
        "tune done out --baseline model --data t.txt",
        "token",
        arrange=write("t.txt", "Hello there."),
    ),
]

TABLE = [*DISTILL, *TUNE]
