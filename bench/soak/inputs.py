"""Hostile inputs: seeds in one of several forms, changed in a few places at random."""

import io
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

TEXTS = (
    "", " ", "\n", "\r\n", "\t", "\0", "\u2028", "\u00a0", "\ufeff", "\ud800", "\u0130", "\u00b2", "e\u0301",
    "\U0001f600", ";", ":", ",", ".", "?", "(", ")", "<", ">", "'", '"', "\\", "/", "${oc.env:HOME}", "{{ 1 // 0 }}",
    "<image>", "</s>", "<script>alert(1)</script>", "../../escaped", "/etc/passwd", "con", "a red circle",
    "two blue squares", "Prompt:", "Concepts and relations:", "Relation:", "(circle, red)", "Contrastive Prompt:",
    "Prompt 1 Dense:", "Prompt 2 Dense:", "Step 3.", "Questions:", "Is there a circle?", "User:", "<|assistant|>",
    "the the", "left of", "-", "0", "-1", "1/2", "9" * 30, "1e999", "nan", "null", "[", "{", "]", "}", "#", "&a [*a]",
    "!!python/name:os.system", "--out", "--help", "train.steps=", "base_0", "=",
)  # fmt: skip
LEAVES = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "x" * 5000, [], {}, [[]], [None], {"": None}, [0] * 50, [{}], "base_0", *TEXTS,
)  # fmt: skip
SECRET = "OSPO_FAST_SOAK_SECRET", "hunter2"  # a variable of the environment, which no input may bring into a result
TAGS = (
    "!!str", "!!int", "!!float", "!!bool", "!!null", "!!binary", "!!timestamp", "!!set", "!!omap", "!!pairs", "!", "!x",
    "!!python/tuple", "!!python/object/apply:pathlib.PosixPath", "!!python/object/apply:pathlib.Path", "&a", "&b",
)  # fmt: skip
SCALARS = (
    "~", "", "010", "0x1f", "0b_", "1_0", "20241101_1230", "1e5", "1.", ".inf", "-.nan", "12:30:00", "2024-11-01", "no",
    "y", "=", "<<", "a #b", "a b", "'a''b'", '"\\x85"', "*a", "*b", "<<: *a", "{<<: [*a, *b]}", "? x", "[a, 1]",
    "{1: 2, null: 3}", f'["${{oc.env:{SECRET[0]}}}"]', f"'${{oc.env:{SECRET[0]}}}'", "'???'", "'\\???'", "aGVsbG8=",
)  # fmt: skip
ARRAYS = (
    np.zeros(0), np.zeros((0, 3)), np.zeros((2, 0), np.int64), np.full((2, 2), np.nan), np.array(5), np.zeros(1, bool),
    np.array([2**63 - 1, -(2**63)]), np.full(16, -1, np.int16), np.full(64, 255, np.uint8), np.zeros((1, 2, 2)),
    np.full((3, 3), np.inf, np.float16), np.zeros((1,) * 20, np.float32), np.arange(144, dtype=np.int64),
)  # fmt: skip


def text(rng: random.Random, seeds: Sequence[Any]) -> bytes:
    """Return a seed with up to six pieces inserted, removed or repeated."""
    value = rng.choice(seeds)
    for _ in range(rng.randrange(7)):
        start = rng.randrange(len(value) + 1)
        end = min(len(value), start + rng.choice((0, 0, 1, 3, 20, 200)))
        piece = (
            rng.choice(TEXTS) if rng.random() < 0.6 else chr(rng.choice((rng.randrange(128), rng.randrange(0x11000))))
        )
        if rng.random() < 0.2:
            piece = value[start:end]
        value = value[:start] + piece * rng.choice((1, 1, 1, 2, 3, 30)) + value[end:]
    return value[:20_000].encode("utf-8", "surrogatepass")


def binary(rng: random.Random, seeds: Sequence[Any]) -> bytes:
    """Return the bytes of a seed with up to eight bytes set, removed or repeated."""
    value = bytearray(rng.choice(seeds))
    for _ in range(rng.randrange(9)):
        at = rng.randrange(min(len(value), rng.choice((40, 10**9))) + 1)  # often in the header
        choice = rng.randrange(4)
        if choice == 0 and at < len(value):
            value[at] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
        elif choice == 1:
            value[at : at + 4] = rng.choice((0, 1, 2**31 - 1, 2**32 - 1)).to_bytes(4, rng.choice(("big", "little")))
        elif choice == 2:
            del value[at : at + rng.choice((1, 2, 8, 100, 10**9))]
        else:
            value[at:at] = value[at : at + rng.choice((1, 4, 64))]
    return bytes(value)


