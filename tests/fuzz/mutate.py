"""Deterministic damage: to the text of a configuration, and to the files of a checkpoint folder.

Every function draws from the `random.Random` it is given and from nothing else, so that a seed names one input.
"""

import copy
import io
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ast_sparse.config.yaml12 import dump_yaml, parse_yaml

COUNT = int(os.environ.get("AST_SPARSE_FUZZ", "300"))  # inputs in all; CI keeps it small


def share(part: float) -> range:
    """The seeds of a test that gets a part of the inputs."""
    return range(max(1, round(COUNT * part)))


# ---- YAML ------------------------------------------------------------------------------------------------------------

_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 16, 10**9, -(10**12), 10**18, 10**400, 0.5, -0.0, 1e-30, 1e300, 5e-324,
    float("nan"), float("inf"), float("-inf"), "", " ", "no", "null", "1e5", "09", "2:4", "~", "=", "<<", "*", "a\nb",
    "a\0b", "\x1b[31m", "\u2028", "\ufeff", "ünïcødé", "模型", "x" * 5000, "../../x", "/etc/passwd", "1_000", "0x10",
    "2001-01-01", "12:30:45", "!!python/none", "{}", "%", "@", "`", "- a", "a: b", "# x", "'", '"', "\\", "\t", "yes",
    [], {}, [[]], [None], [1, "a"], [""], {"a": None}, {"a": {"b": {"c": 1}}}, {"": 1}, {"a\nb": 1}, [float("nan")],
    {"x": float("inf")}, {"path": "x", "n": 10**400}, [{"path": "x"}, "y"], ["x"] * 200, list(range(50)),
]  # fmt: skip

_FRAGMENTS = [
    "\t", "\n", " ", ":", ": ", "- ", "? ", "{", "}", "[", "]", ",", "#", "&a ", "*a", "*a ", "&a [*a]", "<<: *a", "|",
    ">", "'", '"', "%YAML 1.1\n", "---\n", "...\n", "!!python/object/apply:os.system ['true']",
    "!!python/name:os.system", "!!set {a, b}", "!!binary aGVsbG8=", "!!timestamp 2001-01-01", "!!omap [a: 1]",
    "!!pairs [a: 1]", "!!bool maybe",
    "!!float ''", "!!float x", "!!int ''", "!!int x", "!!null x", "!!str [a]", "!!map [a]", "!!seq {}", "! x", "!x y",
    "!<tag:yaml.org,2002:float> 1_0", "\x00", "\x07", "\x85", "\u2028", "\ufeff", "\ud7ff", "\U0001f600", '"\\ud800"',
    '"\\x00"', '"\\U00110000"', '"\\', ".nan", ".inf", "-.inf", "1e999", "9" * 400, "9" * 5000, "010", "[" * 60,
    "[" * 2000, "{a: " * 60, "- " * 300, "0x", "1e", "+", "-", ".", "<<", "=", "~", "NULL", "tRUE",
]  # fmt: skip


