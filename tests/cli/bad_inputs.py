"""The table of bad inputs: what is wrong, the command, and the one line that must come back. See test_bad_inputs.py.

Every command runs in a folder of its own that holds an intact tiny model, ``model``, an intact output of it, ``done``
(a partition by MLPMoE), and ``pruned`` (a lossy one); ``arrange`` spoils something first. The rows of the
verbs that train are in bad_training.py.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Arrange = Callable[[Path], object]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
MLPMOE = "--method mlpmoe --set branches=4"


@dataclass(frozen=True)
class Bad:
    """One bad input. ``message`` and ``hint`` are regular expressions; ``""`` as hint stands for no hint."""

    name: str
    command: str
    message: str
    hint: str = "."
    arrange: Arrange = lambda work: None
    code: int = 1
    family: str = "llama"


def write(path: str, content: str | bytes) -> Arrange:
    """Write a file, with its folders."""

    def arrange(work: Path) -> None:
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_bytes(content.encode() if isinstance(content, str) else content)

    return arrange


def remove(path: str) -> Arrange:
    """Remove all files that match."""
    return lambda work: [file.unlink() for file in work.glob(path)]


def folder(path: str) -> Arrange:
    """Make a folder."""
    return lambda work: (work / path).mkdir(parents=True)


def config(**changes: Any) -> Arrange:
    """Change config.json of the model."""

    def arrange(work: Path) -> None:
        path = work / "model/config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return arrange


def only_config(**content: Any) -> Arrange:
    """Replace config.json of the model."""
    return write("model/config.json", json.dumps(content))


def tensors(edit: Callable[[dict[str, Tensor]], object]) -> Arrange:
    """Change the weights of the model."""

    def arrange(work: Path) -> None:
        path = work / "model" / WEIGHTS
        content = {name: tensor.clone() for name, tensor in load_file(path).items()}
        edit(content)
        save_file(content, path, metadata={"format": "pt"})

    return arrange


def index(weight_map: Mapping[str, str]) -> Arrange:
    """Replace the model's one file by an index; the file becomes the first shard."""

    def arrange(work: Path) -> None:
        (work / "model" / WEIGHTS).rename(work / "model/model-00001-of-00002.safetensors")
        (work / "model" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict(weight_map)}))

    return arrange


def cut(path: str, keep: float) -> Arrange:
    """Keep only the first part of a file."""

    def arrange(work: Path) -> None:
        content = (work / path).read_bytes()
        (work / path).write_bytes(content[: int(keep * len(content))])

    return arrange


def flip(path: str) -> Arrange:
    """Flip the last bit of a file."""

    def arrange(work: Path) -> None:
        content = bytearray((work / path).read_bytes())
        content[-1] ^= 1
        (work / path).write_bytes(content)

    return arrange


def unfinished(work: Path) -> None:
    """A staging folder that a run with another seed left."""
    write("out.partial/.moesaic.lock", "")(work)
    write("out.partial/key.json", json.dumps({"seed": 7}))(work)
    folder("out.partial/model")(work)