def _copy(value: Any) -> Any:
    """Copy dicts and lists, and not their leaves, which nothing changes: much faster than copy.deepcopy."""
    if isinstance(value, dict):
        return {name: _copy(inner) for name, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value in a tree."""
    found: list[tuple[Any, Any]] = []
    stack = [value]
    while stack and len(found) < 2000:
        top = stack.pop()
        keys = list(top) if isinstance(top, dict) else range(len(top))
        found += [(top, key) for key in keys]
        stack += [top[key] for key in keys if isinstance(top[key], (dict, list))]
    return found


def tree(rng: random.Random, seeds: Sequence[Any], leaves: Sequence[Any] = LEAVES) -> Any:
    """Return a seed of dicts and lists with up to five values replaced, removed, moved or nested."""
    root = [_copy(rng.choice(seeds))]
    for _ in range(rng.randrange(6)):
        container, key = rng.choice(_places(root))
        choice = rng.randrange(10)
        if choice == 0 and container is not root:
            del container[key]
        elif choice == 1:
            container[key] = [container[key]]
        elif choice == 2:
            other, name = rng.choice(_places(root))
            container[key] = _copy(other[name])
        elif choice == 3 and isinstance(container, dict):
            container[str(rng.choice(TEXTS))] = container.pop(key)
        elif choice == 4 and isinstance(container[key], str):
            container[key] = text(rng, [container[key]]).decode("utf-8", "surrogatepass")
        elif choice == 5 and rng.random() < 0.05:
            # The parsers and the functions that walk values end at different depths.
            for _ in range(rng.choice((50, 95, 600, 3000))):
                container[key] = [container[key]]
            break  # a deep tree cannot be copied
        else:
            container[key] = _copy(rng.choice(leaves))
    return root[0]


def _dump(value: Any) -> bytes:
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 100_000


def json_(rng: random.Random, seeds: Sequence[Any]) -> bytes:
    """Return a changed tree as JSON, sometimes with changed characters."""
    data = _dump(tree(rng, seeds))
    return text(rng, [data.decode()]) if rng.random() < 0.1 else data


def _flow(rng: random.Random, value: Any) -> str:
    """Return a tree as YAML on one line, here and there with a tag, anchor, alias, merge or another scalar."""
    choice = rng.randrange(120)
    if choice < 3:
        return rng.choice(SCALARS)
    before = f"{rng.choice(TAGS)} " if choice < 8 else ""
    if isinstance(value, dict):
        items = [f"{_flow(rng, name)}: {_flow(rng, inner)}" for name, inner in value.items()]
        if choice == 8:
            items.insert(rng.randrange(len(items) + 1), rng.choice(("<<: *a", "<<: [*a, *b]", "<<: {steps: 1}")))
        return f"{before}{{{', '.join(items)}}}"
    if isinstance(value, list):
        return f"{before}[{', '.join(_flow(rng, inner) for inner in value)}]"
    if isinstance(value, str) and value.isidentifier() and choice % 2:
        return before + value
    return before + json.dumps(value)


def yaml_(rng: random.Random, seeds: Sequence[Any]) -> bytes:
    """Return a changed tree as YAML, sometimes with changed characters, or as JSON."""
    if rng.random() < 0.3:
        return json_(rng, seeds)
    value = tree(rng, seeds) if rng.random() < 0.5 else rng.choice(seeds)
    try:
        data = (
            "\n".join(f"{name}: {_flow(rng, each)}" for name, each in value.items()) if isinstance(value, dict) else ""
        )
    except RecursionError:
        data = ""
    data = data or "[" * 1000
    return text(rng, [data]) if rng.random() < 0.1 else data.encode("utf-8", "surrogatepass")


def settings(rng: random.Random, seeds: Sequence[Any]) -> bytes:
    """Return changed lines `key=value`, or lines of the keys of the seeds with other values of YAML."""
    if rng.random() < 0.5:
        return text(rng, seeds)
    chosen = [rng.choice(seeds).partition("=")[0] for _ in range(rng.randrange(1, 4))]
    values = [{"a": 1}, [0, "b"], "x", 3, 0.5, None]
    written = [f"{key}={_flow(rng, rng.choice((*values, *SCALARS)))}" for key in chosen]
    return "\n".join(written).encode("utf-8", "surrogatepass")


def lines(rng: random.Random, seeds: Sequence[Any]) -> bytes:
    """Return lines of JSON of a changed list, or the list itself."""
    value = tree(rng, seeds)
    if not isinstance(value, list) or rng.random() < 0.2:
        return _dump(value)
    data = b"\n".join(map(_dump, value)) + rng.choice((b"", b"\n"))
    return text(rng, [data.decode()]) if rng.random() < 0.1 else data


def archive(pack: Callable[[Any], bytes]) -> Callable[[random.Random, Sequence[Any]], bytes]:
    """Return a generator of packed trees with arrays as values, sometimes with changed bytes."""

    def generate(rng: random.Random, seeds: Sequence[Any]) -> bytes:
        value = tree(rng, seeds, ARRAYS if rng.random() < 0.7 else (*ARRAYS, *LEAVES))
        try:
            data = pack(value)
        except Exception:  # what cannot be packed is no input
            data = pack(seeds[0])
        return binary(rng, [data]) if rng.random() < 0.3 else data

    return generate


def _npz(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **{str(name): np.asarray(inner) for name, inner in value.items()})
    return buffer.getvalue()


def _pt(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(_tensors(value), buffer)
    return buffer.getvalue()


def _tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tensors(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_tensors(inner) for inner in value]
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) and value.dtype.kind != "U" else value


npz, safetensors, pt = archive(_npz), archive(save), archive(_pt)
