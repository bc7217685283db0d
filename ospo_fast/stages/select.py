"""Stage 5, first part: which base image and which near miss make a preference pair."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ospo_fast.config import Config, SelectConfig
from ospo_fast.errors import Failure, OspoError, UsageError
from ospo_fast.records import FurtherPair, ImageVerdict, Record, image_index, stable_hash, variant_index
from ospo_fast.stages import StageContext

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel

RULES = ("v3", "v2", "random")
LogProbs = Callable[[Sequence[str]], Sequence[float]]


class Pair(TypedDict):
    """The images of a pair (paths as in the record) and their local scores."""

    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float


def _evidence(verdict: Mapping[str, Any], rule: str) -> list[str] | tuple[bool, str]:
    """The answers that an image is judged by; the judgement itself where none count or there are none."""
    if rule == "random":
        return True, "no filter"
    answers = [str(answer["answer"]).strip().lower() for answer in verdict.get("answer_metadata", [])]
    return answers or (False, verdict.get("reason") or "no question was answered")


def base_verdict(
    verdict: Mapping[str, Any], rule: str = "v3", settings: SelectConfig | None = None
) -> tuple[bool, str]:
    """Whether a base image may be chosen, and why or why not.

    v3: at least one answer is yes and local_score ≥ threshold. v2: no answer is no and every p_yes − p_no > margin.
    random: always. An image without answers may not be chosen (v3, v2).
    """
    settings = settings or SelectConfig()
    answers = _evidence(verdict, rule)
    if isinstance(answers, tuple):
        return answers
    if rule == "v2":
        if "no" in answers:
            return False, "an answer is no"
        margins = [answer["p_yes"] - answer["p_no"] for answer in verdict["answer_metadata"]]
        if not min(margins) > settings.margin:
            return False, f"a margin of {min(margins):.2f}, not above {settings.margin:g}"
        return True, "every answer is a clear yes"
    if "yes" not in answers:
        return False, "no answer is yes"
    score = verdict["local_score"]
    if not score >= settings.threshold:
        return False, f"local score {score:.2f} below {settings.threshold:g}"
    return True, f"local score {score:.2f}"


def negative_verdict(
    verdict: Mapping[str, Any], rule: str = "v3", settings: SelectConfig | None = None
) -> tuple[bool, str]:
    """Whether a near miss may be rejected, and why or why not.

    v3: at least one answer is not yes (a tie is not yes). v2: some p_no − p_yes > margin. random: always.
    """
    settings = settings or SelectConfig()
    answers = _evidence(verdict, rule)
    if isinstance(answers, tuple):
        return answers
    if rule == "v2":
        margin = max(answer["p_no"] - answer["p_yes"] for answer in verdict["answer_metadata"])
        return margin > settings.margin, f"clearest no has a margin of {margin:.2f}"
    wrong = sum(answer != "yes" for answer in answers)
    return wrong > 0, f"{wrong} of {len(answers)} answers are not yes"


def select_pair(
    record: Mapping[str, Any],
    rule: str = "v3",
    rng: random.Random | int | None = None,
    *,
    settings: SelectConfig | None = None,
    logprobs: LogProbs | None = None,
) -> Pair | None:
    """The preference pair of a record in the official VQA format, or None when no pair is left.

    Args:
        record: `base_metadata` and `negative_metadata`, each {"base_0": {"path", "local_score", "answer_metadata"}, …}.
        rule: "v3": images filtered by `base_verdict` and `negative_verdict`; pairs are of one variant; the pair
            of highest base score, the first of equals. "v2": the highest base score of all; rejected is the negative
            whose mean log-probability under the base prompt lies nearest the chosen's. "random": any index.
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
    if settings is not None and settings.rejected == "own" and rule != "random":
        pair = _own(record, rule, settings)
        if pair is not None:
            return pair
    bases = _kept(record["base_metadata"], lambda verdict: base_verdict(verdict, rule, settings))
    negatives = _kept(record["negative_metadata"], lambda verdict: negative_verdict(verdict, rule, settings))
    if rule == "v2":
        return _nearest(bases, negatives, logprobs)
    shared = {index: variant for index in bases if (variant := variant_index(index, record)) in negatives}
    if not shared:
        return None
    if rule == "random":
        generator = rng if isinstance(rng, random.Random) else random.Random(rng)
        index = generator.choice(list(shared))
    else:
        index = max(shared, key=lambda i: bases[i]["local_score"])
    return _pair(bases[index], negatives[shared[index]])