def bomb(levels: int = 30) -> str:
    """Aliases that stand for 9^levels entries."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines) + f"\nmodel: {{name_or_path: *a{levels - 1}}}\ndata: {{train: *a{levels - 1}}}\n"


_WHOLE: list[Callable[[], str | bytes]] = [
    lambda: "", lambda: "\n", lambda: "---\n", lambda: "null", lambda: "[]", lambda: "5", lambda: "a", lambda: "\0",
    lambda: bytes(range(256)), lambda: b"\xff\xfe" + "model:".encode("utf-16-le"), lambda: b"\x80", bomb,
    lambda: "[" * 100_000, lambda: "{a: " * 20_000, lambda: "model: " + "x" * 10_000_000, lambda: "- " * 5000,
    lambda: "a: &a [*a]\n", lambda: "model: &m {name_or_path: *m}\ndata: *m\n", lambda: "? [a]\n: b\n",
    lambda: "? &k [*k]\n: b\n", lambda: "a: 1\n---\nb: 2\n", lambda: "&a a: *a\n", lambda: "x: " * 10_000,
    lambda: "".join(f"k{i}: {i}\n" for i in range(5000)), lambda: b"PK\x03\x04" + b"\0" * 100,
]  # fmt: skip


def _paths(tree: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path for key, value in below for path in [(*above, key), *_paths(value, (*above, key))]]


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def mutate_tree(rng: random.Random, tree: dict[str, Any], values: list[Any] | None = None) -> None:
    """One change of structure, in place: a value, a key, a place."""
    path = rng.choice(_paths(tree))
    node, key = _at(tree, path[:-1]), path[-1]
    change = rng.randrange(7)
    if change <= 2:
        node[key] = copy.deepcopy(rng.choice(values or _VALUES))
    elif change == 3:
        del node[key]
    elif change == 4 and isinstance(node, dict):
        name = str(key)
        at = rng.randrange(len(name) + 1)
        node[name[:at] + rng.choice(["", "_", "x", "\n", "é"]) + name[at + 1 :]] = node.pop(key)
    elif change == 5:
        value = node[key]
        for _ in range(rng.choice([1, 2, 80])):
            value = rng.choice([[value], {"a": value}])
        node[key] = value
    else:
        other = rng.choice(_paths(tree))
        if other[: len(path)] != path:  # not into itself
            node[key] = copy.deepcopy(_at(tree, other))


def mutate_config(rng: random.Random, texts: list[str]) -> bytes:
    """A configuration file with one to three faults."""
    if rng.random() < 0.04:
        whole = rng.choice(_WHOLE)()
        return whole if isinstance(whole, bytes) else whole.encode()
    text = rng.choice(texts)
    if rng.random() < 0.6:
        tree = parse_yaml(text, "a shipped configuration")
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            if _paths(tree):
                mutate_tree(rng, tree)
        text = dump_yaml(tree)
        if rng.random() < 0.8:
            return text.encode()
    lines = text.splitlines(keepends=True) or ["\n"]
    for _ in range(rng.choice([1, 1, 2])):
        at, change = rng.randrange(len(lines)), rng.randrange(6)
        line = lines[at]
        place = rng.choice([rng.randrange(len(line) + 1), line.find(": ") + 2])
        if change <= 1:
            lines[at] = line[:place] + rng.choice(_FRAGMENTS) + rng.choice(["", line[place:], "\n"])
        elif change == 2:
            lines.insert(at, rng.choice(lines))
        elif change == 3:
            lines[at] = rng.choice(["", "\t" + line, " " + line, line.lstrip(), line.rstrip("\n")])
        elif change == 4:
            lines[at] = line[: line.find(":") + 1] + " " + rng.choice(_FRAGMENTS) + "\n"
        else:
            return mutate_bytes(rng, "".join(lines).encode())
    return "".join(lines).encode("utf-8", "surrogatepass")


# ---- bytes, JSON -----------------------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """A flipped bit, a cut, a doubled, zeroed or foreign stretch."""
    at, change = rng.randrange(len(data) or 1), rng.randrange(6)
    end = min(len(data), at + rng.choice([1, 8, 64]))
    if change <= 1 and data:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if change == 2:
        return data[:at]
    if change == 3:
        return data[:end] + data[at:]
    if change == 4:
        return data[:at] + bytes(end - at) + data[end:]
    return data[:at] + rng.randbytes(rng.choice([1, 8])) + data[end:]


_JSON_VALUES = [*_VALUES, 10**15, 2**31, "float64", "int8", "gpt2", "cpu", ["model.norm"], "[[[["]


def mutate_json(rng: random.Random, file: Path) -> str:
    """Damage to a JSON file; what was done."""
    if rng.random() < 0.25:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
        return f"{file.name}: bytes"
    if rng.random() < 0.06:
        whole = [b"", b"[]", b"null", b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"\xff", b"9" * 10_000, b'{"a": 1e999}']
        file.write_bytes(rng.choice(whole))
        return f"{file.name}: whole"
    tree = json.loads(file.read_text())
    before = json.dumps(tree)
    if _paths(tree):
        mutate_tree(rng, tree, _JSON_VALUES)
    file.write_text(json.dumps(tree))
    return f"{file.name}: {_difference(json.loads(before), tree)}"


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            if str(before.get(key, "absent")) != str(after.get(key, "absent")):
                return f"{key}={after.get(key, 'absent')!r}"[:100]
    return "changed"


# ---- pickles ---------------------------------------------------------------------------------------------------------


class _Evil:
    """An object that, unpickled, makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def evil_pickle(marker: Path, **beside: Any) -> bytes:
    """What `torch.save` writes of a dict with an object that, unpickled without care, makes the file `marker`."""
    stream = io.BytesIO()
    torch.save({**beside, "x": _Evil(marker)}, stream)
    return stream.getvalue()


