"""What the page says about masks of the Shapes world is true of its model and its settings."""

import numpy as np


def test_masks_of_the_shipped_rule_cover_background_where_they_fail(omegaconf):
    from ospo_fast.config import load_config
    from ospo_fast.models import load_model
    from ospo_fast.shapes.demo import object_cells
    from ospo_fast.shapes.render import render
    from ospo_fast.shapes.scenes import prompts, sample_scene
    from ospo_fast.stages.masks import MaskExtractor, extract_masks
    from ospo_fast.stages.object_tokens import find_objects

    model, settings = load_model("shapes"), load_config(family="shapes").masks
    rng = np.random.default_rng(0)
    kinds = [prompts(kind, "train") for kind in ("color2", "2D_spatial", "numeracy2")]
    descriptions = [kind[n] for kind in kinds for n in rng.choice(len(kind), 32)]
    scenes = [sample_scene(description, rng) for description in descriptions]
    images = [render(scene) for scene in scenes]
    objects = [find_objects({"prompt": description.text}, model, settings.match) for description in descriptions]
    ids, columns = [entry.ids for entry in objects], [entry.columns for entry in objects]
    found = extract_masks(MaskExtractor(settings), model, ids, model.encode_images(images), columns).found

    masks = found.union.bool().numpy()
    true = np.stack([object_cells(image, model.grid) for image in images])
    failed = (masks & true).sum((1, 2)) / (masks | true).sum((1, 2)) < 0.2
    background = (masks & ~true).sum((1, 2)) / (~true).sum((1, 2))
    white = np.array([scene.background == "white" for scene in scenes])
    assert 10 < failed.sum() < 40  # of 96
    assert background[failed].mean() > 0.7
    assert background[~failed].mean() < 0.3
    assert white[failed].mean() > 0.9
