"""Stage 5, first part: preference pairs of a chosen and a rejected image."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ospo_fast.config import Config, SelectConfig
from ospo_fast.errors import Failure, UsageError, attempt
from ospo_fast.models.base import UnifiedModel
from ospo_fast.records import (
    ImageVerdict,
    Pair,
    Record,
    chunked,
    image_variants,
    image_verdicts,
    map_images,
    stable_hash,
)
from ospo_fast.stages import StageContext

CHUNK = 64  # items between two writes to the store
RULES = ("v3", "v2", "best", "likeliest", "random")
BY_SCORE = ("best", "likeliest")  # rules without a filter
Image = Mapping[str, Any]  # an entry of base_metadata or negative_metadata
LogProbs = Callable[[Sequence[str]], "Sequence[float] | Failure"]


class Verdict(NamedTuple):
    """Whether an image may be in a pair, and why."""

    kept: bool
    reason: str


def base_verdict(image: Image, rule: str = "v3", settings: SelectConfig | None = None) -> Verdict:
    """Decide whether a base image may be chosen.

    v3: at least one answer is yes and local_score ≥ threshold. v2: no answer is no and every p_yes − p_no > margin.
    best: every image with answers. likeliest: every image with a score that is not of answers. random: always, except
    for an image that could not be read. By v3 and v2 one without answers may not be chosen.
    """
    if rule == "random":
        return _unfiltered(image)
    if rule in BY_SCORE:
        return _scored(image, rule)
    settings, answers = settings or SelectConfig(), _answers(image)
    if not answers:
        return _unanswered(image)
    if rule == "v2":
        if "no" in answers:
            return Verdict(False, "an answer is no")
        margin = min(answer["p_yes"] - answer["p_no"] for answer in image["answer_metadata"])
        if not margin > settings.margin:
            return Verdict(False, f"a margin of {margin:.2f}, not above {settings.margin:g}")
        return Verdict(True, "every answer is a clear yes")
    if "yes" not in answers:
        return Verdict(False, "no answer is yes")
    kept, reason = image["local_score"] >= settings.threshold, f"local score {image['local_score']:.2f}"
    return Verdict(kept, reason if kept else f"{reason} below {settings.threshold:g}")


def negative_verdict(image: Image, rule: str = "v3", settings: SelectConfig | None = None) -> Verdict:
    """Decide whether an image of a hard negative may be rejected.

    v3: at least one answer is not yes (a tie is not yes). v2: some p_no − p_yes > margin. best: every image with a
    score. random: always, except for an image that could not be read. By v3 and v2 one without answers may not be
    rejected.
    """
    if rule == "random":
        return _unfiltered(image)
    if rule in BY_SCORE:
        return _scored(image, rule)
    settings, answers = settings or SelectConfig(), _answers(image)
    if not answers:
        return _unanswered(image)
    if rule == "v2":
        margin = max(answer["p_no"] - answer["p_yes"] for answer in image["answer_metadata"])
        return Verdict(margin > settings.margin, f"clearest no has a margin of {margin:.2f}")
    wrong = sum(answer != "yes" for answer in answers)
    return Verdict(wrong > 0, f"{wrong} of {len(answers)} answers are not yes")


def _answers(image: Image) -> list[str]:
    return [str(answer["answer"]).strip().lower() for answer in image.get("answer_metadata") or []]


def _unfiltered(image: Image) -> Verdict:
    failed = image.get("reason") if image.get("kept") is None else None  # of the stage score, and not of a selection
    return Verdict(False, failed) if failed else Verdict(True, "no filter")


def _scored(image: Image, rule: str) -> Verdict:
    score, answered = image.get("local_score"), bool(_answers(image))
    if score is None or (rule == "best" and not answered):
        return _unanswered(image) if rule == "best" else Verdict(False, image.get("reason") or "no score")
    if rule == "likeliest" and answered:
        return Verdict(False, "its score is that of answers; run the stage score again")
    return Verdict(True, f"score {score:.2f}")


def _unanswered(image: Image) -> Verdict:
    return Verdict(False, image.get("reason") or "no question was answered")


def select_pair(
    record: Mapping[str, Any],
    rule: str = "v3",
    rng: random.Random | int | None = None,
    *,
    settings: SelectConfig | None = None,
    logprobs: LogProbs | None = None,
) -> Pair | None:
    """Select the preference pair of a record in the official VQA format; None if no pair is left.

    Args:
        record: `base_metadata` and `negative_metadata`, each {"base_0": {"path", "local_score", "answer_metadata"}, …}.
        rule: "v3": images filtered by `base_verdict` and `negative_verdict`; pairs are of one variant (see
            `records.image_variants`); the pair of highest base score, the first of equals. "v2": the highest base score
            of all; rejected is the negative whose mean log-probability under the base prompt is nearest to the
            chosen's. "best", "likeliest": as v3, of all images with a score. "random": any pair of one variant.
        rng: the generator, or its seed, for "random".
        settings: thresholds, and where the rejected image comes from; the published ones by default.
        logprobs: paths → mean log-probability of each image under the base prompt; "v2" needs it where more than one
            negative is left.

    Returns:
        chosen and rejected (paths), chosen_score and rejected_score.

    Raises:
        UsageError: an unknown rule, or "v2" without `logprobs` where they decide.

    """
    if rule not in RULES:
        raise UsageError(f"select_pair: rule should be one of {', '.join(RULES)}, got {rule!r}.")
    pair = _select(record, rule, settings or SelectConfig(), rng, logprobs)
    return None if isinstance(pair, Failure) else pair


def _select(
    record: Mapping[str, Any],
    rule: str,
    settings: SelectConfig,
    rng: random.Random | int | None,
    logprobs: LogProbs | None,
) -> Pair | Failure:
    variants = image_variants(record)
    if settings.rejected == "lowest" and rule != "random":
        return _own_pair(record, rule, settings)
    if settings.rejected == "own" and rule != "random" and isinstance(pair := _own_pair(record, rule, settings), dict):
        return pair
    bases = _passing(_images(record, "base"), partial(base_verdict, rule=rule, settings=settings))
    negatives = _passing(_images(record, "negative"), partial(negative_verdict, rule=rule, settings=settings))
    if not bases:
        reasons = [base_verdict(image, rule, settings).reason for image in _images(record, "base").values()]
        return Failure("no base image passed: " + "; ".join(dict.fromkeys(reasons)))
    if not negatives:
        return Failure("no negative image shows a difference")
    if rule == "v2":
        return _nearest_pair(_best(bases), list(negatives.values()), logprobs)
    partners: dict[int | str, Image] = {}  # the first of each variant
    for name, negative in negatives.items():
        partners.setdefault(variants["negative", name].key, negative)
    keyed = [(variants["base", name].key, base) for name, base in bases.items()]
    shared = [(base, partners[key]) for key, base in keyed if key in partners]
    if not shared:
        return Failure("no variant has both images left")
    if rule == "random":
        return _pair(*(rng if isinstance(rng, random.Random) else random.Random(rng)).choice(shared))
    return _pair(*max(shared, key=lambda pair: float(pair[0]["local_score"])))


def _images(record: Mapping[str, Any], role: str) -> Mapping[str, Image]:
    images: Mapping[str, Image] = record.get(f"{role}_metadata") or {}
    return images


def _passing(images: Mapping[str, Image], judge: Callable[[Image], Verdict]) -> dict[str, Image]:
    return {name: image for name, image in images.items() if judge(image).kept}


def _best(images: Mapping[str, Image]) -> Image:
    return max(images.values(), key=lambda image: float(image["local_score"]))


def _own_pair(record: Mapping[str, Any], rule: str, settings: SelectConfig) -> Pair | Failure:
    """The best of the base images, and the worst of the others: of the wrong ones, or of all with a score (lowest).

    By a rule without a filter, where nothing else judges the images, the scores have to differ.
    """
    images, lowest = _images(record, "base"), settings.rejected == "lowest"
    bases = _passing(images, partial(base_verdict, rule=rule, settings=settings))
    if not bases:
        return Failure("no base image passed")
    best = _best(bases)
    wrong = _passing(images, partial(negative_verdict, rule=rule, settings=settings))
    scored = {name: image for name, image in images.items() if image.get("local_score") is not None}
    others = [image for image in (scored if lowest else wrong).values() if image is not best]
    if not others:
        return Failure("there is no other base image with a score" if lowest else "no other base image is wrong")
    worst = min(others, key=lambda image: float(image["local_score"]))
    if rule in BY_SCORE and not float(worst["local_score"]) < float(best["local_score"]):
        return Failure("no other base image has a lower score")
    return _pair(best, worst)


def _nearest_pair(chosen: Image, negatives: list[Image], logprobs: LogProbs | None) -> Pair | Failure:
    """The negative of nearest log-probability, by the rule v2."""
    if len(negatives) == 1:
        return _pair(chosen, negatives[0])
    if logprobs is None:
        raise UsageError("select_pair: rule 'v2' chooses by log-probability; give `logprobs`, or take rule 'v3'.")
    values = logprobs([image["path"] for image in (chosen, *negatives)])
    if isinstance(values, Failure):
        return values
    gaps = [abs(value - values[0]) for value in values[1:]]
    return _pair(chosen, negatives[gaps.index(min(gaps))])


def _pair(chosen: Image, rejected: Image) -> Pair:
    return {
        "chosen": chosen["path"],
        "rejected": rejected["path"],
        "chosen_score": chosen.get("local_score", 0.0),
        "rejected_score": rejected.get("local_score", 0.0),
    }


def run(
    records: Iterable[Record],
    model: UnifiedModel | None,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Add `kept`, and either up to `select.pairs` `pairs` or the `reason` for none.

    The entry of each image gets `kept` and `reason`. Rule "v2" needs a model for log-probabilities, and
    `select.rejected_prompt=asked` for `rejected_prompts.choose_rejected_prompts`. Both make no pair of an item whose
    prompt is too long for the model or whose images cannot be read.
    """
    for part in chunked(records, CHUNK):
        selected = [_select_item(record, model, config, out) for record in part]
        if config.select.rejected_prompt == "asked" and model is not None:
            from ospo_fast.stages.rejected_prompts import choose_rejected_prompts

            selected = choose_rejected_prompts(selected, model, config, out)
        yield from selected


