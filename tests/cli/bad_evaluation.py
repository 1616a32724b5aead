"""Bad inputs of ``eval``. The same kind of rows as in bad_inputs.py."""

from __future__ import annotations

from tests.cli.bad_inputs import UP, WEIGHTS, Bad, put, remove, write

TABLE = [
    Bad("eval: wrong path", "eval nowhere", "no model at 'nowhere'|there is no folder"),
    Bad("eval: no weights", "eval model", "has no weights", arrange=remove(f"model/{WEIGHTS}")),
    Bad("eval: text missing", "eval done --text no.txt", "no.txt cannot be read", "UTF-8"),
    Bad("eval: text too short", "eval done --text t.txt", "token", arrange=write("t.txt", "Hello there.")),
    Bad("eval: controls alone", "eval done --controls --window 64", "controls need", "--baseline"),
    Bad("eval: speed alone", "eval done --speed --window 64", "beside the dense model", "--baseline"),
    Bad(
        "eval: another baseline",
        "eval done --baseline model --window 64",
        "not the model that",
        "--baseline",
        put(UP, 0.5),
    ),
    Bad("eval: window too long", "eval done --window 4096", "the model reads 512", "--window 512"),
    Bad("eval: window of one", "eval done --window 1", "window", code=2),
]
