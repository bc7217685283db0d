"""Yes/no answers about images, and likelihoods of captions: one pass per image, then a short one per text behind it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

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
Logits = Callable[[Tensor], Tensor]
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
        split[question] = _split(model, ids)
    answers: list[list[Answer]] = [[{} for _ in group] for group in questions]
    asked = [
        [
            Continuation(*split[question], (answer, spellings))
            for question, answer, spellings in zip(
                questions[i], answers[i], expected[i] if expected else [()] * len(questions[i]), strict=True
            )
        ]
        for i in range(len(images))
    ]

    def read(logits: Logits, hidden: Tensor, given: list[tuple[Answer, Sequence[int]]]) -> None:
        wanted = [ids for _, spellings in given for ids in (model.yes_ids, model.no_ids, spellings)]
        probs = iter(_probabilities(logits(hidden[:, -1]), wanted))
        for (answer, _), p_yes, p_no, p_expected in zip(given, probs, probs, probs, strict=False):
            word = "yes" if p_yes > p_no else "no" if p_no > p_yes else "tie"
            answer.update(p_yes=p_yes, p_no=p_no, answer=word)
            if expected:
                answer["p_expected"] = p_expected

    continue_images(model, images, asked, read, words=1, unit="question", batch_size=batch_size, progress=progress)
    return answers


@torch.no_grad()
def caption_logprobs(
    model: UnifiedModel,
    images: Sequence[Image],
    captions: Sequence[Tensor],
    *,
    request: Tensor,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[float]:
    """Return the mean over the tokens of a caption of log p(token | image, request, tokens before), for each image.

    Args:
        model: from `load_model`.
        images: N images.
        captions: N × ids (S_n,) int64.
        request: ids of the request for a caption, from `model.chat(messages, image=True)`.
        batch_size: see `answer_questions`.
        progress: show a bar on stderr if it takes more than two seconds.

    Returns:
        N numbers, NaN where logits are not finite.

    Raises:
        UsageError: the numbers of images and captions differ, or a caption is empty or too long for the model.
        OspoError: one image does not fit the memory.

    """
    if len(images) != len(captions):
        raise UsageError(f"captions: got {len(captions)} for {len(images)} images, expected one for each image")
    check_batch_size(batch_size)
    prefix, before = _split(model, request)
    means = [math.nan] * len(images)
    asked = []
    for i, ids in enumerate(captions):
        if not len(ids):
            raise UsageError("captions: got an empty one, expected ids of at least one token")
        check_ids("caption", torch.cat([request, ids]), model, 1)
        asked.append([Continuation(prefix, (*before, *ids[:-1].tolist()), (i, ids))])

    def read(logits: Logits, hidden: Tensor, given: list[tuple[int, Tensor]]) -> None:
        for states, (i, ids) in zip(hidden, given, strict=False):
            # Image by image: the products of the head have one size, and fsum rounds once.
            logps = logits(states[-len(ids) :]).float().log_softmax(-1).cpu().gather(1, ids[:, None])
            means[i] = math.fsum(logps.flatten().tolist()) / len(ids) if logps.isfinite().all() else math.nan

    continue_images(model, images, asked, read, words=0, unit="caption", batch_size=batch_size, progress=progress)
    return means


class Continuation(NamedTuple):
    """Ids that follow an image: those up to its last placeholder, which rows can share, and those behind it."""

    prefix: tuple[int, ...]
    rest: tuple[int, ...]
    given: Any  # what `read` gets for it


def continue_images(
    model: UnifiedModel,
    images: Sequence[Image],
    asked: Sequence[Sequence[Continuation]],
    read: Callable[[Logits, Tensor, list[Any]], None],
    *,
    words: int,
    unit: str,
    batch_size: int | None,
    progress: bool,
) -> None:
    """Run every continuation of every image, and call `read` with their hidden states and what they give.

    read: gets the function of hidden states (…, D) → logits, the states (M, L, D) of the L ids of `rest`, and the
    `given` of M or fewer continuations: padding rows follow them.

    words: logits of a continuation that `read` computes, to be counted; 0: of all ids of `rest`.
    """
    if not any(asked):
        return
    decoder = build_decoder(model, text=True)
    longest = max(len(one.prefix) + len(one.rest) for group in asked for one in group)
    # Caches of an image and of a continuation; and half a cache that is being copied, or a pass.
    row_bytes = decoder.row_bytes(longest)
    item_bytes = 2 * row_bytes + max(row_bytes // 2, decoder.pass_bytes(longest))
    limit = BatchSizeLimit(
        batch_size or max_batch_size(decoder, item_bytes),
        "image",
        "free some, use a smaller dtype or shorter questions",
    )

    def padded(items: list[T]) -> list[T]:
        return items + items[:1] * (decoder.pad_rows(len(items), limit.max_size, row_bytes) - len(items))

    def run_batch(batch: list[int]) -> None:
        pixels = model.embed_images(padded([images[i] for i in batch]))
        count(seen=len(batch))
        rows = [(one, row) for row, i in enumerate(batch) for one in asked[i]]
        # All continuations with one prefix share the passes over the images. Their batches have rests of one length,
        # the longest first: if memory runs out, it does so early.
        rows.sort(key=lambda item: (item[0].prefix, len(item[0].rest)), reverse=True)
        for prefix, same_prefix in itertools.groupby(rows, lambda item: item[0].prefix):
            image_cache = _image_pass(model, decoder, prefix, pixels)
            count(tokens=len(batch) * len(prefix), attended=len(batch) * causal(len(prefix)))
            for length, same_length in itertools.groupby(same_prefix, lambda item: len(item[0].rest)):
                for part in plan_batches(list(same_length), None, limit.max_size):
                    ones, caches = zip(*padded(part), strict=True)
                    attended = len(part) * causal(length, before=len(prefix))
                    count(tokens=len(part) * length, attended=attended, words=len(part) * (words or length))
                    hidden = _continue(model, decoder, image_cache, caches, [one.rest for one in ones])
                    read(decoder.text_logits, hidden, [one.given for one, _ in part])

    from tqdm.auto import tqdm

    batches = [[i for i, group in enumerate(asked) if group]]
    total = sum(map(len, asked))
    with eval_mode(model), tqdm(total=total, unit=unit, delay=2, disable=not progress) as bar:
        for batch, _ in limit.run(batches, run_batch):
            bar.update(sum(len(asked[i]) for i in batch))


def _split(model: UnifiedModel, ids: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of a chat up to its last placeholder of an image, and those behind it."""
    numbers = ids.tolist()
    cut = len(numbers) - numbers[::-1].index(model.image_id)
    return tuple(numbers[:cut]), tuple(numbers[cut:])


