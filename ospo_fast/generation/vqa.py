"""Yes/no answers about images: one pass per image, then a short one per question on top of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ospo_fast.errors import UsageError
from ospo_fast.generation.decoder import Cache, InferenceDecoder
from ospo_fast.generation.requests import by_length, check_batch_size, check_ids, eval_mode, max_batch_size, run_batches
from ospo_fast.models.base import Message, UnifiedModel
from ospo_fast.oom import BatchSizeLimit

if TYPE_CHECKING:
    from PIL.Image import Image

Answer = dict[str, Any]
"""{"p_yes": float, "p_no": float, "answer": "yes" | "no" | "tie"}"""


@torch.no_grad()
def answer_questions(
    model: UnifiedModel,
    images: Sequence[Image],
    questions: Sequence[Sequence[str]],
    *,
    template: Callable[[str], list[Message]],
    batch_size: int | None = None,
    progress: bool = True,
) -> list[list[Answer]]:
    """What the model answers to each image's questions.

    p_yes = the largest probability, under the softmax over the whole text vocabulary at the last position, of the
    spellings in `model.yes_ids`; p_no likewise. answer: the larger one, "tie" where they are equal or not finite.

    Args:
        model: from `load_model`.
        images: N images.
        questions: N lists of questions, empty ones allowed.
        template: question → chat messages; the image goes to the start of the last user message.
        batch_size: images, and then questions, run at once; by default as many as are useful and fit the memory.
        progress: a bar on stderr for what takes more than two seconds.

    Returns:
        N lists of {"p_yes", "p_no", "answer"}, in the order of the questions.

    Raises:
        UsageError: other numbers of images and question lists, a question too long for the model.

    """
    if len(images) != len(questions):
        raise UsageError(f"questions: got {len(questions)} lists for {len(images)} images, expected one list per image")
    check_batch_size(batch_size)
    # Ids up to the end of the image, and the rest: all questions with the same beginning share an image's first pass.
    split: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for question in dict.fromkeys(q for asked in questions for q in asked):
        if not question.strip():
            raise UsageError("questions: got an empty question")
        ids = model.chat(template(question), image=True)
        check_ids(f"question {question[:60]!r}", ids, model, 1)
        plain = ids.tolist()
        cut = len(plain) - plain[::-1].index(model.image_id)
        split[question] = (tuple(plain[:cut]), tuple(plain[cut:]))
    answers: list[list[Answer]] = [[{} for _ in asked] for asked in questions]
    pictured = [i for i, asked in enumerate(questions) if asked]
    if not pictured:
        return answers
    decoder = InferenceDecoder(model)
    longest = max(len(prefix) + len(rest) for prefix, rest in split.values())
    decoder.positions(longest)
    # The caches of an image and of a question, and beside them half a cache on its way or a pass.
    cached = decoder.row_bytes(longest)
    size = batch_size or max_batch_size(decoder, 2 * cached + max(cached // 2, decoder.pass_bytes(longest)))

    def work(batch: list[int], size: int) -> list[tuple[int, int, float, float]]:
        asked = [(i, j, *split[q]) for i in batch for j, q in enumerate(questions[i])]
        return _answer(model, decoder, images, batch, asked, size)

    limit = BatchSizeLimit(size, "image", "free some, use a smaller dtype or shorter questions")
    total = sum(len(asked) for asked in questions)
    with eval_mode(model), tqdm(total=total, unit="question", delay=2, disable=not progress) as bar:
        for _, found in run_batches(by_length(pictured, lambda _: 0, size), work, limit):
            for i, j, p_yes, p_no in found:
                answer = "yes" if p_yes > p_no else "no" if p_no > p_yes else "tie"
                answers[i][j] = {"p_yes": p_yes, "p_no": p_no, "answer": answer}
            bar.update(len(found))
    return answers


def _answer(
    model: UnifiedModel,
    decoder: InferenceDecoder,
    images: Sequence[Image],
    batch: list[int],
    asked: list[tuple[int, int, tuple[int, ...], tuple[int, ...]]],
    size: int,
) -> list[tuple[int, int, float, float]]:
    """(image, question, p_yes, p_no) of all questions about the images of a batch."""
    device = decoder.device
    longest = max(len(prefix) + len(rest) for _, _, prefix, rest in asked)
    rows = decoder.pad_rows(len(batch), size, decoder.row_bytes(longest))
    shown = [images[i] for i in batch]
    pixels = model.embed_images(shown + shown[:1] * (rows - len(shown)))  # (rows, T, D)
    place = {i: row for row, i in enumerate(batch)}
    yes, no = (torch.tensor(ids, device=device) for ids in (model.yes_ids, model.no_ids))
    found: list[tuple[int, int, float, float]] = []

    by_prefix: dict[tuple[int, ...], list[tuple[int, int, tuple[int, ...]]]] = defaultdict(list)
    for i, j, prefix, rest in asked:
        by_prefix[prefix].append((i, j, rest))
    for prefix, group in by_prefix.items():
        start = len(prefix)
        seen = _with_images(model, torch.tensor(prefix, device=device), pixels)
        first = Cache(decoder, rows, start)
        decoder(seen, first, 0)
        for part in by_length(group, lambda job: len(job[2]), size):
            count = decoder.pad_rows(len(part), size, decoder.row_bytes(longest))
            full = part + part[:1] * (count - len(part))
            cache = Cache(decoder, count, start + len(part[0][2]))
            cache.copy_rows(first, torch.tensor([place[i] for i, _, _ in full], device=device), start)
            ids = torch.tensor([rest for _, _, rest in full], device=device)
            hidden = decoder(model.embed_tokens(ids), cache, start)[:, -1]
            probs = decoder.run_padded(model.text_logits, hidden).float().softmax(-1)
            p_yes, p_no = (probs[:, words].amax(1).tolist() for words in (yes, no))
            found.extend((i, j, p, q) for (i, j, _), p, q in zip(part, p_yes, p_no, strict=False))
    return found


def _with_images(model: UnifiedModel, prefix: Tensor, pixels: Tensor) -> Tensor:
    """Embeddings (N, S, D) of a prefix with one image in it, for N images."""
    x = model.embed_tokens(prefix).expand(len(pixels), -1, -1).clone()
    x[:, prefix == model.image_id] = pixels.to(x.dtype)
    return x
