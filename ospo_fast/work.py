"""What a stage costs: tokens, images and FLOPs are counted where they happen, while the stage runs.

`count` adds integers to the `Work` of the running stage, and does nothing outside of one. Records do not depend on it.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ospo_fast.cards import find_card
from ospo_fast.cost import ModelShapes
from ospo_fast.errors import OspoError

if TYPE_CHECKING:
    import torch

# What a cost may hold: numbers that are summed, and the FLOP/s of one device.
_SUMMED = ("device_seconds", "tokens", "images", "flops", "kept", "dropped")


@dataclass(eq=False)  # two works of the same numbers are not one
class Work:
    """Work of a stage or of a training step.

    Attributes:
        shapes: of the model that runs; None: FLOPs are not known.
        tokens: positions that passed the decoder, prompts and both branches of guidance included.
        images: images that were generated.
        flops: of the model, see `ModelShapes.flops`.
        kept, dropped: items (prompts: answers; masks and training: pairs) that later stages can use, and the others.

    """

    shapes: ModelShapes | None = None
    tokens: int = 0
    images: int = 0
    flops: float = 0.0
    kept: int = 0
    dropped: int = 0

    def cost(self, seconds: float, device: str) -> dict[str, Any]:
        """Return the cost of a stage that took `seconds` on one device, as stages.json holds it.

        device: "cpu", or the name that torch gives the GPU. `device_seconds` are seconds times devices, of a CPU too.
        `peak_flops` is the dense bf16 peak of the device, None where it is not known, such as for a CPU.
        """
        card = find_card(device)
        return {
            "device": device,
            "device_seconds": round(seconds, 3),
            "tokens": self.tokens,
            "images": self.images,
            "flops": float(f"{self.flops:.6g}") if self.shapes else None,
            "peak_flops": card.flops if card else None,
            "kept": self.kept,
            "dropped": self.dropped,
        }


_running: list[Work] = []  # the stage, and within training the step


@contextlib.contextmanager
def counting(work: Work) -> Iterator[Work]:
    """Add what runs in the block to `work`, and to the works of the blocks around it."""
    _running.append(work)
    try:
        yield work
    finally:
        _running.remove(work)


def count(
    *,
    tokens: int = 0,
    images: int = 0,
    kept: int = 0,
    dropped: int = 0,
    layers: int | None = None,
    backward: bool = False,
    trained: bool = False,
    **rows: float,
) -> None:
    """Add to the running works. rows: what `ModelShapes.flops` takes, apart from tokens; images are decoded too."""
    for work in _running:
        work.tokens += tokens
        work.images += images
        work.kept += kept
        work.dropped += dropped
        if work.shapes is not None:
            work.flops += work.shapes.flops(
                tokens=tokens, decoded=images, layers=layers, backward=backward, trained=trained, **rows
            )


def passes(model: Any) -> dict[str, bool]:
    """Return what `count` is told of a forward pass of an adapter: whether a backward pass follows, and what it trains.

    The weights of the decoder are trained if the first one is. With LoRA it is frozen.
    """
    import torch

    weight = next(model.decoder.layers.parameters())
    return {"backward": torch.is_grad_enabled(), "trained": weight.requires_grad}


def work_of(model: Any) -> Work:
    """Return the work to count into for an adapter. FLOPs are not known without one, and for other models."""
    config: Any = getattr(getattr(model, "module", None), "config", None)
    known = getattr(config, "model_type", None) == "janus"
    return Work(ModelShapes.from_config(config.to_dict(), model.name) if known else None)


def device_name(device: torch.device) -> str:
    """Return "cpu", or the name of a GPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def rates(cost: Mapping[str, Any], seconds: float) -> dict[str, float | None]:
    """Return tokens and images per second of wall time, and MFU.

    MFU is FLOPs of the model / (device seconds · peak of the device); None where FLOPs or peak are not known.
    """
    per_second = {f"{name}_s": round(cost[name] / seconds, 3) for name in ("tokens", "images") if seconds}
    flops, limit = cost.get("flops"), cost["device_seconds"] * (cost.get("peak_flops") or 0)
    return {**per_second, "mfu": round(flops / limit, 4) if flops and limit else None}