def _image_pass(model: UnifiedModel, decoder: Decoder, prefix: Sequence[int], pixels: Tensor) -> Cache:
    """Run a prefix with embedded images (N, T, D) in place of its image tokens → the cache of N rows."""
    ids = torch.tensor(prefix, device=decoder.device)
    x = model.embed_tokens(ids[None]).expand(len(pixels), -1, -1).clone()
    x[:, ids == model.image_id] = pixels.to(x.dtype)
    cache = Cache(decoder, len(pixels), len(prefix))
    decoder(x, cache, 0)
    return cache


def _continue(
    model: UnifiedModel, decoder: Decoder, image_cache: Cache, rows: Sequence[int], rests: Sequence[Sequence[int]]
) -> Tensor:
    """Run rests of one length L behind rows of the image cache → their hidden states (M, L, D)."""
    start = image_cache.keys.shape[3]
    cache = Cache(decoder, len(rows), start + len(rests[0]))
    cache.copy(slice(None), image_cache, torch.tensor(rows, device=decoder.device), start)
    return decoder(model.embed_tokens(torch.tensor(rests, device=decoder.device)), cache, start)


def _probabilities(logits: Tensor, wanted: Sequence[Sequence[int]]) -> list[float]:
    """Return the largest probability of each list of ids, under logits (M, V).

    wanted: three lists for each of the first rows; the largest of none is 0.
    """
    probs = logits.float().softmax(-1)
    width = max(map(len, wanted))
    # The first id fills up the list, which changes no maximum.
    ids = torch.tensor([[*group, *[group[0] if group else 0] * (width - len(group))] for group in wanted])
    rows = len(wanted) // 3
    found = probs[:rows].gather(1, ids.to(probs.device).view(rows, -1)).view(len(wanted), width).amax(1).tolist()
    return [value if group else 0.0 for value, group in zip(found, wanted, strict=True)]
