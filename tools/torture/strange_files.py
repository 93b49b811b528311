"""What a run directory may hold in place of what groktrace wrote: damage, and what a stranger might write."""

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from groktrace.run import files, layout
from groktrace.run.program.allow_list import RandomError, RefusedError, find_operation

KINDS = ("run.json", "program.json", "analysis", "safetensors")

Case = tuple[str, Path, bytes]  # what was done, to which file, and its new content


def damages(root: Path) -> Iterator[Case]:
    """Every byte changed, in two ways, and every length short of the whole."""
    draw = random.Random(0)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for place in range(len(whole)):
            for mask in (0xFF, 1 << draw.randrange(7)):
                yield "changed byte", path, whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]
        for length in range(len(whole)):
            yield "cut", path, whole[:length]


LEAVES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        64,
        1000,
        2**16,
        2**24,
        2**27,
        2**31,
        2**40,
        2**63,
        2**64,
        -(2**63),
        10**400,
    ),
    *(
        0.5,
        -0.5,
        1e-320,
        1e38,
        1e300,
        -1e300,
        float("nan"),
        float("inf"),
        "",
        "a",
        "0",
        "-1",
        "nan",
        "../../etc/passwd",
    ),
    *(
        "/dev/zero",
        "\x1b[2J",
        "\ud800",
        "\x00",
        "λ" * 50,
        "x" * 5000,
        "float32",
        "float64",
        "quint8",
        "complex64",
        "deep",
        "mean",
    ),
    *([], {}, [[]], [0], [1, 2], [2**20, 2**20], {"ref": 0}, {"ref": 6}, {"ref": 10**6}, {"float": "nan"}),
    *({"dtype": "float64"}, {"dtype": "complex64"}, {"device": "run"}, {"tuple": [0, 1]}, {"dict": {"a": 0}}),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path within a document but the empty one."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


def leaf(draw: random.Random) -> Any:
    """Something that a stranger might write in the place of a value."""
    value = copy.deepcopy(draw.choice(LEAVES))
    kind = draw.random()
    if kind < 0.05:
        for _ in range(draw.choice([5, 50])):
            value = [value] if draw.random() < 0.5 else {"list": [value]}
    elif kind < 0.1:
        value = [value] * draw.choice([2, 100, 3000])
    elif kind < 0.15:
        value = draw.randint(-(2**66), 2**66) if draw.random() < 0.5 else draw.uniform(-1e6, 1e6)
    return value


def mutate(document: Any, draw: random.Random) -> Any:
    """A document with one to three of its places changed, removed, doubled, or exchanged."""
    document = copy.deepcopy(document)
    for _ in range(draw.randint(1, 3)):
        paths = list(places(document))
        if not paths:
            break
        path = draw.choice(paths)
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        key, way = path[-1], draw.random()
        if way < 0.5:
            parent[key] = leaf(draw)
        elif way < 0.6:
            del parent[key]
        elif way < 0.7:
            if isinstance(parent, dict):
                parent[leaf_name(draw)] = copy.deepcopy(parent[key])
            else:
                parent.append(copy.deepcopy(parent[key]))
        elif way < 0.8 and isinstance(parent[key], int | float):
            with contextlib.suppress(OverflowError, ValueError):
                parent[key] = type(parent[key])(parent[key] + draw.choice([-1, 1, 2, 1e3]))
        else:
            source = document
            for step in draw.choice(paths):
                source = source[step] if _holds(source, step) else source
            parent[key] = copy.deepcopy(source)
    return document


def _holds(value: Any, key: Any) -> bool:
    return (
        key in value
        if isinstance(value, dict)
        else isinstance(value, list) and isinstance(key, int) and key < len(value)
    )


def leaf_name(draw: random.Random) -> str:
    """A key that a stranger might add."""
    return draw.choice(["", "a", "weight", "data", "digest", "step", "\x1b", "\ud800", "train.0", "__class__", "λ"])


def written(document: Any, draw: random.Random) -> bytes:
    """The document as JSON, nearly always with a digest that fits; sometimes with a few bytes changed."""
    with contextlib.suppress(ValueError, UnicodeEncodeError):
        if isinstance(document, dict) and draw.random() < 0.95:
            document = files.with_digest(document)
    deep = draw.choice([100, 5000, 100_000])
    data = bytearray(json.dumps(document).encode().replace(b'"deep"', b"[" * deep + b"]" * deep))
    if draw.random() < 0.1:
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def operations() -> list[tuple[str, Any]]:
    """The operations that a program may call, with their schemas."""
    found = []
    for schema in torch._C._jit_get_all_schemas():
        target = f"{schema.name.replace('::', '.')}.{schema.overload_name or 'default'}"
        with contextlib.suppress(RefusedError, RandomError):
            find_operation(target, [], {})
            found.append((target, schema))
    found.sort(key=lambda item: item[0])
    return found


