"""The layer of each object, against the official variants' figures."""

from typing import Any

import numpy as np
import pytest
import torch

from ospo_fast import object_masks
from ospo_fast.errors import OpError
from ospo_fast.ops.attention_columns import attention_columns_reference
from ospo_fast.ops.layer_choice import best_layers, choose_layers


@pytest.mark.parametrize("rule", ["entropy", "separability"])
@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("index", range(2))
def test_golden(golden: Any, index: int, rule: str, reduce: str) -> None:
    """The official code chooses for the last object; its mask has the threshold as it is."""
    figures = golden(f"attention_masks_{index}.npz")
    span = torch.tensor(figures["spans"][-int(figures["span_len"][-1]) :])
    rows = (int(figures["prompt_len"]), 576)
    layers = [layer for layer in range(len(figures["q"])) if layer not in figures["skip"]]
    maps = torch.stack([
        attention_columns_reference(
            *(torch.tensor(figures[name][layer : layer + 1]) for name in "qk"), span[None, :, None], rows=rows
        )
        for layer in layers
    ])  # fmt: skip
    used = torch.ones(1, 1, len(span), dtype=torch.bool)
    found = choose_layers(maps.view(len(layers), 1, 1, len(span), 24, 24), used, rule=rule, reduce=reduce)
    official = f"select_{'otsu' if rule == 'separability' else rule}_{reduce}"
    assert int(found.layers) == int(figures[f"{official}_layer"])
    np.testing.assert_allclose(found.maps.flatten(), figures[f"{official}_map"], atol=2e-6)
    masks = object_masks(found.maps, scaler=1.0)
    np.testing.assert_array_equal(masks.union[0], figures[f"{official}_mask"])


@pytest.mark.parametrize("rule", ["entropy", "separability"])
def test_each_object_alone(rule: str) -> None:
    maps, used = torch.rand(4, 2, 3, 2, 5, 6) ** 3, torch.tensor([[[1, 1], [1, 0], [0, 0]]] * 2).bool()
    maps[:, :, 2] = torch.nan
    maps[:, :, 1, 1] = torch.inf  # a place without a token
    together = choose_layers(maps, used, rule=rule)
    assert together.scores.shape == (4, 2, 3)
    assert (together.maps[:, 2] == 0).all()
    for b in range(2):
        for o, tokens in ((0, 2), (1, 1)):
            part = maps[:, b : b + 1, o : o + 1, :tokens]
            alone = choose_layers(part, torch.ones(1, 1, tokens, dtype=torch.bool), rule=rule)
            assert torch.equal(alone.layers[0, 0], together.layers[b, o])
            torch.testing.assert_close(alone.maps[0, 0], together.maps[b, o])
    assert choose_layers(maps[:, :, :0], used[:, :0], rule=rule).maps.shape == (2, 0, 5, 6)


def test_the_sharpest_layer_and_the_cleanest_split() -> None:
    maps = torch.rand(3, 1, 1, 1, 8, 8)
    maps[1] = maps[1] * 0.1
    maps[1, ..., 2:6, 2:6] += 0.9  # two plain classes
    assert int(choose_layers(maps, torch.ones(1, 1, 1).bool(), rule="separability").layers) == 1


def test_the_best_layers_of_a_model() -> None:
    scores, valid = torch.rand(5, 4, 3), torch.rand(4, 3) < 0.7
    scores[3], scores[1] = scores[3] - 1, scores[1] + 1
    scores[4, ~valid] = -100.0
    assert best_layers(scores, valid) == [3]
    assert best_layers(scores, valid, rule="separability") == [1]
    assert 1 not in best_layers(scores, valid, count=4)
    for change in ({"valid": ~valid & valid}, {"scores": scores[0]}, {"rule": "best"}, {"count": 6}, {"count": 0}):
        with pytest.raises(OpError, match="best_layers"):
            best_layers(**({"scores": scores, "valid": valid} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": torch.rand(3, 2, 2, 4, 4)}, r"expected float \(L, B, O, C, H, W\)"),
        ({"used": torch.ones(1, 2, 2)}, r"used is torch.float32 \(1, 2, 2\), expected bool \(1, 2, 2\)"),
        ({"rule": "best"}, "rule is 'best'"),
        ({"reduce": "sum"}, "reduce 'sum'"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"maps": torch.full((3, 1, 2, 2, 4, 4), torch.nan)}, "NaN or infinity"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"maps": torch.rand(3, 1, 2, 2, 4, 4), "used": torch.ones(1, 2, 2).bool()} | change
    with pytest.raises(OpError, match=message):
        choose_layers(**arguments)
