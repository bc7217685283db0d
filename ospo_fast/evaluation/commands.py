"""The command `evaluate` on a public benchmark, and on a question file."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ospo_fast.config import SAMPLING, Config
from ospo_fast.errors import Failure, OspoError, UsageError, attempt, some_failed
from ospo_fast.evaluation.benchmarks import BENCHMARKS, Images, read_benchmark
from ospo_fast.evaluation.questions import Item, Scores, digest, read_questions, soft_tifa, summarize
from ospo_fast.files import locate, no_link, open_image, read_bytes, reason
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.chat import is_unified
from ospo_fast.models.vocabulary import UnloadedModel
from ospo_fast.records import (
    check_creatable,
    check_writable,
    chunked,
    discard,
    only_writer,
    parse_json,
    stable_hash,
    sweep_temporary_files,
    write_atomic,
    write_folder,
    write_json,
)
from ospo_fast.stages.prompt_files import check_length, normalized, prompt_key, refuse_lines

if TYPE_CHECKING:
    from ospo_fast.evaluation.judges import Judge

logger = logging.getLogger(__name__)

IMAGES, MANIFEST, SCORES, RESULT = "generated", "benchmark.json", "scores.jsonl", "evaluate.json"
MAX_PER_PROMPT = 10**4  # images
CHUNK = 64  # images that a judge gets at once
# The files of a folder that say which prompt an image is of: of this command, of `generate`, and of GenEval 2.
_LISTS = (MANIFEST, "sheet.json", "image_paths.json")


def check_options(
    *, benchmark: str | None, prompts: Path | None, num: int | None, questions: Path | None, judge: str | None,
    images: Path | None, baseline: Path | None,
) -> None:  # fmt: skip
    """Raise UsageError for options of `evaluate` that do not go together, None for those that were not given."""
    if benchmark is not None and questions is not None:
        raise UsageError("evaluate: got --benchmark and --questions, expected one of them; start a command for each.")
    for name, value, needed, present in (
        ("--prompts", prompts, "--benchmark", benchmark),
        ("--judge", judge, "--questions", questions),
        ("--images", images, "--questions", questions),
        ("--baseline", baseline, "--questions", questions),
    ):
        if value is not None and present is None:
            raise UsageError(f"evaluate: got {name} without {needed}, which it belongs to; add {needed}.")
    if benchmark is not None and prompts is None:
        known = BENCHMARKS[benchmark]
        raise UsageError(
            f"evaluate: --benchmark {benchmark} needs --prompts FILE, its prompt file, which is not part of this "
            f"package; get {known.file} of {known.source}."
        )
    if questions is not None and judge is None:
        raise UsageError("evaluate: --questions needs --judge: self, or a vision-language model; add it.")
    if num is not None and benchmark is None and questions is None:
        raise UsageError("evaluate: got --num without --benchmark or --questions; add one of them.")
    if num is not None and images is not None:
        raise UsageError("evaluate: got --num and --images, expected one of them: --images has all its images.")
    if num is not None and not 1 <= num <= MAX_PER_PROMPT:
        raise UsageError(f"--num should be 1 to {MAX_PER_PROMPT}, got {num}.")


def run_benchmark(config: Config, name: str, prompts: Path, num: int | None, *, progress: bool) -> dict[str, Any]:
    """Generate the images of a benchmark's prompts, and write the folder that its official scorer reads.

    Args:
        config: model, images, seed and out. The seed of an image depends on `seed`, its prompt and its number alone.
        name: of `BENCHMARKS`.
        prompts: its prompt file.
        num: images of each prompt; None: as many as the benchmark has.
        progress: show a bar on stderr.

    Returns:
        The content of benchmark.json. <out>/<name> is the folder for the scorer, which is written when all images are
        there, and <out>/generated has these with their codes and settings. A repeated call continues.

    Raises:
        UsageError: a file of another benchmark, a prompt that the model or the scorer cannot take, a number of images
            that the scorer does not read, or a folder of another prompt file.
        OspoError: an image could not be generated: those that were are kept, and the folder is not written.

    """
    benchmark, out = BENCHMARKS[name], Path(config.out)
    entries = read_benchmark(name, prompts)
    num = benchmark.default if num is None else num
    if benchmark.accepted and num not in benchmark.accepted:
        accepted = " or ".join(map(str, benchmark.accepted))
        raise UsageError(
            f"--num: got {num}, expected {accepted}: the scorer of {benchmark.title} reads as many images of a prompt."
        )
    texts = [entry.prompt for entry in entries]
    lines = [entry.line for entry in entries]
    check_unloaded(config.model, prompts, lines, texts)
    made_of = f"{stable_hash(name, *texts):x}"
    check_creatable(out)
    _check_owner(out, name, made_of)
    from ospo_fast.models import open_model

    model = open_model(config)
    check_prompts(model, prompts, lines, texts)
    check_writable(out)
    with only_writer(out / MANIFEST):
        facts = {"benchmark": name, "prompts_digest": made_of, "model": config.model, "seed": config.seed, "num": num}
        folder = out / name
        if folder.exists():  # of other settings or weights, until it is written again
            discard(folder)
        write_json(out / MANIFEST, facts)
        images, sampling, drawing = generate_images(model, texts, config, num, progress=progress)
        sweep_temporary_files(out)
        write_folder(folder, lambda temporary: benchmark.write(entries, images, temporary, folder))
        result = {**facts, **sampling, "folder": str(folder), "images": _listed(out, texts, images)}
        write_json(out / MANIFEST, result)
    return {**result, "drawing": drawing}


def _check_owner(out: Path, name: str, made_of: str) -> None:
    """Raise UsageError for a folder with the images of another prompt file."""
    found = _read_object(out / MANIFEST) if os.path.lexists(out / MANIFEST) else None
    if found is not None and (found.get("benchmark"), found.get("prompts_digest")) != (name, made_of):
        raise UsageError(
            f"{out} holds the images of another prompt file ({found.get('benchmark')!s:.60}); choose another folder "
            "with --out."
        )


def _listed(out: Path, texts: Sequence[str], images: Images) -> list[dict[str, str]]:
    return [
        {"path": path.relative_to(out).as_posix(), "prompt": text}
        for text, paths in zip(texts, images, strict=True)
        for path in paths
    ]


def check_unloaded(name: str, file: Path, lines: Sequence[int], texts: Sequence[str], what: str = "prompt") -> None:
    """Raise UsageError for prompts, or questions, that a model surely cannot take, before it is loaded."""
    if (unloaded := UnloadedModel.find(name)) is None:
        return
    results = [(line, attempt(unloaded.image_prompt, text)) for line, text in zip(lines, texts, strict=True)]
    refuse_lines(
        file,
        [
            (line, Failure(found.reason.replace("prompt:", f"{what}:", 1)))
            for line, found in results
            if isinstance(found, Failure)
        ],
    )


def check_prompts(model: UnifiedModel, file: Path, lines: Sequence[int], texts: Sequence[str]) -> None:
    """Raise UsageError for prompts that a model cannot take."""

    def check(text: str) -> Failure | None:
        ids = attempt(model.image_prompt, text)
        return ids if isinstance(ids, Failure) else check_length(model, text, ids)

    refuse_lines(file, [(n, check(text)) for n, text in zip(lines, texts, strict=True)])


def generate_images(
    model: UnifiedModel, texts: Sequence[str], config: Config, num: int, *, progress: bool
) -> tuple[Images, dict[str, Any], dict[str, float] | None]:
    """Generate `num` images of each prompt in <out>/generated; those with the same settings and weights are kept.

    Returns:
        The images of each prompt, the sampling settings, and the throughput, None if no image was generated.

    Raises:
        OspoError: an image could not be generated. The others are kept.

    """
    from ospo_fast.stages.generate import fingerprint, generate_missing
    from ospo_fast.stages.image_files import ImageFiles

    folder = Path(config.out) / IMAGES
    check_writable(folder)
    sweep_temporary_files(folder)
    files, weights = ImageFiles(model, config.images), fingerprint(model)
    before: Counter[str] = Counter()  # images of a prompt that comes again have seeds of their own
    plan, images = {}, []
    for number, text in enumerate(texts):
        paths = [folder / f"{number:05d}_{n}.png" for n in range(num)]
        for n, path in enumerate(paths, before[text]):
            seed = stable_hash(config.seed, "evaluate", text, n)
            plan[path] = {"prompt": normalized(model, text), "seed": seed, **files.sampling, "weights": weights}
        before[text] += num
        images.append(paths)
    failed = generate_missing(model, files, plan, progress=progress)
    if failed:
        reasons = [f"{path.name}: {failure.reason}" for path, failure in failed.items()]
        raise OspoError(f"{some_failed('images', reasons, len(plan))}; check the weights of the model.")
    return images, files.sampling, None if files.throughput is None else files.throughput.metrics()


def run_questions(
    config: Config,
    questions: Path,
    judge: str,
    *,
    images: Path | None = None,
    baseline: Path | None = None,
    num: int | None = None,
    progress: bool,
) -> dict[str, Any]:
    """Score images by the answers of a judge to the questions of a file.

    Args:
        config: model, images, seed and out.
        questions: see `read_questions`.
        judge: "self" for the model, a unified model, or a vision-language model of transformers.
        images: a folder of `evaluate --benchmark` or `generate`, or with an image_paths.json as for GenEval 2. None:
            the model generates images of the prompts, as `run_benchmark` does.
        baseline: the folder of another evaluation of the same questions, to compare with.
        num: images of each prompt, if they are generated; None: 1.
        progress: show a bar on stderr.

    Returns:
        The content of evaluate.json. scores.jsonl has a line for each image.

    Raises:
        UsageError: wrong questions, images that are missing, or a baseline of other questions or by another judge.
        OspoError: a judge without image input or without single tokens for the answers, or an image that cannot be
            read. Nothing is written then.

    """
    from ospo_fast.evaluation import judges

    out = Path(config.out)
    items = read_questions(questions)
    texts = [item.prompt for item in items]
    itself = judge == judges.SELF
    named = config.model if itself else judge
    before: Scores | None = None
    drawn: Mapping[str, Any] = {}
    if baseline is not None:
        before, drawn = _read_baseline(baseline, items, "self" if itself else judge, named)
    # What is wrong is found before torch is imported and a model is loaded, as far as its folder says it.
    option = "model" if itself else "--judge"
    if is_unified(named, option):
        asked = [(item.line, judges.asked_text(question)) for item in items for question in item.questions]
        places, asked_texts = zip(*asked, strict=True)
        check_unloaded(named, questions, places, asked_texts, "questions")
    check_creatable(out)
    if images is None:
        check_unloaded(config.model, questions, [item.line for item in items], texts)
        _check_owner(out, "questions", digest(items))
        found, origin = None, {"model": config.model}
    else:
        found = find_images(images, texts, config.read_from)
        _check_sizes(found, config.model if itself else None)
        origin = _origin(images)
        if itself and origin.get("model", config.model) != config.model:
            logger.warning(
                "%s judges images that %s generated; name that one with --model for its own answers",
                config.model,
                origin["model"],
            )
    opened = judges.open_judge(named, config, option)
    opened.check([question for item in items for question in item.questions])
    if found is None:
        found, sampling = _generate_for(config, opened if itself else None, questions, items, num or 1, progress)
        origin |= sampling
    known = drawn.keys() & origin.keys()
    changed = {name: (drawn[name], origin[name]) for name in SAMPLING if name in known and drawn[name] != origin[name]}
    if changed:
        listed = ", ".join(f"{name} {old} and {new}" for name, (old, new) in changed.items())
        logger.warning(
            "The images of the baseline were generated with other settings (%s): differences mix both", listed
        )
    scores, rows = _score(opened, items, found, progress)
    result = {
        "questions": str(questions),
        "questions_digest": digest(items),
        "model": None,
        "images": str(out / IMAGES if images is None else images),
        "judge": {"name": "self" if itself else judge, "model": named},
        **origin,
        **({} if baseline is None else {"baseline": str(baseline), "baseline_differs_in": sorted(changed)}),
        **summarize(items, scores, before),
    }
    check_writable(out)
    with only_writer(out / RESULT):
        write_atomic(out / SCORES, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        write_json(out / RESULT, result)
    return result


def describe(result: dict[str, Any]) -> str:
    """Return the lines that the command prints of what `run_questions` returns."""
    lines = []
    for name in ("soft_tifa_am", "soft_tifa_gm"):
        entry = result[name]
        change = ""
        if "difference" in entry:
            change = f"; {entry['difference']:+.3f}{_interval(entry['difference_interval'])} to the baseline"
        lines.append(f"Soft-TIFA {name[-2:].upper()}: {entry['mean']:.3f}{_interval(entry['interval'])}{change}")
    return "\n".join([*lines, f"{result['prompts']} prompts, judge {result['judge']['name']}"])


def _interval(limits: tuple[float, float] | None) -> str:
    return "" if limits is None else f" [{limits[0]:.3f}, {limits[1]:.3f}]"


def _generate_for(
    config: Config, judge: Any, file: Path, items: Sequence[Item], num: int, progress: bool
) -> tuple[Images, dict[str, Any]]:
    """Generate images of the items by the model of the judge, or by one that is loaded for it alone."""
    from ospo_fast.models import open_model

    texts = [item.prompt for item in items]
    model = open_model(config) if judge is None else judge.model
    check_prompts(model, file, [item.line for item in items], texts)
    out = Path(config.out)
    check_writable(out)
    with only_writer(out / MANIFEST):
        facts = {"benchmark": "questions", "prompts_digest": digest(items), "model": config.model, "num": num}
        write_json(out / MANIFEST, facts)
        images, sampling, _ = generate_images(model, texts, config, num, progress=progress)
        write_json(out / MANIFEST, {**facts, **sampling, "images": _listed(out, texts, images)})
    return images, sampling


def _score(judge: Judge, items: Sequence[Item], images: Images, progress: bool) -> tuple[Scores, list[dict[str, Any]]]:
    """Return the scores of the items, and a row for each image."""
    from tqdm.auto import tqdm

    places = [(i, path) for i, paths in enumerate(images) for path in paths]
    found: list[list[list[float]]] = [[] for _ in items]
    rows = []
    with tqdm(total=len(places), unit="image", delay=2, disable=not progress) as bar:
        for part in chunked(places, CHUNK):
            asked = [items[i].questions for i, _ in part]
            for (i, path), verdicts in zip(
                part, judge.answer([open_image(path) for _, path in part], asked), strict=True
            ):
                item, probabilities = items[i], [verdict["p_expected"] for verdict in verdicts]
                found[i].append(probabilities)
                am, gm = soft_tifa(probabilities)
                rows.append(
                    {
                        "prompt": item.prompt,
                        "category": item.category,
                        "image": str(path),
                        "questions": [question.text for question in item.questions],
                        "answers": [question.answer for question in item.questions],
                        "skills": [question.skill for question in item.questions],
                        "probabilities": probabilities,
                        "soft_tifa_am": am,
                        "soft_tifa_gm": gm,
                    }
                )
            bar.update(len(part))
    return Scores.from_images(found), rows


def find_images(folder: Path, texts: Sequence[str], read_from: Sequence[str] = ()) -> Images:
    """Return the images of each prompt in a folder that lists its images.

    Raises:
        UsageError: the folder has no list of images, or a prompt has none.
        OspoError: the list, or an image, cannot be read.

    """
    name = next((name for name in _LISTS if os.path.isfile(folder / name)), None)  # noqa: PTH113 (raises for long names)
    if name is None:
        raise UsageError(
            f"--images: {folder} has none of {', '.join(_LISTS)}, which name the prompt of each image; give a folder "
            "of `ospo-fast evaluate --benchmark` or `ospo-fast generate`, or write an image_paths.json: an object with "
            "the path of the image of each prompt."
        )
    content = _read_object(folder / name)
    if name == "image_paths.json":
        listed: Any = [{"prompt": prompt, "path": path} for prompt, path in content.items()]
    else:
        listed = content.get("images")
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise UsageError(f"--images: {folder / name} lists no images; repeat the command that generates them.")
    by_prompt: dict[str, list[Path]] = {}
    for entry in listed:
        if entry.get("path") is not None:
            path = locate(entry["path"], folder, read_from)
            by_prompt.setdefault(prompt_key(str(entry.get("prompt"))), []).append(path)
    missing = [text for text in texts if prompt_key(text) not in by_prompt]
    if missing:
        raise UsageError(
            f"--images: {folder} has no image of {len(missing)} of {len(texts)} prompts, first {missing[0][:60]!r}; "
            "generate them, or remove these prompts from the question file."
        )
    return [by_prompt[prompt_key(text)] for text in texts]


def _check_sizes(images: Images, model: str | None) -> None:
    """Raise OspoError for an image that cannot be read, or of another size than the others or those of a model."""
    size, first = None, None
    if model is not None and (side := _image_side(model)) is not None:
        size, first = (side, side), f"those of {model}"
    for path in (path for paths in images for path in paths):
        found = open_image(path).size
        if size is None:
            size, first = found, str(path)
        if found != size:
            raise OspoError(
                f"--images: {path} has {found[0]} x {found[1]} pixels, expected {size[0]} x {size[1]} as {first}: it "
                "is of another model, or a grid of several images; give single images of one size."
            )


def _image_side(model: str) -> int | None:
    """Return the side of a model's images in pixels, as its folder says it; None if it does not."""
    from ospo_fast.models import folder_checks
    from ospo_fast.models.vocabulary import base_folder

    folder = base_folder(model)
    if isinstance(folder, str):
        return None
    side = (folder_checks.read_config(folder).get("vision_config") or {}).get("image_size")
    return side if isinstance(side, int) else None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_bytes(no_link(path)))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise OspoError(f"Cannot read {path}: {reason(error)}; write it again, or delete it.") from error
    return content


