"""A tiny random Janus with scripted texts and answers, so that every stage has something to process.

The script answers the last user message in the forms of the Shapes world, and one time in ten with an answer that does
not parse. Images are the random model's own.
"""

import dataclasses
import functools
import hashlib
import random
from pathlib import Path

import numpy as np

from ospo_fast.shapes import grammar
from ospo_fast.shapes.scenes import SHAPES_WORLD, WORLDS, descriptions, parse


def save_tiny(folder: Path, seed: int = 0, world=SHAPES_WORLD) -> Path:
    """Save a random tiny model for `load_model`.

    Its weights are larger than at initialization, so that images and attention depend on the prompt.
    """
    import torch

    from ospo_fast.shapes.model import build_model, build_processor

    model = build_model(seed, world, hidden=32, layers=2, intermediate=48, heads=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and ("language_model" in name or "generation_head" in name):
                weight.mul_(6)
    model.save_pretrained(folder)
    build_processor(world).save_pretrained(folder)
    return folder


known_descriptions = functools.cache(descriptions)  # a list of thousands takes a tenth of a second


def reply(message: str, seed: int, world=SHAPES_WORLD) -> str:
    """Answer the last user message."""
    head, _, rest = message.partition(" ")
    rng = np.random.default_rng(seed % 2**32)
    if rng.random() < 0.1:
        return "um"
    if head == "prompt":
        known = known_descriptions(rest, world)
        return grammar.stage1_answer(known[int(rng.integers(len(known)))])
    if head == "dense:":
        first, second = (parse(part, world) for part in rest.split(" / "))
        return grammar.densify_answer(*grammar.densify(first, second, rng))
    if head == "questions:":
        return grammar.questions_answer(parse(rest, world))
    return f"Contrastive Prompt: {grammar.perturb(parse(rest, world), head[:-1], 'attribute2', rng).text}"


def generate_text(model, prompts, *, seeds, **settings):
    texts = [model.detokenize(ids) for ids in prompts]
    world = WORLDS.get(model.templates, SHAPES_WORLD)
    return [reply(text.strip(), seed, world) for text, seed in zip(texts, seeds, strict=True)]


def fail_image(setattr_, failing):
    """Let the image number `failing` of every call of the generator fail. setattr_: that of monkeypatch."""
    from ospo_fast.generation import ImageGenerator

    original = ImageGenerator.generate

    def generate(self, prompts, *, callback, **settings):
        def partly(batch):
            keep = [n for n, index in enumerate(batch.indices) if index != failing]
            callback(dataclasses.replace(batch, indices=[batch.indices[n] for n in keep], codes=batch.codes[keep]))

        codes = original(self, prompts, callback=partly, **settings)
        codes[failing] = -1
        return codes

    setattr_(ImageGenerator, "generate", generate)


def answer_questions(model, images, questions, *, template, **settings):
    rows = []
    for image, asked in zip(images, questions, strict=True):
        row = []
        for question in asked:
            template(question)
            rng = random.Random(hashlib.sha256(image.tobytes() + question.encode()).digest())
            p = 0.97 if rng.random() < 0.75 else 0.02
            row.append({"p_yes": p, "p_no": 0.99 - p, "answer": "yes" if p > 0.5 else "no"})
        rows.append(row)
    return rows


def install(setattr_=setattr) -> None:
    """Replace the model's own texts and answers by the script."""
    import ospo_fast.generation

    setattr_(ospo_fast.generation, "generate_text", generate_text)
    setattr_(ospo_fast.generation, "answer_questions", answer_questions)


def eager_maps(model, prompt, codes, columns, layers, before=0, heads=None):
    """Mean over layers, heads and columns of the full attention matrices of the unmodified model."""
    import torch

    module = model.module
    ids = model.image_prompt(prompt)
    own = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        embeds = torch.cat([model.embed_tokens(ids), model.embed_codes(codes)])[None]
        with torch.no_grad():
            out = model.decoder(inputs_embeds=embeds, use_cache=False, output_attentions=True)
    finally:
        module.set_attn_implementation(own)
    stack = torch.stack([out.attentions[layer][0] for layer in layers])
    stack = (stack if heads is None else stack[:, heads]).mean((0, 1))
    return torch.stack([stack[len(ids) - before : len(stack) - before, found].mean(-1) for found in columns]).reshape(
        -1, *model.grid
    )
