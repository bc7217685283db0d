"""Values that no stage writes, put in every place of a file of a run folder."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

MARKUP = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
# As JSON text, as some of them are values that json.dumps refuses to write.
VALUES = {
    "null": "null",
    "true": "true",
    "number": "7",
    "negative": "-3",
    "largest": "1.7976931348623157e308",
    "tiny": "5e-324",
    "beyond float64": "1" + "0" * 400,
    "infinity": "1e400",
    "NaN": "NaN",
    "thousands of digits": "1" * 5000,
    "empty text": '""',
    "markup": json.dumps(MARKUP),
    "line separators": json.dumps("a\u2028b\u2029c", ensure_ascii=False),
    "half characters and overrides": '"\\ud800 \\udfff \u202e\u2066 \\u0000"',
    "empty list": "[]",
    "lists": '[[1, [null]], {"a": []}]',
    "long list": json.dumps([""] * 5000),
    "prototype": '{"__proto__": {"x": 1}, "constructor": "x", "toString": null}',
    "deep": "[" * 300 + "]" * 300,
    "deeper than the parser": '{"a":' * 100_000 + "1" + "}" * 100_000,
}
_PLACE = "the place of a value"


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a value; of lists, only those of the first entry."""
    if isinstance(value, dict):
        inner: list[Any] = list(value)
    else:
        inner = [0] if isinstance(value, list) and value else []
    for key in inner:
        yield (*path, key)
        yield from places(value[key], (*path, key))


def replaced(value: Any, path: tuple[Any, ...], text: str | None) -> str:
    """The JSON text of a value with another text at a path; None deletes what is there."""
    value = copy.deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if text is None:
        del holder[path[-1]]
    else:
        holder[path[-1]] = _PLACE
    return json.dumps(value).replace(json.dumps(_PLACE), text or "", 1)


def variants(value: Any) -> Iterator[str]:
    """Yield the JSON text of a value with every place deleted, and with each of `VALUES` in every place."""
    for path in places(value):
        yield from (replaced(value, path, text) for text in (None, *VALUES.values()))


def hostile_store(record: dict[str, Any]) -> str:
    """The lines of a store that holds every variant of a record, under an id of its own, and each of `VALUES`."""
    lines = list(VALUES.values())
    for number, text in enumerate(variants({key: value for key, value in record.items() if key != "item_id"})):
        lines.append(f'{{"item_id": "hostile_{number}", ' + text.removeprefix("{"))
    lines += [replaced(record, ("item_id",), text) for text in (None, *VALUES.values())]
    return "\n".join(lines) + "\n"