def step_rates(cost: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Return what the log line of a training step has of its cost: `tokens_s`, and `mfu` where it is known."""
    found = rates(cost, seconds)
    return {name: value for name in ("tokens_s", "mfu") if (value := found.get(name)) is not None}


def check_cost(cost: object, where: str) -> None:
    """Raise OspoError if the cost of an entry of stages.json does not have the values that stages write."""
    if not (isinstance(cost, dict) and isinstance(cost.get("device"), str)):
        raise OspoError(
            f"{where}: `cost` should be an object with the name of a `device`, got {cost!r:.60}; delete the entry."
        )
    for name in (*_SUMMED, "peak_flops"):
        value = cost.get(name)
        known = value is not None or name in ("flops", "peak_flops")
        number = value is None or (type(value) in (int, float) and 0 <= value <= 1e30)
        if not (known and number):
            raise OspoError(
                f"{where}: `cost.{name}` should be a number of at least 0, got {value!r:.60}; delete the entry."
            )


def add_up(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sums of costs; None where one of them is not known."""
    return {
        name: None if any(cost[name] is None for cost in costs) else round(sum(cost[name] for cost in costs), 3)
        for name in _SUMMED
    }


def sum_costs(costs: Iterable[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """Sum costs of a stage, and return them with the rates over `seconds` of wall time.

    FLOPs, and with them MFU, are None if they are not known of every cost.
    """
    costs = list(costs)
    total = add_up(costs)
    peaks = [cost["peak_flops"] for cost in costs]
    total["peak_flops"] = None
    if None not in peaks and total["device_seconds"]:
        spent = sum(cost["device_seconds"] * peak for cost, peak in zip(costs, peaks, strict=True))
        total["peak_flops"] = spent / total["device_seconds"]
    found = rates(total, seconds)
    del total["peak_flops"]
    return {**total, **found}


def describe(cost: Mapping[str, Any], seconds: float) -> str:
    """Return the cost of a stage in words, for the line that is printed when it ends; empty if nothing was counted."""
    found, words = rates(cost, seconds), []
    if cost["tokens"]:
        words.append(f"{found.get('tokens_s') or 0:,.0f} tokens/s")
    if found["mfu"] is not None:
        words.append(f"MFU {found['mfu']:.1%}")
    if cost["device"] != "cpu":
        words.append(f"{cost['device_seconds']:.1f} GPU-seconds")
    if cost["dropped"]:
        words.append(f"{cost['kept']} kept, {cost['dropped']} dropped")
    return ", ".join(words)


def sum_wall_seconds(rows: Iterable[Mapping[str, Any]]) -> float:
    """Return the wall time of entries of stages.json in seconds.

    Calls run one after the other. The workers of one `call` run at the same time: the longest one counts.
    """
    alone, calls = 0.0, defaultdict[Any, dict[Any, float]](lambda: defaultdict(float))
    for row in rows:
        if row.get("call") is None:
            alone += row["seconds"]
        else:
            calls[row.get("iteration"), row["call"]][row.get("worker")] += row["seconds"]
    return alone + sum(max(workers.values()) for workers in calls.values())


def check_worker(row: Mapping[str, Any], where: str) -> None:
    """Raise OspoError if an entry of stages.json names its call or its worker as no stage does.

    `call` identifies the call of several workers, `workers` is their number, and `worker` the one that wrote the entry.
    """
    for name, kind, form in (("call", str, "a text"), ("workers", int, "an integer"), ("worker", int, "an integer")):
        value = row.get(name)
        if value is not None and type(value) is not kind:
            raise OspoError(f"{where}: `{name}` should be {form}, got {value!r:.60}; delete the entry.")
    if row.get("iteration") is not None and type(row["iteration"]) is not int:
        raise OspoError(f"{where}: `iteration` should be an integer, got {row['iteration']!r:.60}; delete the entry.")