# ---- safetensors -----------------------------------------------------------------------------------------------------


def read_safetensors(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, by hand: the package is not asked."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_safetensors(file: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _flip_data(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    content[rng.randrange(start, len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _flip_header(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(8 + struct.unpack("<Q", content[:8])[0])] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _truncate(rng: random.Random, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.choice([rng.randrange(len(content)), rng.randrange(16), len(content) - 1])])


def _swap(rng: random.Random, file: Path) -> None:
    """Two tensors change places, of equal shape where there are such."""
    header, data = read_safetensors(file)
    names = [name for name in header if name != "__metadata__"]
    first = rng.choice(names)
    size = [b - a for a, b in [header[first]["data_offsets"]]]
    alike = [
        name
        for name in names
        if name != first and (rng.random() < 0.2 or [b - a for a, b in [header[name]["data_offsets"]]] == size)
    ]
    if not alike:
        return _flip_data(rng, file)
    second = rng.choice(alike)
    if rng.random() < 0.5:
        header[first], header[second] = header[second], header[first]
    else:
        header[first]["data_offsets"], header[second]["data_offsets"] = (
            header[second]["data_offsets"],
            header[first]["data_offsets"],
        )
    write_safetensors(file, header, data)


def _edit_header(rng: random.Random, file: Path) -> None:
    header, data = read_safetensors(file)
    names = [name for name in header if name != "__metadata__"]
    name, change = rng.choice(names), rng.randrange(8)
    entry = header[name]
    if change == 0:
        header[rng.choice(["x", name + "x", name[1:], name.upper(), "", "a\nb", "é"])] = header.pop(name)
    elif change == 1:
        del header[name]
    elif change == 2:
        header[name + rng.choice([".x", "_meta", ".mask", ".slorb.S"])] = dict(entry)
    elif change == 3:
        dtypes = ["F64", "F32", "F16", "BF16", "I64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL", "F8_E4M3", "X"]
        entry["dtype"] = rng.choice([*dtypes, "F8_E8M0", "F4", "C64", None, 5])
    elif change == 4:
        shape = entry["shape"]
        huge = [[10**15], [10**9, 10**9], [2**63, 2], [2**64], [-1], [], [0], [1.5], "x", None]
        entry["shape"] = rng.choice([shape[::-1], [*shape, 1], [1, *shape], [2 * shape[0], *shape[1:]], *huge])
    elif change == 5:
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            [[end, begin], [begin + 4, end + 4], [0, end - begin], [begin, 10**15], [-4, end], [begin], None, "x"]
        )
    elif change == 6:  # a name that stands twice
        other = rng.choice(names)
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}}}"
        return write_safetensors(file, text.encode(), data)
    else:
        length = rng.choice([0, 1, 7, 2**63, 2**64 - 1, 10**15, 99_999_999, 100_000_001, len(data)])
        return write_safetensors(file, header, data, length)
    write_safetensors(file, header, data)


_SAFETENSORS = [_flip_data, _flip_data, _flip_header, _truncate, _swap, _swap, _edit_header, _edit_header, _edit_header]


def mutate_safetensors(rng: random.Random, file: Path) -> str:
    """Damage to a safetensors file; what was done."""
    if rng.random() < 0.05:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
        return f"{file.name}: bytes"
    change = rng.choice(_SAFETENSORS)
    change(rng, file)
    return f"{file.name}: {change.__name__}"


