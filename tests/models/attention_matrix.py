"""Captured attention of every family of `families.py` against transformers' own `output_attentions`.

`python -m tests.models.attention_matrix` prints the table of docs/attention.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from ospo_fast.errors import OspoError
from ospo_fast.models.capture import AttentionCapture
from tests.models.families import FAMILIES, PADDING, Family, reference

KINDS = {"plain": "plain", "left_padded": "left-padded", "packed": "packed"}
LIMIT = 1e-6  # of the error of a map
EQUAL, REFUSED, WITH_OUTPUT = "equal", "refused", "with `output_attentions=True`"


@dataclass(frozen=True)
class Case:
    """One forward pass of a family under one implementation of attention."""

    implementation: str
    kind: str
    output: str  # the name of the attentions in the model's output
    outcome: str
    error: float | None = None  # the largest of a map
    reason: str = ""  # of a refusal


def check_family(family: Family) -> Iterator[Case]:
    """Capture each of a family's attentions. Raises AssertionError if the capture changes the model's output."""
    eager = family.build("eager")
    for implementation in family.implementations:
        model = family.build(implementation)
        for kind in family.kinds:
            inputs = family.inputs(kind)
            with torch.no_grad():
                plain = model(**inputs, use_cache=False)
            for output in family.attentions:
                expected = reference(family, eager, inputs, output)
                yield _check(family, model, inputs, plain, expected, Case(implementation, kind, output, EQUAL))


def _check(
    family: Family, model: nn.Module, inputs: dict[str, Tensor], plain: dict, expected: tuple[Tensor, ...], case: Case
) -> Case:
    outcome, reason = EQUAL, ""
    columns = [[[4, 5], [7]], [[6], [expected[0].shape[-1] - 1, 8]]]
    rows = (PADDING, expected[0].shape[2] - PADDING)
    attentions = None if case.output == "attentions" else case.output
    for options in ({}, {"output_attentions": True}):
        capture = AttentionCapture(model, columns=columns, rows=rows, skip=0, attentions=attentions)
        try:
            with torch.no_grad(), capture:
                captured = model(**inputs, use_cache=False, **options)
            break
        except OspoError as error:
            reason = str(error)
            if options or "output_attentions=True" not in reason:
                return Case(case.implementation, case.kind, case.output, REFUSED, reason=reason)
            outcome = WITH_OUTPUT
    name = "logits" if "logits" in plain else "last_hidden_state"
    if outcome == EQUAL:  # output_attentions itself changes the implementation of some models
        torch.testing.assert_close(captured[name], plain[name], rtol=0, atol=0, equal_nan=True)
    maps = torch.stack(
        [
            torch.stack([torch.stack([p[b, PADDING:, used].mean(-1) for used in columns[b]]) for b in range(2)])
            for p in (probs.mean(1) for probs in expected)
        ]
    )
    assert capture.layer_maps.shape == maps.shape, f"{family.name}: {capture.layer_maps.shape}, {maps.shape}"
    error = float((capture.layer_maps - maps).abs().max())
    return Case(case.implementation, case.kind, case.output, outcome, error, reason)


def row(family: Family, cases: list[Case]) -> str:
    """A line of the table of docs/attention.md."""
    cells = []
    for implementation in ("sdpa", "eager"):
        own = [case for case in cases if case.implementation == implementation]
        outcomes = {case.outcome for case in own}
        kinds = ", ".join(KINDS[kind] for kind in family.kinds)
        assert len(outcomes) <= 1, f"{family.name}: {outcomes}"
        cells.append({EQUAL: kinds, WITH_OUTPUT: f"{kinds} {WITH_OUTPUT}"}.get(*outcomes, *outcomes) if own else "-")
    return f"| {family.name} | {cells[0]} | {cells[1]} |"


def main() -> None:
    """Print the table."""
    print(f"transformers {transformers.__version__}\n\n| family | sdpa | eager |\n| --- | --- | --- |")
    worst = 0.0
    for family in FAMILIES.values():
        cases = list(check_family(family))
        worst = max([worst, *(case.error or 0 for case in cases)])
        print(row(family, cases))
    print(f"\n{len(FAMILIES)} families, largest error {worst:.1e}")


if __name__ == "__main__":
    main()
