"""The attention matrix: every family of transformers' models is captured right, or refused."""

from pathlib import Path

import pytest
import transformers

from tests.models.attention_matrix import LIMIT, REFUSED, WITH_OUTPUT, check_family, row
from tests.models.families import FAMILIES

DOCS = Path(__file__).parents[2] / "docs" / "attention.md"
# All other families must be captured in all cases.
REFUSALS = {
    ("diffllama", "sdpa"): "is differential attention",
    ("diffllama", "eager"): "is differential attention",
    ("falcon", "sdpa"): "load the model with attn_implementation='eager'",
}
# These compute their attention themselves, and return its weights only if they are asked to.
ON_REQUEST = {("mpnet", "eager"), ("deberta_v2", "eager")}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    cases = list(check_family(FAMILIES[name]))
    assert cases
    for case in cases:
        if refusal := REFUSALS.get((name, case.implementation)):
            assert case.outcome == REFUSED, case
            assert refusal in case.reason
            continue
        assert (case.outcome == WITH_OUTPUT) == ((name, case.implementation) in ON_REQUEST), case
        assert case.error is not None, case
        assert case.error <= LIMIT, case
    text = DOCS.read_text(encoding="utf-8")
    if f"This one is of transformers {transformers.__version__}." in " ".join(text.split()):
        assert row(FAMILIES[name], cases) in text, "run python -m tests.models.attention_matrix and update the table"


def test_matrix_is_large() -> None:
    assert sum(family.model_class == "AutoModelForCausalLM" for family in FAMILIES.values()) >= 60
    assert len({name for name, _ in REFUSALS}) <= 3