def _kept(
    verdicts: Mapping[str, Mapping[str, Any]], judge: Callable[[Mapping[str, Any]], tuple[bool, str]]
) -> dict[int, Mapping[str, Any]]:
    kept: dict[int, Mapping[str, Any]] = {}
    for name, verdict in verdicts.items():
        if judge(verdict)[0]:
            kept[image_index(name)] = verdict
    return kept


def _own(record: Mapping[str, Any], rule: str, settings: SelectConfig) -> Pair | None:
    """The best of the base images and the worst of the others that are wrong."""
    bases = _kept(record["base_metadata"], lambda verdict: base_verdict(verdict, rule, settings))
    wrong = _kept(record["base_metadata"], lambda verdict: negative_verdict(verdict, rule, settings))
    if not bases:
        return None
    best = max(bases, key=lambda i: bases[i]["local_score"])
    others = [verdict for index, verdict in wrong.items() if index != best]
    return _pair(bases[best], min(others, key=lambda verdict: float(verdict["local_score"]))) if others else None


def _pair(chosen: Mapping[str, Any], rejected: Mapping[str, Any]) -> Pair:
    return {
        "chosen": chosen["path"],
        "rejected": rejected["path"],
        "chosen_score": chosen.get("local_score", 0.0),
        "rejected_score": rejected.get("local_score", 0.0),
    }


def _nearest(
    bases: Mapping[int, Mapping[str, Any]], negatives: Mapping[int, Mapping[str, Any]], logprobs: LogProbs | None
) -> Pair | None:
    if not bases or not negatives:
        return None
    chosen = max(bases.values(), key=lambda verdict: float(verdict["local_score"]))
    candidates = list(negatives.values())
    if len(candidates) == 1:
        return _pair(chosen, candidates[0])
    if logprobs is None:
        raise UsageError("select_pair: rule 'v2' chooses by log-probability; give `logprobs`, or take rule 'v3'.")
    first, *rest = logprobs([chosen["path"], *(verdict["path"] for verdict in candidates)])
    gaps = [abs(value - first) for value in rest]
    return _pair(chosen, candidates[gaps.index(min(gaps))])