def _select_item(record: Record, model: UnifiedModel | None, config: Config, out: Path | None) -> Record:
    settings = config.select
    if not record.get("base_metadata"):
        reasons = dict.fromkeys(reason for reason in record.get("variant_reasons") or [] if reason)
        reason = "no image: " + ("; ".join(reasons) or "no variant was generated")
        return {**record, "kept": False, "reason": reason}
    # A record of others can have the answers alone.
    answered = record.get("question") is None and any(
        image.get("answer_metadata") for *_, image in image_verdicts(record)
    )
    if not (record.get("question") or answered) and settings.rule not in ("likeliest", "random"):
        return {**record, "kept": False, "reason": record.get("question_reason") or "the item has no question"}
    logprobs = None if model is None else partial(_logprobs, record["prompt"], model, config, out)
    rng = random.Random(stable_hash(config.seed, "select", record["item_id"]))
    pairs = _select_pairs(record, settings, rng, logprobs)
    judged = map_images(record, partial(_judge, settings))
    if isinstance(pairs, Failure):
        return {**judged, "kept": False, "reason": pairs.reason}
    return {**judged, "kept": True, "pairs": pairs}


def _judge(settings: SelectConfig, role: str, name: str, image: ImageVerdict) -> ImageVerdict:
    kept, reason = (base_verdict if role == "base" else negative_verdict)(image, settings.rule, settings)
    return {**image, "kept": kept, "reason": reason}