def parquet(work: Path) -> None:
    """A parquet file whose only column is ``body``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"body": ["a text"]}), work / "t.parquet")


def moved_in(work: Path) -> None:
    """The model inside the folder that is to be created."""
    (work / "out").mkdir()
    shutil.move(work / "model", work / "out/model")


def put(name: str, value: float) -> Arrange:
    """Change the last number of a tensor of the model."""
    return tensors(lambda content: content[name].view(-1)[-1:].fill_(value))


def _crop(name: str) -> Arrange:
    return tensors(lambda content: content.update({name: content[name][:-1].contiguous()}))


def _drop(name: str) -> Arrange:
    return tensors(lambda content: content.pop(name))


_CONVERT = f"convert model out {MLPMOE}"
_CMOE = "convert model out --method cmoe --calib-tokens 128 --calib-window 64"
_ONE_SHARD = {UP: "model-00001-of-00002.safetensors"}
_ATTENTION = "model.layers.1.self_attn.q_proj.weight"

MODELS = [
    Bad("wrong path", "convert nowhere/at/all out", "no model at 'nowhere/at/all'", "folder, a .gguf or a hub id"),
    Bad("misspelt path", "convert modle out", "no model at 'modle'", "did you mean model"),
    Bad("empty path", "convert '' out", "no model at ''"),
    Bad("hub id offline", "convert some-org/some-model out", "HF_HUB_OFFLINE forbids", "local folder"),
    Bad("one of its files", f"convert model/{WEIGHTS} out", "one file of a checkpoint", "give its folder: model"),
    Bad("any file", "convert a.txt out", "a.txt is not a model", arrange=write("a.txt", "hello")),
    Bad("empty folder", "convert empty out", "empty is empty", arrange=folder("empty")),
    Bad("no config", _CONVERT, "no config.json", arrange=remove("model/config.json")),
    Bad("config is no JSON", _CONVERT, "not readable as JSON", arrange=cut("model/config.json", 0.5)),
    Bad("config is a list", _CONVERT, "does not hold a JSON object", arrange=write("model/config.json", "[1]")),
    Bad("no model_type", _CONVERT, "no model_type", arrange=only_config(hidden_size=8)),
    Bad("unknown model_type", _CONVERT, "not know the model type 'lama'", "families.md", config(model_type="lama")),
    Bad("other spelling", _CONVERT, "does not know the model type 'Lla_ma'", "llama", config(model_type="Lla_ma")),
    Bad("encoder", _CONVERT, "bert is an encoder", "decoder-only", config(model_type="bert")),
    Bad("encoder-decoder", _CONVERT, "t5 is an encoder-decoder", "decoder-only", config(model_type="t5")),
    Bad("state space", _CONVERT, "mamba is a state-space", "decoder-only", config(model_type="mamba")),
    Bad(
        "no head", _CONVERT, "no language-model head", arrange=config(architectures=["LlamaForSequenceClassification"])
    ),
    Bad("multimodal", _CONVERT, "multimodal wrapper llama", arrange=config(text_config={"model_type": "llama"})),
    Bad(
        "quantised, by config",
        _CONVERT,
        r"quantised \(awq\)",
        "full-precision",
        config(quantization_config={"quant_method": "awq"}),
    ),
    Bad(
        "quantised, by dtype",
        _CONVERT,
        f"{UP} is I8",
        "full-precision",
        tensors(lambda content: content.update({UP: content[UP].to(torch.int8)})),
    ),
    Bad(
        "pickle",
        _CONVERT,
        "only pickled weights",
        "safetensors",
        lambda work: (work / "model" / WEIGHTS).rename(work / "model/pytorch_model.bin"),
    ),
    Bad("adapter", _CONVERT, "PEFT adapter", "merge", write("model/adapter_config.json", "{}")),
    Bad("converted already", "convert done out", "already converted", "undo"),
    Bad("MoE without --hierarchical", _CONVERT, "already a Mixture", "--hierarchical", family="mixtral"),
    Bad("dense with --hierarchical", f"{_CONVERT} --hierarchical", "dense model", "leave out"),
    Bad("layers missing in config", _CONVERT, "'num_hidden_layers'", arrange=config(num_hidden_layers=None)),
    Bad("width of zero", _CONVERT, "intermediate_size = 0", arrange=config(intermediate_size=0)),
    Bad("no weights", _CONVERT, "has no weights", "incomplete", remove(f"model/{WEIGHTS}")),
    Bad("truncated shard", _CONVERT, "truncated or damaged", "fetch", cut(f"model/{WEIGHTS}", 0.9)),
    Bad("truncated header", _CONVERT, "truncated or damaged", "fetch", cut(f"model/{WEIGHTS}", 0.01)),
    Bad(
        "missing shard",
        _CONVERT,
        "00002.safetensors is missing",
        arrange=index({UP: "model-00002-of-00002.safetensors"}),
    ),
    Bad("index leaves the folder", _CONVERT, "not a file of this folder", arrange=index({UP: "../x.safetensors"})),
    Bad(
        "index names no tensor", _CONVERT, "tensor nope is not in", arrange=index(_ONE_SHARD | {"nope": _ONE_SHARD[UP]})
    ),
    Bad("index without map", _CONVERT, "no weight_map", arrange=index({})),
    Bad("FFN tensor missing", _CONVERT, f"no tensor {UP}", arrange=_drop(UP)),
    Bad("other tensor missing", _CONVERT, f"no tensor {_ATTENTION}", arrange=_drop(_ATTENTION)),
    Bad("FFN of wrong shape", _CONVERT, rf"{UP} is \[36, 32\], config.json asks for \[37", arrange=_crop(UP)),
    Bad("other wrong shape", _CONVERT, rf"{_ATTENTION} is \[31, 32\]", arrange=_crop(_ATTENTION)),
    Bad(
        "width unlike config",
        _CONVERT,
        r"is \[37, 32\], config.json asks for \[37, 64\]",
        arrange=config(hidden_size=64),
    ),
    Bad("more layers in config", _CONVERT, "no tensor model.layers.2", arrange=config(num_hidden_layers=3)),
    Bad("NaN in the last layer", _CONVERT, f"{UP} has 1 NaN or infinite", "damaged", put(UP, float("nan"))),
    Bad("infinity in the attention", _CONVERT, f"{_ATTENTION} has 1 NaN", "damaged", put(_ATTENTION, float("-inf"))),
    Bad("GGUF garbage", "convert a.gguf out", "not a GGUF file", "again", write("a.gguf", b"GGML" + bytes(64))),
    Bad("GGUF truncated", "convert a.gguf out", "damaged or incomplete", "again", write("a.gguf", b"GGUF\3\0\0\0")),
    Bad(
        "GGUF part",
        "convert a-00001-of-00002.gguf out",
        "beside it there is no a-00002-of-00002.gguf",
        "download all parts",
        write("a-00001-of-00002.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 0)),
    ),
]

CALIBRATION = [
    Bad("tokenizer missing", _CMOE, "no tokenizer in model", "tokenizer.json", remove("model/*token*")),
    Bad("tokenizer damaged", _CMOE, "no usable tokenizer in model", "again", write("model/tokenizer.json", "{")),
    Bad("path missing", f"{_CMOE} --calib nowhere.txt", "'nowhere.txt' does not exist", "wikitext"),
    Bad("empty file", f"{_CMOE} --calib t.txt", "t.txt has no text", arrange=write("t.txt", "")),
    Bad("blank file", f"{_CMOE} --calib t.txt", "t.txt has no text", arrange=write("t.txt", " \n\n ")),
    Bad("empty calibration folder", f"{_CMOE} --calib texts", "no text files", arrange=folder("texts")),
    Bad(
        "shorter than a window",
        f"{_CMOE} --calib t.txt",
        "one window needs 64",
        "--calib-window",
        write("t.txt", "Hi."),
    ),
    Bad(
        "fewer tokens than asked",
        f"{_CMOE} --calib t.txt",
        "2 windows of 64",
        "--calib-tokens",
        write("t.txt", "expert " * 40),
    ),
    Bad("not UTF-8", f"{_CMOE} --calib t.txt", "not UTF-8", "iconv", write("t.txt", b"caf\xe9 " * 400)),
    Bad(
        "jsonl: bad line",
        f"{_CMOE} --calib t.jsonl",
        "line 2 is not valid JSON",
        arrange=write("t.jsonl", '{"text": "a"}\n{'),
    ),
    Bad(
        "jsonl: no field",
        f"{_CMOE} --calib t.jsonl",
        "line 1 has no text field 'text'",
        "body",
        write("t.jsonl", '{"body": "a"}'),
    ),
    Bad("parquet: no column", f"{_CMOE} --calib t.parquet", "no text column 'text'", "body", parquet),
    Bad("parquet: no such file", f"{_CMOE} --calib t.parquet", "not a parquet file", arrange=write("t.parquet", "PAR")),
    Bad("weight of zero", f"{_CMOE} --calib c4=0", "weight 0 is not positive"),
    Bad("no tokens", f"{_CMOE} --calib-tokens 0", "tokens", "tokens: .*Default: 16384"),
    Bad("window of one", f"{_CMOE} --calib-window 1", "window", "window: .*Default: 2048"),
]

OUTPUTS = [
    Bad("output exists", "convert model done", "exists and is complete", "another output"),
    Bad("output a file", f"convert model a.txt {MLPMOE}", "exists and is a file", arrange=write("a.txt", "")),
    Bad("output is the model", f"convert model model {MLPMOE}", "is the model itself"),
    Bad("output in the model", f"convert model model/out {MLPMOE}", "inside the model folder", "elsewhere"),
    Bad("model in the output", f"convert out/model out {MLPMOE}", "inside the output", "elsewhere", moved_in),
    Bad("parent missing", f"convert model no/such/out {MLPMOE}", "no/such does not exist", "parent"),
    Bad("parent a file", f"convert model a.txt/out {MLPMOE}", "a.txt is not a folder", "parent", write("a.txt", "")),
    Bad("unfinished output of another run", _CONVERT, "another run", "--restart", unfinished),
    Bad("staging folder of somebody else", _CONVERT, "in the way", arrange=write("out.partial/mine", "x")),
]

BLUEPRINTS = [
    Bad("blueprint missing", "convert model out --blueprint model", "no blueprint in model", "conversion"),
    Bad(
        "blueprint damaged",
        "convert model out --blueprint done",
        "blueprint.json cannot be read",
        arrange=cut("done/blueprint.json", 0.5),
    ),
    Bad(
        "blueprint without numbers",
        "convert model out --blueprint done",
        "cannot be read",
        arrange=cut("done/blueprint.safetensors", 0.5),
    ),
    Bad("blueprint of another family", "convert model out --blueprint done", "does not have", "its own", family="gpt2"),
    Bad(
        "blueprint of another width",
        "convert model out --blueprint done",
        "has 37 neurons, this model's 40",
        "its own",
        family="llama-40",
    ),
]

VERBS = [
    Bad("plan: wrong path", "plan nowhere", "there is no folder 'nowhere', no such model", "folder"),
    Bad("plan: a file", f"plan model/{WEIGHTS}", "is one file of a checkpoint", "folder"),
    Bad("plan: config is a list", "plan model", "not hold a JSON object", arrange=write("model/config.json", "[]")),
    Bad("plan: experts > neurons", "plan model --layout S1A1E64", "only 37 neurons"),
    Bad("inspect: no output", "inspect model", "not an output of moesaic", "converted model"),
    Bad("inspect: damaged results", "inspect done", "results.json", arrange=write("done/results.json", "{")),
    Bad("inspect: other no output", "inspect done --diff model", "not an output of moesaic", "converted model"),
    Bad("verify: wrong path", "verify nowhere", "nowhere is not a folder"),
    Bad("verify: no output", "verify model", "not an output of moesaic", "converted model"),
    Bad(
        "verify: flipped byte",
        "verify done",
        "not the file that was written",
        code=3,
        arrange=flip("done/model-00002-of-00003.safetensors"),
    ),
    Bad("verify: file missing", "verify done", "config.json is missing", code=3, arrange=remove("done/config.json")),
    Bad("verify: another baseline", "verify done --baseline model", "not the model that", "--baseline", put(UP, 0.5)),
    Bad("undo: no output", "undo model out", "not an output of moesaic"),
    Bad("undo: pruned", "undo pruned out", "kept only 19 of 37 neurons", "dense model"),
    Bad("undo: onto a folder", "undo done model", "output .*model exists"),
    Bad(
        "undo: flipped byte",
        "undo done out",
        "not the file that was written",
        code=3,
        arrange=flip("done/model-00002-of-00003.safetensors"),
    ),
]

TABLE = [*MODELS, *CALIBRATION, *OUTPUTS, *BLUEPRINTS, *VERBS]