def run(
    records: Iterable[Record],
    model: UnifiedModel | None,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Every record with `kept`, and either the pair (chosen, rejected, scores, rejected_prompt) or a `reason`.

    Pairs after the first, where `select.pairs` asks for more, are in `further_pairs`.

    Each image's entry gets `kept` and `reason`. Rule "v2" needs a model, for the log-probabilities; an item whose
    prompt is too long for it, or whose images cannot be read, has no pair.
    """
    settings = config.select
    for record in records:
        if not record.get("base_metadata"):
            yield {**record, "kept": False, "reason": "no image: " + _why_no_image(record)}
            continue
        if not record.get("question") and settings.rule != "random":
            why = record.get("question_reason") or "no question could be read from the model's answer"
            yield {**record, "kept": False, "reason": why}
            continue
        judged = _judged(record, settings)
        logprobs = None if model is None else _logprobs_of(record["prompt"], model, settings.batch_size, out)
        rng = random.Random(stable_hash(config.seed, "select", record["item_id"]))
        try:
            pairs = _pairs(record, settings, rng, logprobs)
        except _NoLogProbsError as error:
            yield {**judged, "kept": False, "reason": str(error)}
            continue
        if not pairs:
            yield {**judged, "kept": False, "reason": _why_no_pair(judged, settings.rule)}
            continue
        first, *further = pairs
        kept: Record = {**judged, "kept": True, **first}
        if further:
            kept["further_pairs"] = further
        yield kept


def _pairs(record: Record, settings: SelectConfig, rng: random.Random, logprobs: LogProbs | None) -> list[FurtherPair]:
    """Up to `settings.pairs` pairs of an item, each image in one of them, with the prompts of the rejected images."""
    pairs: list[FurtherPair] = []
    left = record
    while len(pairs) < settings.pairs:
        try:
            if pairs and settings.rejected == "own" and settings.rule != "random":
                pair = _own(left, settings.rule, settings)
            else:
                pair = select_pair(left, settings.rule, rng, settings=settings, logprobs=logprobs)
        except _NoLogProbsError:
            if not pairs:
                raise
            break
        if pair is None:
            break
        found: FurtherPair = {
            "chosen": pair["chosen"],
            "rejected": pair["rejected"],
            "chosen_score": pair["chosen_score"],
            "rejected_score": pair["rejected_score"],
        }
        if "negative_prompt" in record:
            images = {**record["negative_metadata"], **record["base_metadata"]}
            index = next(image_index(name) for name, verdict in images.items() if verdict["path"] == pair["rejected"])
            found["rejected_prompt"] = record["negative_prompt"][variant_index(index, record)]
        pairs.append(found)
        left = _without(left, pair)
    return pairs


def _without(record: Record, pair: Pair) -> Record:
    """The record without the images of the pair."""
    used = (pair["chosen"], pair["rejected"])
    sides = {
        side: {name: verdict for name, verdict in record[side].items() if verdict["path"] not in used}
        for side in ("base_metadata", "negative_metadata")
    }
    return cast(Record, {**record, **sides})


def _judged(record: Record, settings: SelectConfig) -> Record:
    sides: dict[str, dict[str, ImageVerdict]] = {}
    for side, judge in (("base_metadata", base_verdict), ("negative_metadata", negative_verdict)):
        sides[side] = {}
        for name, verdict in cast("dict[str, ImageVerdict]", record.get(side, {})).items():
            kept, reason = judge(verdict, settings.rule, settings)
            sides[side][name] = {**verdict, "kept": kept, "reason": reason}
    return cast(Record, {**record, **sides})


def _why_no_image(record: Record) -> str:
    reasons = [reason for reason in record.get("variant_reasons", []) if reason]
    return "; ".join(dict.fromkeys(reasons)) or "no variant was drawn"


def _why_no_pair(record: Record, rule: str) -> str:
    bases = [v for v in record["base_metadata"].values() if v["kept"]]
    negatives = [v for v in record["negative_metadata"].values() if v["kept"]]
    if not bases:
        return "no base image passed: " + "; ".join(
            dict.fromkeys(v["reason"] for v in record["base_metadata"].values())
        )
    if not negatives:
        return "no negative image shows a difference"
    return "no variant has both images left"


class _NoLogProbsError(OspoError):
    """The log-probabilities of one item cannot be had."""


def _logprobs_of(prompt: str, model: UnifiedModel, batch_size: int, out: Path | None) -> LogProbs:
    def logprobs(paths: Sequence[str]) -> list[float]:
        import torch

        from ospo_fast.stages.common import image_codes, locate, prompt_error
        from ospo_fast.stages.teacher_forcing import mean_logprobs

        if (why := prompt_error(model, prompt)) is not None:
            raise _NoLogProbsError(why)
        codes = image_codes(model, [locate(path, out) for path in paths])
        fine = [row for row in codes if not isinstance(row, str)]
        if len(fine) < len(codes):
            raise _NoLogProbsError("; ".join(row for row in codes if isinstance(row, str)))
        return mean_logprobs(model, [prompt] * len(paths), torch.stack(fine), batch_size=batch_size)

    return logprobs


def failure(record: Record) -> Failure | None:
    """Return None: an item without a pair is a decision, not a failure."""
    return None