def _select_pairs(
    record: Record, settings: SelectConfig, rng: random.Random, logprobs: LogProbs | None
) -> list[Pair] | Failure:
    """Return up to `settings.pairs` pairs of different images, or a Failure if there is none."""
    pairs: list[Pair] = []
    rest = record  # the images in no pair yet
    while len(pairs) < settings.pairs:
        if pairs and settings.rejected == "own" and settings.rule != "random":
            pair = _own_pair(rest, settings.rule, settings)
        else:
            pair = _select(rest, settings.rule, settings, rng, logprobs)
        if isinstance(pair, Failure):
            return pairs or pair
        if (prompt := _rejected_prompt(record, pair["rejected"])) is not None:
            pair["rejected_prompt"] = prompt
        pairs.append(pair)
        rest = map_images(rest, partial(_unless_used, (pair["chosen"], pair["rejected"])))
    return pairs


def _rejected_prompt(record: Record, path: str) -> str | None:
    """Return the hard negative of the variant of a rejected image; None where the record does not tell it."""
    prompts, variants = record.get("negative_prompt") or [], image_variants(record)
    # A path may be that of an image of each role: the rejected one is of the hard negative.
    entry = next((role, name) for role, name, image in reversed([*image_verdicts(record)]) if image["path"] == path)
    number = variants[entry].number
    return prompts[number] if number is not None and number < len(prompts) else None


def _unless_used(paths: tuple[str, str], role: str, name: str, image: ImageVerdict) -> ImageVerdict | None:
    return None if image["path"] in paths else image


def _logprobs(
    prompt: str, model: UnifiedModel, config: Config, out: Path | None, paths: Sequence[str]
) -> list[float] | Failure:
    from ospo_fast.stages.image_files import image_codes, locate_image, stack_codes
    from ospo_fast.stages.prompt_files import image_prompt_ids
    from ospo_fast.stages.teacher_forcing import mean_logprobs

    ids = image_prompt_ids(model, prompt)
    if isinstance(ids, Failure):
        return ids
    codes = stack_codes(image_codes(model, [attempt(locate_image, path, out, config.read_from) for path in paths]))
    if isinstance(codes, Failure):
        return codes
    return mean_logprobs(model, [ids] * len(codes), codes, batch_size=config.select.batch_size)


def failure(record: Record) -> Failure | None:
    """Return None: an item without a pair is a decision, not a failure."""
    return None
