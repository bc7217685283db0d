"""Yes/no answers about images: one pass per image, then a short one per question behind it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ospo_fast.cost import causal
from ospo_fast.errors import UsageError
from ospo_fast.generation.decoder import Cache, Decoder
from ospo_fast.generation.engine import eval_mode
from ospo_fast.generation.module_decoder import build_decoder
from ospo_fast.generation.requests import max_batch_size, plan_batches
from ospo_fast.generation.validation import check_batch_size, check_ids
from ospo_fast.models.base import Message, UnifiedModel
from ospo_fast.oom import BatchSizeLimit
from ospo_fast.work import count

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
Answer = dict[str, Any]
"""{"p_yes": float, "p_no": float, "answer": "yes" | "no" | "tie"}"""


@torch.no_grad()
def answer_questions(
    model: UnifiedModel,
    images: Sequence[Image],
    questions: Sequence[Sequence[str]],
    *,
    template: Callable[[str], list[Message] | Tensor],
    expected: Sequence[Sequence[Sequence[int]]] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[list[Answer]]:
    """Answer yes/no questions about each image.

    p_yes is the largest probability among the spellings in `model.yes_ids`, under the softmax over the whole text
    vocabulary at the last position; p_no that of `model.no_ids`. answer is the larger one, "tie" if they are equal or
    not finite.

    Args:
        model: from `load_model`.
        images: N images.
        questions: N lists of questions; they may be empty.
        template: question → chat messages, where the image goes to the start of the last user message; or the token
            ids that `model.chat(messages, image=True)` returned for them.
        expected: for each question the ids of the spellings of an answer. Its probability, that of the likeliest
            spelling, becomes the entry `p_expected`.
        batch_size: images per batch, and questions per batch; by default as many as are useful and fit the memory.
        progress: show a bar on stderr if it takes more than two seconds.

    Returns:
        N lists of {"p_yes", "p_no", "answer"}, in the order of the questions; see `expected`.

    Raises:
        UsageError: the numbers of images and lists differ, or a question is empty or too long for the model.
        OspoError: one image does not fit the memory.

    """
    if len(images) != len(questions):
        raise UsageError(f"questions: got {len(questions)} lists for {len(images)} images, expected one list per image")
    check_batch_size(batch_size)
    split: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for question in dict.fromkeys(q for group in questions for q in group):
        if not question.strip():
            raise UsageError("questions: got an empty question")
        chat = template(question)
        ids = chat if isinstance(chat, Tensor) else model.chat(chat, image=True)
        check_ids(f"question {question[:60]!r}", ids, model, 1)
        numbers = ids.tolist()
        cut = len(numbers) - numbers[::-1].index(model.image_id)
        split[question] = tuple(numbers[:cut]), tuple(numbers[cut:])
    answers: list[list[Answer]] = [[{} for _ in group] for group in questions]
    if not split:
        return answers
    decoder = build_decoder(model, text=True)
    longest = max(len(prefix) + len(rest) for prefix, rest in split.values())
    # Caches of an image and of a question; and half a cache that is being copied, or a pass.
    row_bytes = decoder.row_bytes(longest)
    item_bytes = 2 * row_bytes + max(row_bytes // 2, decoder.pass_bytes(longest))
    limit = BatchSizeLimit(
        batch_size or max_batch_size(decoder, item_bytes),
        "image",
        "free some, use a smaller dtype or shorter questions",
    )

    def padded(items: list[T]) -> list[T]:
        return items + items[:1] * (decoder.pad_rows(len(items), limit.max_size, row_bytes) - len(items))

    def answer_batch(batch: list[int]) -> None:
        pixels = model.embed_images(padded([images[i] for i in batch]))
        count(seen=len(batch))
        asked = [
            (*split[question], row, answer, spellings)
            for row, i in enumerate(batch)
            for question, answer, spellings in zip(
                questions[i], answers[i], expected[i] if expected else [()] * len(questions[i]), strict=True
            )
        ]
        # All questions with one prefix share the passes over the images. Their batches have rests of one length, the
        # longest first: if memory runs out, it does so early.
        asked.sort(key=lambda item: (item[0], len(item[1])), reverse=True)
        for prefix, same_prefix in itertools.groupby(asked, lambda item: item[0]):
            image_cache = _image_pass(model, decoder, prefix, pixels)
            count(tokens=len(batch) * len(prefix), attended=len(batch) * causal(len(prefix)))
            for _, same_length in itertools.groupby(same_prefix, lambda item: len(item[1])):
                for part in plan_batches(list(same_length), None, limit.max_size):
                    _, rests, rows, found, spellings = zip(*padded(part), strict=True)
                    length = len(rests[0])
                    attended = len(part) * causal(length, before=len(prefix))
                    count(tokens=len(part) * length, attended=attended, words=len(part))
                    wanted = [ids for group in spellings for ids in (model.yes_ids, model.no_ids, group)]
                    probs = iter(_probabilities(model, decoder, image_cache, rows, rests, wanted))
                    for answer, p_yes, p_no, p_expected in zip(found, probs, probs, probs, strict=True):
                        word = "yes" if p_yes > p_no else "no" if p_no > p_yes else "tie"
                        answer.update(p_yes=p_yes, p_no=p_no, answer=word)
                        if expected:
                            answer["p_expected"] = p_expected

    from tqdm.auto import tqdm

    batches = [[i for i, group in enumerate(questions) if group]]
    total = sum(map(len, questions))
    with eval_mode(model), tqdm(total=total, unit="question", delay=2, disable=not progress) as bar:
        for batch, _ in limit.run(batches, answer_batch):
            bar.update(sum(len(questions[i]) for i in batch))
    return answers


def _image_pass(model: UnifiedModel, decoder: Decoder, prefix: Sequence[int], pixels: Tensor) -> Cache:
    """Run a prefix with embedded images (N, T, D) in place of its image tokens → the cache of N rows."""
    ids = torch.tensor(prefix, device=decoder.device)
    x = model.embed_tokens(ids[None]).expand(len(pixels), -1, -1).clone()
    x[:, ids == model.image_id] = pixels.to(x.dtype)
    cache = Cache(decoder, len(pixels), len(prefix))
    decoder(x, cache, 0)
    return cache


def _probabilities(
    model: UnifiedModel,
    decoder: Decoder,
    image_cache: Cache,
    rows: Sequence[int],
    rests: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
) -> list[float]:
    """Run the rests of questions, of one length, behind rows of the image cache → the largest probability of each list.

    wanted: lists of ids, as many for each question; the largest of none is 0.
    """
    start = image_cache.keys.shape[3]
    cache = Cache(decoder, len(rows), start + len(rests[0]))
    cache.copy(slice(None), image_cache, torch.tensor(rows, device=decoder.device), start)
    hidden = decoder(model.embed_tokens(torch.tensor(rests, device=decoder.device)), cache, start)[:, -1]
    probs = decoder.text_logits(hidden).float().softmax(-1)
    width = max(map(len, wanted))
    # The first id fills up the list, which changes no maximum.
    ids = torch.tensor([[*group, *[group[0] if group else 0] * (width - len(group))] for group in wanted])
    found = probs.gather(1, ids.to(probs.device).view(len(rows), -1)).view(len(wanted), width).amax(1).tolist()
    return [value if group else 0.0 for value, group in zip(found, wanted, strict=True)]
