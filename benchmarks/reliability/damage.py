"""Damage by a seeded generator: one file of a model folder, or a GGUF file, changed in one way."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_CONTENT = ("config.json", "blueprint.json", "manifest.json", INDEX)
_ODD = (None, True, -1, 0, 1e400, 2**63, "", "x", [], {}, [[]], {"a": 1}, "\ud800", float("nan"))
_DEEP = 100_000


@dataclass(frozen=True)
class Damage:
    """What was done to which file."""

    kind: str
    file: str
    text: str


def damage_folder(folder: Path, dice: random.Random) -> Damage:
    """Damage one file of a checkpoint or conversion in place."""
    kind = dice.choice([name for name, (wanted, _) in FOLDER_KINDS.items() if _candidates(folder, wanted)])
    wanted, change = FOLDER_KINDS[kind]
    file = dice.choice(_candidates(folder, wanted))
    return Damage(kind, file.name, change(file, dice))


def damage_bytes(file: Path, dice: random.Random) -> Damage:
    """Damage a GGUF file in place."""
    kind = dice.choice(list(BYTE_KINDS))
    return Damage(kind, file.name, BYTE_KINDS[kind](file, dice))


def _candidates(folder: Path, wanted: str) -> list[Path]:
    if wanted == "json":
        return [folder / name for name in _CONTENT if (folder / name).exists()]
    return sorted(folder.glob("*.safetensors")) if wanted == "weights" else [folder / INDEX]


def _flip(file: Path, dice: random.Random) -> str:
    content = bytearray(file.read_bytes())
    reach = [min(len(content), dice.choice((64, 4096, len(content)))) for _ in range(dice.randint(1, 8))]
    places = [dice.randrange(size) for size in reach]
    for place in places:
        content[place] ^= 1 << dice.randrange(8)
    file.write_bytes(content)
    return f"bits at {places}"


def _truncate(file: Path, dice: random.Random) -> str:
    size = file.stat().st_size
    kept = dice.choice((0, 1, 7, 8, 9, dice.randrange(size), size - 1))
    with file.open("r+b") as stream:
        stream.truncate(kept)
    return f"{kept} of {size} bytes"


def _append(file: Path, dice: random.Random) -> str:
    more = dice.randbytes(dice.randint(1, 100))
    with file.open("ab") as stream:
        stream.write(more)
    return f"{len(more)} bytes more"


def _noise(file: Path, dice: random.Random) -> str:
    content = bytearray(file.read_bytes())
    start = dice.randrange(len(content))
    stop = min(len(content), start + dice.randint(1, 64))
    content[start:stop] = dice.randbytes(stop - start)
    file.write_bytes(content)
    return f"bytes {start} to {stop}"


def _numbers(file: Path, dice: random.Random) -> str:
    """A huge count somewhere in the beginning, where GGUF keeps counts and lengths."""
    content = bytearray(file.read_bytes())
    place = dice.choice((4, 8, 16, 24, dice.randrange(min(2000, len(content) - 8))))
    struct.pack_into("<Q", content, place, dice.choice((2**64 - 1, 2**63, 2**40, 2**32, 0)))
    file.write_bytes(content)
    return f"number at {place}"


def _header_length(file: Path, dice: random.Random) -> str:
    length = dice.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, file.stat().st_size))
    with file.open("r+b") as stream:
        stream.write(struct.pack("<Q", length))
    return f"header of {length} bytes"


def _header(change: Callable[[dict[str, Any], str, random.Random], Any]) -> Callable[[Path, random.Random], str]:
    """A change of one entry of a safetensors header."""

    def rewrite(file: Path, dice: random.Random) -> str:
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        name = dice.choice([name for name in header if name != "__metadata__"])
        what = change(header, name, dice)
        text = what if isinstance(what, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        return f"{name}: {what if isinstance(what, str) else 'twice'}"

    return rewrite


def _shape(header: dict[str, Any], name: str, dice: random.Random) -> str:
    shape = header[name]["shape"]
    header[name]["shape"] = dice.choice(
        (shape[::-1], [*shape, 1], [shape[0] * 2, *shape[1:]], [-1], [2**62, 4], [0], [], "x", [1.5])
    )
    return f"shape {header[name]['shape']}"


def _dtype(header: dict[str, Any], name: str, dice: random.Random) -> str:
    header[name]["dtype"] = dice.choice(("F16", "F64", "I8", "U8", "F8_E4M3", "BOOL", "", "Q4", 3, None))
    return f"dtype {header[name]['dtype']}"


def _offsets(header: dict[str, Any], name: str, dice: random.Random) -> str:
    start, stop = header[name]["data_offsets"]
    header[name]["data_offsets"] = dice.choice(
        ([stop, start], [start, 2**50], [0, stop - start], [-8, stop], [start], "x", [start + 2, stop + 2])
    )
    return f"offsets {header[name]['data_offsets']}"


def _rename(header: dict[str, Any], name: str, dice: random.Random) -> str:
    new = dice.choice((name + "x", "", "../" + name, "lm_head.weight", name.replace("layers.0", "layers.9"), "é" * 500))
    header[new] = header.pop(name)
    return f"named {new[:40]!r}"


def _twice(header: dict[str, Any], name: str, dice: random.Random) -> bytes:
    text = json.dumps(header)
    return (text[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}" + "}").encode()


def _not_finite(file: Path, dice: random.Random) -> str:
    """A weight in bf16, fp16 or fp32 whose bits are those of NaN or infinity in each of them."""
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    names = [name for name, info in header.items() if name != "__metadata__" and info["dtype"] in ("BF16", "F32")]
    name = dice.choice(names)
    start, stop = (8 + length + offset for offset in header[name]["data_offsets"])
    size = 2 if header[name]["dtype"] == "BF16" else 4
    place = start + size * dice.randrange((stop - start) // size)
    content[place : place + size] = dice.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\x00\x00\x80\x7f"))[-size:]
    file.write_bytes(content)
    return f"{name} at {place}"


def _odd_value(file: Path, dice: random.Random) -> str:
    content = json.loads(file.read_text())
    where, holder, key = _somewhere(content, dice)
    holder[key] = dice.choice(_ODD)
    file.write_text(json.dumps(content))
    return f"{where} = {holder[key]!r}"


def _missing_key(file: Path, dice: random.Random) -> str:
    content = json.loads(file.read_text())
    where, holder, key = _somewhere(content, dice)
    del holder[key]
    file.write_text(json.dumps(content))
    return f"{where} gone"


def _other_number(file: Path, dice: random.Random) -> str:
    """An integer that is off by a little: shapes that do not fit, layers too many."""
    content = json.loads(file.read_text())
    where, holder, key = _somewhere(content, dice)
    for _ in range(200):
        if isinstance(holder[key], int) and not isinstance(holder[key], bool):
            holder[key] += dice.choice((-1, 1, 7, 10**6))
            break
        where, holder, key = _somewhere(content, dice)
    file.write_text(json.dumps(content))
    return f"{where} = {holder[key]!r}"


def _somewhere(content: Any, dice: random.Random) -> tuple[str, Any, Any]:
    """A place in a JSON value: its path, what holds it, and the key there."""
    path = ""
    holder: Any = {"": content}
    key: Any = ""
    while True:
        value = holder[key]
        inner = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
        if not inner or (path and dice.random() < 0.4):
            return path, holder, key
        holder, key = value, dice.choice(inner)
        path = f"{path}.{key}" if path else str(key)


def _whole(file: Path, dice: random.Random) -> str:
    texts = {
        "deep lists": "[" * _DEEP + "]" * _DEEP,
        "deep objects": '{"a":' * _DEEP + "1" + "}" * _DEEP,
        "list": "[]",
        "null": "null",
        "text": '"x"',
        "number": "1" * 10_000,
        "nothing": "",
        "two values": "{} {}",
        "other encoding": "{}".encode("utf-16"),
        "zero bytes": "\0" * 100,
        "empty object": "{}",
    }
    name = dice.choice(list(texts))
    text = texts[name]
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


def _key_twice(file: Path, dice: random.Random) -> str:
    text = file.read_text().rstrip()
    content = json.loads(text)
    key = dice.choice(list(content))
    value = dice.choice(_ODD[:9])
    file.write_text(f"{text[:-1]}, {json.dumps(key)}: {json.dumps(value)}}}")
    return f"{key} twice, last {value!r}"


def _index_entry(file: Path, dice: random.Random) -> str:
    content = json.loads(file.read_text())
    name = dice.choice(list(content["weight_map"]))
    outside = ("../dense/model.safetensors", "/etc/passwd", "a/../b.safetensors", "x.safetensors", "", 3, "config.json")
    content["weight_map"][name] = dice.choice((*outside, *content["weight_map"].values(), "\0.safetensors"))
    file.write_text(json.dumps(content))
    return f"{name} in {content['weight_map'][name]!r}"


def _index_names(file: Path, dice: random.Random) -> str:
    content = json.loads(file.read_text())
    name = dice.choice(list(content["weight_map"]))
    where = content["weight_map"].pop(name)
    if added := dice.random() < 0.5:
        content["weight_map"][f"{name}.more"] = where
    file.write_text(json.dumps(content))
    return f"{name} {'renamed' if added else 'gone'}"


def _no_file(file: Path, dice: random.Random) -> str:
    file.unlink()
    choice = dice.choice(("gone", "a folder", "a dangling link", "a link to itself"))
    if choice == "a folder":
        file.mkdir()
    elif choice.startswith("a dangling"):
        file.symlink_to("nowhere")
    elif choice.startswith("a link"):
        file.symlink_to(file.name)
    return choice


Change = Callable[[Path, random.Random], str]
BYTE_KINDS: dict[str, Change] = {
    "bit flips": _flip,
    "truncated": _truncate,
    "longer": _append,
    "noise": _noise,
    "huge count": _numbers,
    "no file": _no_file,
}
FOLDER_KINDS: dict[str, tuple[str, Change]] = {
    "bit flips": ("weights", _flip),
    "bit flips in JSON": ("json", _flip),
    "truncated": ("weights", _truncate),
    "truncated JSON": ("json", _truncate),
    "longer": ("weights", _append),
    "noise": ("weights", _noise),
    "header length": ("weights", _header_length),
    "shape": ("weights", _header(_shape)),
    "dtype": ("weights", _header(_dtype)),
    "offsets": ("weights", _header(_offsets)),
    "tensor name": ("weights", _header(_rename)),
    "tensor twice": ("weights", _header(_twice)),
    "not finite": ("weights", _not_finite),
    "odd value": ("json", _odd_value),
    "key missing": ("json", _missing_key),
    "other number": ("json", _other_number),
    "whole file": ("json", _whole),
    "key twice": ("json", _key_twice),
    "index entry": ("index", _index_entry),
    "index names": ("index", _index_names),
    "no file": ("weights", _no_file),
    "no JSON": ("json", _no_file),
}


def copied(source: Path, target: Path) -> Path:
    """A folder or file to be damaged."""
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    return target
