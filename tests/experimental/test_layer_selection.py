"""Layer selection, against values of the official variants."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ospo_fast import object_masks, otsu_threshold
from ospo_fast.errors import OpError
from ospo_fast.experimental.layer_selection import RULES, best_layer, choose_layers
from ospo_fast.ops.attention_columns import attention_columns_reference

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("index", range(2))
def test_golden(index: int) -> None:
    """The official code chooses for the last object; its mask uses the unscaled threshold."""
    data = np.load(GOLDEN / f"attention_masks_{index}.npz")
    span = torch.tensor(data["spans"][-int(data["span_len"][-1]) :])
    rows = (int(data["prompt_len"]), 576)
    layers = [layer for layer in range(len(data["q"])) if layer not in data["skip"]]
    maps = torch.stack([
        attention_columns_reference(
            *(torch.tensor(data[name][layer : layer + 1]) for name in "qk"), span[None, :, None], rows=rows
        )
        for layer in layers
    ])  # fmt: skip
    maps, used = maps.view(len(layers), 1, 1, len(span), 24, 24), torch.ones(1, 1, len(span), dtype=torch.bool)
    for rule, name in (("entropy", "entropy"), ("separability", "otsu")):
        found, official = choose_layers(maps, used, rule=rule), f"select_{name}_max"
        assert int(found.layers) == int(data[f"{official}_layer"])
        np.testing.assert_allclose(found.maps.flatten(), data[f"{official}_map"], atol=2e-6)
        masks = object_masks(found.maps, scaler=1.0)
        np.testing.assert_array_equal(masks.union[0], data[f"{official}_mask"])


@pytest.mark.parametrize("rule", RULES)
def test_objects_are_independent(rule: str) -> None:
    features = torch.randn(2, 5, 6, 7) if rule == "contrast" else None
    maps, used = torch.rand(4, 2, 3, 2, 5, 6) ** 3, torch.tensor([[[1, 1], [1, 0], [0, 0]]] * 2).bool()
    maps[:, :, 2] = torch.nan
    maps[:, :, 1, 1] = torch.inf  # no token there
    together = choose_layers(maps, used, rule=rule, features=features)
    assert together.scores.shape == (4, 2, 3)
    assert (together.maps[:, 2] == 0).all()
    for b in range(2):
        for o, tokens in ((0, 2), (1, 1)):
            part = maps[:, b : b + 1, o : o + 1, :tokens]
            own = None if features is None else features[b : b + 1]
            alone = choose_layers(part, torch.ones(1, 1, tokens, dtype=torch.bool), rule=rule, features=own)
            assert torch.equal(alone.layers[0, 0], together.layers[b, o])
            torch.testing.assert_close(alone.maps[0, 0], together.maps[b, o])
    assert choose_layers(maps[:, :, :0], used[:, :0], rule=rule, features=features).maps.shape == (2, 0, 5, 6)


def test_separability_takes_the_layer_with_two_classes() -> None:
    maps = torch.rand(3, 1, 1, 1, 8, 8)
    maps[1] = maps[1] * 0.1
    maps[1, ..., 2:6, 2:6] += 0.9
    assert int(choose_layers(maps, torch.ones(1, 1, 1).bool(), rule="separability").layers) == 1


def test_contrast_is_the_share_of_variance_between_the_classes() -> None:
    maps, features = torch.rand(4, 2, 1, 1, 5, 6) ** 2, torch.randn(2, 5, 6, 3) + 5
    found = choose_layers(maps, torch.ones(2, 1, 1).bool(), rule="contrast", features=features)
    for layer in range(4):
        for b in range(2):
            cells, shown = maps[layer, b, 0, 0], features[b].double()
            cells = (cells - cells.min()) / (cells.max() - cells.min() + 1e-8)
            inside = cells > otsu_threshold(cells)
            within = sum(((part - part.mean(0)) ** 2).sum() for part in (shown[inside], shown[~inside]))
            share = 1 - within / ((shown - shown.flatten(0, 1).mean(0)) ** 2).sum()
            assert float(found.scores[layer, b, 0]) == pytest.approx(float(share), rel=1e-4)
    assert torch.equal(found.layers, found.scores.argmax(0))


def test_contrast_takes_the_layer_whose_mask_follows_the_features() -> None:
    """The object has features of its own: contrast takes the layer that marks it, not one that is sharper elsewhere."""
    maps, features = torch.rand(3, 1, 1, 1, 8, 8) * 0.1, torch.zeros(1, 8, 8, 4)
    features[:, 2:6, 2:6, 1] = 1
    maps[1, ..., 2:6, 2:6] += 0.5
    maps[2] = 0
    maps[2, ..., :4] = 1
    used = torch.ones(1, 1, 1).bool()
    for rule in ("entropy", "separability"):
        assert int(choose_layers(maps, used, rule=rule).layers) == 2
    found = choose_layers(maps, used, rule="contrast", features=features)
    assert int(found.layers) == 1
    assert float(found.scores[1]) > 0.9
    # Uniform features do not distinguish layers.
    assert choose_layers(maps, used, rule="contrast", features=torch.ones(1, 8, 8, 4)).scores.count_nonzero() == 0


def test_best_layer() -> None:
    scores, valid = torch.rand(5, 4, 3), torch.rand(4, 3) < 0.7
    scores[3], scores[1] = scores[3] - 1, scores[1] + 1
    scores[4, ~valid] = -100.0
    assert best_layer(scores, valid) == 3
    assert best_layer(scores, valid, rule="separability") == 1
    assert best_layer(scores, valid, rule="contrast") == 1
    for change in ({"valid": ~valid & valid}, {"scores": scores[0]}, {"rule": "best"}):
        with pytest.raises(OpError, match="best_layer"):
            best_layer(**({"scores": scores, "valid": valid} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"maps": torch.rand(3, 2, 2, 4, 4)}, r"expected float \(L, B, O, C, H, W\)"),
        ({"used": torch.ones(1, 2, 2)}, r"used is torch.float32 \(1, 2, 2\), expected bool \(1, 2, 2\)"),
        ({"rule": "best"}, "rule is 'best'"),
        ({"maps": torch.full((3, 1, 2, 2, 4, 4), torch.nan)}, "NaN or infinity"),
        ({"rule": "contrast"}, r"features are None for rule 'contrast', expected float \(1, 4, 4, E\)"),
        ({"features": torch.rand(1, 4, 4, 3)}, "for rule 'entropy'.*else none"),
        ({"rule": "contrast", "features": torch.rand(1, 16, 3)}, r"features are torch.float32 \(1, 16, 3\)"),
        ({"rule": "contrast", "features": torch.full((1, 4, 4, 3), torch.inf)}, "features hold NaN or infinity"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {"maps": torch.rand(3, 1, 2, 2, 4, 4), "used": torch.ones(1, 2, 2).bool()} | change
    with pytest.raises(OpError, match=message):
        choose_layers(**arguments)
