"""``moesaic generate OUT PROMPT`` and ``moesaic chat OUT``: hear a model, the dense one beside it on request."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli import options as opt
from moesaic.cli.console import WORKING, emit, emit_json, quiet_libraries, say
from moesaic.cli.pulse import PULSE

if TYPE_CHECKING:
    from moesaic.jobs.generate import Reply, Speaker

Beside = Annotated[
    str | None, typer.Option("--baseline", help="The dense model: it answers too, for comparison; also a .gguf or id.")
]
Tokens = Annotated[int, typer.Option("--tokens", help="Most tokens of an answer.", min=1)]
Temperature = Annotated[
    float, typer.Option("--temperature", help="0: always the likeliest token. Else tokens are drawn.", min=0)
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the drawing of tokens.")]
Plain = Annotated[bool, typer.Option("--plain", help="Continue the text as it is, without the chat template.")]


def attach(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(name="generate")(generate)
    app.command(name="chat")(chat)


def generate(
    model: opt.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What is asked, or a text to continue.")],
    baseline: Beside = None,
    tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    plain: Plain = False,
    as_json: opt.AsJson = False,
) -> None:
    """Let a model answer once. Works offline, with the chat template that the folder has."""
    speakers = _load(model, baseline, plain=plain)
    replies: dict[str, Reply] = {}
    for name, speaker in speakers.items():
        if not as_json and len(speakers) > 1:
            emit(f"{name}:")
        hear = None if as_json else _print
        said = [{"role": "user", "content": prompt}]
        PULSE.watch(WORKING)
        replies[name] = speaker.reply(said, tokens=tokens, temperature=temperature, seed=seed, hear=hear)
        if not as_json:
            emit("")
            _speed(name, replies[name])
    if as_json:
        emit_json({name: {"text": reply.text, "tokens": reply.tokens} for name, reply in replies.items()})


def chat(
    model: opt.Model,
    baseline: Beside = None,
    tokens: Tokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    plain: Plain = False,
) -> None:
    """Talk to a model: a line is a question. /new forgets what was said, /quit or the end of input ends."""
    speakers = _load(model, baseline, plain=plain)
    say("a line is a question; /new forgets what was said, /quit ends")
    said: dict[str, list[dict[str, str]]] = {name: [] for name in speakers}
    while (line := _ask()) not in (None, "/quit"):
        if line == "/new":
            said = {name: [] for name in speakers}
        elif line:
            for name, speaker in speakers.items():
                if len(speakers) > 1:
                    emit(f"{name}:")
                said[name].append({"role": "user", "content": line})
                PULSE.watch(WORKING)
                reply = speaker.reply(said[name], tokens=tokens, temperature=temperature, seed=seed, hear=_print)
                said[name].append({"role": "assistant", "content": reply.text})
                emit("")
                _speed(name, reply)


def _load(model: str, baseline: str | None, *, plain: bool) -> dict[str, Speaker]:
    opt.check_models(model, baseline)
    quiet_libraries()
    from moesaic.jobs.generate import Speaker

    speakers: dict[str, Speaker] = {}
    for name, folder in {"model": model, "dense": baseline}.items():
        if folder is not None:
            say(f"loading {folder}")
            PULSE.watch(WORKING)
            speakers[name] = Speaker(folder, plain=plain)
    if not plain and not speakers["model"].chats:
        say("the folder has no chat template: it continues the text")
    return speakers


def _ask() -> str | None:
    """The next line without spaces around it; None at the end of input."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def _print(text: str) -> None:
    PULSE.hush()
    print(text, end="", flush=True)


def _speed(name: str, reply: Reply) -> None:
    say(f"({name}: {reply.tokens} tokens, {reply.speed:.1f} a second, reading the prompt included)")