def _origin(folder: Path) -> dict[str, Any]:
    """Return the model and the sampling settings of images, as far as the list in their folder says them."""
    name = next(name for name in _LISTS if os.path.isfile(folder / name))  # noqa: PTH113 (see `find_images`)
    content = {} if name == "image_paths.json" else _read_object(folder / name)
    return {key: content[key] for key in ("model", *SAMPLING) if key in content}


def _read_baseline(folder: Path, items: Sequence[Item], judge: str, model: str) -> tuple[Scores, Mapping[str, Any]]:
    """Return the scores and the results of another evaluation.

    Raises UsageError for other questions, or another judge.
    """
    for name in (RESULT, SCORES):
        if not os.path.isfile(folder / name):  # noqa: PTH113 (see `find_images`)
            raise UsageError(
                f"--baseline: {folder} has no {name}; give the --out of another `ospo-fast evaluate --questions`."
            )
    result = _read_object(folder / RESULT)
    if result.get("questions_digest") != digest(items):
        raise UsageError(
            f"--baseline: {folder} has the scores of other questions ({result.get('questions')!s:.200}), and only the "
            "same can be compared; evaluate both with one question file."
        )
    scored_by = result.get("judge")
    if not isinstance(scored_by, dict):
        raise OspoError(f"Cannot read {folder / RESULT}: it names no judge; evaluate the baseline again.")
    if (other := scored_by.get("name")) != judge:
        raise UsageError(
            f"--baseline: {folder} was scored by the judge {other!s:.200}, not by {judge}; use one judge for both."
        )
    if scored_by.get("model") != model:
        logger.warning("Each model has judged its own images: differences mix both; use --judge MODEL for one judge")
    try:
        rows = [parse_json(line) for line in read_bytes(no_link(folder / SCORES)).splitlines()]
        found: dict[str, list[list[float]]] = {}
        for row in rows:
            found.setdefault(row["prompt"], []).append([float(p) for p in row["probabilities"]])
        scores = Scores.from_images([found[item.prompt] for item in items])
        if [*map(len, scores.probabilities)] != [len(item.questions) for item in items]:
            raise ValueError("a prompt has more or fewer probabilities than questions")
        return scores, result
    except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
        raise OspoError(
            f"Cannot read {folder / SCORES}: {reason(cast('Exception', error))}; evaluate the baseline again."
        ) from error
