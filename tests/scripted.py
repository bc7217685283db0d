"""A tiny random Janus whose texts and answers follow a script, so that every stage has something to work on.

The script speaks the Shapes world's forms: it reads the last user message, answers as a well-taught model would, and
now and then says something useless. Images are the random model's own.
"""

import hashlib
import random
from pathlib import Path

import numpy as np

from ospo_fast.shapes import grammar
from ospo_fast.shapes.scenes import descriptions, parse


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """A random tiny model in `folder`, as `load_model` reads it.

    Its weights are larger than those of a fresh model, so that what it draws and attends to depends on the prompt.
    """
    import torch

    from ospo_fast.shapes.model import build_model, build_processor

    model = build_model(seed, hidden=32, layers=2, intermediate=48, heads=2)
    model.config.template_set = "shapes"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and ("language_model" in name or "generation_head" in name):
                weight.mul_(6)
    model.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


def reply(message: str, seed: int) -> str:
    """What the script says to the last user message."""
    head, _, rest = message.partition(" ")
    rng = np.random.default_rng(seed % 2**32)
    if rng.random() < 0.1:
        return "um"
    if head == "prompt":
        known = descriptions(rest)
        return grammar.stage1_answer(known[int(rng.integers(len(known)))])
    if head == "dense:":
        first, second = (parse(part) for part in rest.split(" / "))
        return grammar.densify_answer(*grammar.densify(first, second, rng))
    if head == "questions:":
        return grammar.questions_answer(parse(rest))
    return f"Contrastive Prompt: {grammar.perturb(parse(rest), head[:-1], 'attribute2', rng).text}"


def generate_text(model, prompts, *, seeds, **settings):
    texts = [model.detokenize(ids) for ids in prompts]
    return [reply(text.strip(), seed) for text, seed in zip(texts, seeds, strict=True)]


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
    """Put the script in place of the model's own texts and answers."""
    import ospo_fast.generation

    setattr_(ospo_fast.generation, "generate_text", generate_text)
    setattr_(ospo_fast.generation, "answer_questions", answer_questions)