def grow(program: dict[str, Any], draw: random.Random, known: list[tuple[str, Any]]) -> dict[str, Any]:
    """The program with a few calls of any operations before its end, on arguments of the kinds that they take."""
    program = copy.deepcopy(program)
    first = len(program["inputs"])
    for _ in range(draw.randint(1, 6)):
        target, schema = draw.choice(known)
        values = first + len(program["nodes"])
        args = [
            argument_of(str(argument.real_type), draw, values)
            for argument in schema.arguments
            if not argument.kwarg_only
        ]
        program["nodes"].append(
            {"target": target, "args": args[: draw.randint(1, len(args))] if args else [], "kwargs": {}}
        )
    if draw.random() < 0.3:  # doubling, as archives do that unpack to a thousand times their size
        target = draw.choice(["aten.cat.default", "aten.stack.default", "aten.kron.default", "aten.outer.default"])
        for _ in range(draw.choice([5, 30, 100])):
            last = {"ref": first + len(program["nodes"]) - 1}
            args = [[last, last]] if target in ("aten.cat.default", "aten.stack.default") else [last, last]
            program["nodes"].append({"target": target, "args": args, "kwargs": {}})
    end = {"target": "aten.sum.default", "args": [{"ref": first + len(program["nodes"]) - 1}], "kwargs": {}}
    if draw.random() < 0.8:
        program["nodes"].append(end)
        program["outputs"] = [first + len(program["nodes"]) - 1, None]
    return program


def argument_of(kind: str, draw: random.Random, values: int) -> Any:
    """An argument of a schema's kind, of any size."""
    if draw.random() < 0.02:
        return leaf(draw)
    if kind.startswith("Optional["):
        return None if draw.random() < 0.5 else argument_of(kind[9:-1], draw, values)
    if kind.startswith("List["):
        return [argument_of(kind[5:-1], draw, values) for _ in range(draw.choice([0, 1, 1, 2, 2, 3, 4]))]
    match kind:
        case "Tensor":
            return {"ref": draw.randrange(values)}
        case "int" | "SymInt":
            return draw.choice([-2, -1, -1, 0, 0, 0, 1, 1, 1, 2, 2, 3, 8, 100, 2**12, 2**20, 2**27, 2**40, -(2**40)])
        case "float" | "number":
            return draw.choice([0, 1, -1, 0.5, 1e-30, 1e30, {"float": "nan"}, 2, 1000])
        case "bool":
            return draw.random() < 0.5
        case "str":
            return draw.choice(["mean", "none", "sum", "i,j->ij", "ij,kl->ijkl", "bilinear", "constant", ""])
        case "ScalarType":
            return {"dtype": draw.choice(["float32", "float64", "int64", "bool", "complex64"])}
    return None


def strange(root: Path, count: int, seed: int) -> Iterator[Case]:
    """Files as a stranger might write them: `count` cases, in turn of each kind."""
    draw = random.Random(seed)
    known = operations()
    run, program = (files.read_json(root / name) for name in (layout.RUN_FILE, layout.PROGRAM_FILE))
    analysed = sorted(path for path in (root / layout.ANALYSIS_FOLDER).rglob("*.json*"))
    stored = sorted(root.rglob("*.safetensors"))
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        if kind == "run.json":
            yield kind, root / kind, written(mutate(run, draw), draw)
        elif kind == "program.json":
            document = program if draw.random() < 0.4 else grow(program, draw, known)
            yield kind, root / kind, written(mutate(document, draw) if draw.random() < 0.5 else document, draw)
        elif kind == "analysis":
            path = draw.choice(analysed)
            if path.suffix == ".json":
                yield kind, path, written(mutate(files.read_json(path), draw), draw)
            else:
                lines = [json.loads(line) for line in path.read_bytes().splitlines()]
                changed = draw.randrange(len(lines))
                lines[changed] = mutate({k: v for k, v in lines[changed].items() if k != files.DIGEST_KEY}, draw)
                yield kind, path, b"".join(written(line, draw) + b"\n" for line in lines)
        else:
            path = draw.choice(stored)
            yield kind, path, header_changed(path.read_bytes(), draw)


def header_changed(whole: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header, its metadata's digest that fits, and perhaps another length."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    if draw.random() < 0.5:
        about = {k: v for k, v in header["__metadata__"].items() if k != files.DIGEST_KEY}
        for name in ("digests", "metrics"):
            if name in about and draw.random() < 0.6:
                about[name] = json.dumps(mutate(json.loads(about[name]), draw))
        header["__metadata__"] = mutate(about, draw) if draw.random() < 0.5 else about
        with contextlib.suppress(ValueError, TypeError):
            header["__metadata__"] = files.with_digest(header["__metadata__"])
    else:
        header = mutate(header, draw)
    text = json.dumps(header).encode()
    told = len(text) if draw.random() < 0.9 else draw.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(text) + 8, len(whole)])
    return told.to_bytes(8, "little") + text + whole[8 + length :]
