"""What masks change in a gradient, on the pairs of a small run, and the layers that masks are compared of."""

import mask_gradients as bench
import mask_layers
import pytest
import torch

from ospo_fast.config import load_config
from ospo_fast.models import load_model
from ospo_fast.pipeline import Pipeline
from ospo_fast.stages import STAGE_NAMES

pytestmark = pytest.mark.usefixtures("omegaconf")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, omegaconf: None) -> bench.Gradients:
    out = tmp_path_factory.mktemp("run")
    counts = "prompts.counts={color1: 1, shape1: 1, color2: 2, 2D_spatial: 1, numeracy1: 1, numeracy2: 2}"
    config = load_config(["model=shapes", f"out={out}", counts], family="shapes")
    model = load_model("shapes")
    Pipeline(config, progress=False, model=model).run(STAGE_NAMES[: STAGE_NAMES.index("train")])
    return bench.Gradients(model, config, batches=2)


def test_masks_of_ones_change_nothing_and_true_masks_the_more_the_higher_they_are(found: bench.Gradients) -> None:
    plain = list(found.gradients(found.examples(), mask_alpha=0.0))
    assert len(plain) == found.count
    assert set(plain[0]) == set(bench.TERMS)
    changed = {}
    for kind in ("true", "ones"):  # the order of KINDS: files are replaced in place
        bench.replace_masks(found.out, kind, found.world)
        for alpha in (1.0, 31.0):
            masked = list(found.gradients(found.examples(), mask_alpha=alpha, mask_blur=1))
            share = found.object_share(found.examples(), mask_alpha=alpha, mask_blur=1)
            changed[kind, alpha] = bench.cosines(masked, plain, "no_mask"), share
    plain_share = found.object_share(found.examples(), mask_alpha=0.0)
    for alpha in (1.0, 31.0):
        cosines, share = changed["ones", alpha]
        assert all(cosines[f"no_mask_{term}"] == pytest.approx(1, abs=1e-4) for term in bench.TERMS)
        assert share == pytest.approx(plain_share)
    low, high = (changed["true", alpha] for alpha in (1.0, 31.0))
    assert plain_share < low[1] < high[1] < 1
    for term in bench.TERMS:
        assert high[0][f"no_mask_{term}"] < low[0][f"no_mask_{term}"] < 1


def test_objects_hold_what_the_prompt_says(found: bench.Gradients) -> None:
    means = found.log_probabilities(found.examples())
    codes = found.objects[: len(found.pairs) // found.count * found.count, 0]
    assert means["objects_of_codes"] == pytest.approx(float(codes.mean()))
    assert means["prompt_objects"] > means["prompt_others"]
    assert 0 < means["prompt_share_of_objects"] <= 1


def test_cosines_are_means_over_batches() -> None:
    one = [{"loss": torch.tensor([1.0, 0.0])}, {"loss": torch.tensor([0.0, 2.0])}]
    two = [{"loss": torch.tensor([3.0, 0.0])}, {"loss": torch.tensor([1.0, 0.0])}]
    assert bench.cosines(one, two, "next") == {"next_loss": 0.5, "next_loss_std": 0.5}


def test_the_layers_that_are_compared_do_not_take_the_heads_of_the_world() -> None:
    """The world of small objects has `masks.heads` of its own, which would be those of every layer."""
    assert load_config(family="shapes-large").masks.heads == [0]
    variants = dict(mask_layers._variants(5, 4))
    assert len(variants) == 5 + 5 * 4 + 1 + 3 * len(mask_layers.RULES)
    assert all({"layers", "heads"} <= set(changes) for changes in variants.values())
    assert variants["layer 0"] == {"layers": [0], "heads": None}