# ---- folders ---------------------------------------------------------------------------------------------------------


def shard(folder: Path) -> None:
    """Split `model.safetensors` into two shards and an index."""
    header, data = read_safetensors(folder / "model.safetensors")
    header.pop("__metadata__", None)
    names = list(header)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file, pieces, offset, entries = f"model-0000{number}-of-00002.safetensors", [], 0, {}
        for name in part:
            begin, end = header[name]["data_offsets"]
            entries[name] = {**header[name], "data_offsets": [offset, offset + end - begin]}
            offset += end - begin
            pieces.append(data[begin:end])
            weight_map[name] = file
        write_safetensors(folder / file, {"__metadata__": {"format": "pt"}, **entries}, b"".join(pieces))
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": len(data)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _mutate_index(rng: random.Random, folder: Path) -> str:
    """Names of files or tensors change, or the list itself."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    weight_map = index["weight_map"]
    name = rng.choice(sorted(weight_map))
    change = rng.randrange(6)
    outside = folder.parent / "outside.safetensors"
    if change == 0:
        outside.write_bytes((folder / weight_map[name]).read_bytes())
        target = rng.choice([f"../{outside.name}", str(outside), f"x/../../{outside.name}", f"./../{outside.name}"])
        file = weight_map[name]
        index["weight_map"] = {key: target if value == file else value for key, value in weight_map.items()}
    elif change == 1:
        weight_map[name] = rng.choice([None, 5, "", ".", "..", "/", "config.json", "\0", "a\nb", ["x"], {}, "nul/x"])
    elif change == 2:
        weight_map[rng.choice(["x", name + "x"])] = weight_map.pop(name)
    elif change == 3:
        del weight_map[name]
    elif change == 4:
        others = sorted(set(weight_map.values()) - {weight_map[name]})
        weight_map[name] = rng.choice(others)
    else:
        index["weight_map"] = rng.choice([None, [], {}, 5, "x", [["a", "b"]]])
    path.write_text(json.dumps(index))
    return f"index: change {change} of {name}"


def _relink(rng: random.Random, folder: Path) -> str:
    """A file becomes a link: to a copy outside the folder, to nothing, to itself, to a folder."""
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in _DAMAGED))
    outside = folder.parent / f"outside-{file.name}"
    outside.write_bytes(file.read_bytes())
    target = rng.choice([outside, Path("..") / outside.name, folder / "nowhere", file, folder, Path("/dev/null")])
    file.unlink()
    file.symlink_to(target)
    return f"{file.name}: link to {target}"


def _rearrange(rng: random.Random, folder: Path) -> str:
    """A file goes, appears twice, or takes another's place."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    file, other = rng.choice(found), rng.choice(found)
    change = rng.randrange(4)
    if change == 0:
        file.unlink()
    elif change == 1:
        file.write_bytes(other.read_bytes())
    elif change == 2:
        file.write_bytes(b"")
    else:
        stray = ["adapter_config.json", "pytorch_model.bin", "model.safetensors.index.json", "quantize_config.json"]
        (folder / rng.choice(stray)).write_bytes(file.read_bytes())
    return f"{file.name}: rearranged {change} with {other.name}"


_DAMAGED = {".safetensors", ".json"}
_OURS = {"config.json", "sparsity_config.json", "adapter_config.json", "trainer_state.json", "checksums.json"}


def mutate_folder(rng: random.Random, folder: Path) -> str:
    """One fault in a checkpoint folder; what was done."""
    tensors = sorted(folder.rglob("*.safetensors"))
    described = sorted(path for path in folder.rglob("*.json") if path.name in _OURS)
    pick = rng.random()
    if pick < 0.5:
        return mutate_safetensors(rng, rng.choice(tensors))
    if pick < 0.75:
        return mutate_json(rng, rng.choice(described))
    if pick < 0.85 and (folder / "model.safetensors").is_file():
        shard(folder)
        return _mutate_index(rng, folder)
    return (_relink if pick < 0.93 else _rearrange)(rng, folder)
