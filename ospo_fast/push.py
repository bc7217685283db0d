"""Upload what a run made to the Hugging Face hub: the trained model with its card, and the pairs as a dataset.

The dataset is the export in the official layout, see `ospo_fast.export`, with what the Hub's viewer needs: masks as
images and metadata.jsonl, whose columns `…_file_name` it shows as images (`ImageFolder` of the package datasets).
Everything is built and checked before the Hub is asked for anything.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ospo_fast.config import MODEL_FILES, Config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.export import Export, Files, collect_pairs, run_folder
from ospo_fast.files import no_link, read_bytes, reading, reason, regular
from ospo_fast.pipeline import read_stage
from ospo_fast.records import SIDES, parse_json, read_json
from ospo_fast.stages.model_card import base_folder, model_card, public_name
from ospo_fast.stages.run_files import describe_missing, made_here, missing_trained
from ospo_fast.stages.train_settings import input_stage

WHAT = ("adapter", "model")
_TEXTS = (".json", ".jsonl", ".md", ".yaml", ".yml", ".txt", ".jinja")
_VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")  # whose pieces can look like paths
_PATH = re.compile(r"~?/[^/\s]+/|[A-Za-z]:\\")  # the beginning of an absolute path
_COLUMNS = {
    "item_id": "the name of the pair, and of its folder",
    "category": "the kind of prompt",
    "prompt": "the prompt of both images",
    "rejected_prompt": "the hard negative that the rejected image was made from",
    "chosen, rejected": "the images",
    "chosen_mask, rejected_mask": "white where the model attends to the objects of the prompt",
    "chosen_score, rejected_score": "the model's own answers to questions about the prompt: mean of p(yes) - p(no)",
}


@dataclass(frozen=True)
class Upload:
    """The files of one repository of the Hub, by their paths in it."""

    repo: str
    kind: str  # "model" or "dataset"
    files: Files

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file, sorted by name."""
        files = sorted(self.files.items())
        return {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in files}


def check_repo(option: str, name: str) -> str:
    """Return a name of a repository of the Hub. Raises UsageError for another text than OWNER/NAME."""
    if _is_hub_name(name):
        return name
    raise UsageError(
        f"{option}: got {name[:100]!r}, expected OWNER/NAME of a repository of the Hugging Face hub, of letters, "
        "digits and - _ . (not twice in a row, nor at an end)."
    )


def _is_hub_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # exported lazily

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def check_names(repo: str | None, dataset: str | None, what: str | None, base: str | None) -> None:
    """Raise UsageError for names of repositories, or a choice of them, that cannot be pushed; see `prepare`."""
    if repo is None and dataset is None:
        raise UsageError("push: got neither, expected --repo OWNER/NAME for the model, --dataset OWNER/NAME, or both.")
    if repo is None and what is not None:
        raise UsageError(f"--what: got {what} without --repo, which names the repository of the model; add it.")
    for option, name in (("--repo", repo), ("--dataset", dataset), ("--base", base)):
        if name is not None and not (option == "--base" and name in MODEL_FILES):
            check_repo(option, name)


def prepare(
    config: Config,
    *,
    repo: str | None = None,
    dataset: str | None = None,
    what: str | None = None,
    base: str | None = None,
    iteration: int = 1,
    progress: bool = False,
) -> list[Upload]:
    """Collect and check what goes to the Hub. Contacts nothing and writes nothing.

    Args:
        config: of the run; `out` is its folder.
        repo: the repository of the model. None: no model.
        dataset: the repository of the pairs. None: no pairs.
        what: "adapter" or "model" (merged). None: the adapter, or after `train.full` the model.
        base: the hub name of the base model, where the run has a folder.
        iteration: of self-improvement.
        progress: show a bar on stderr.

    Raises:
        UsageError: names of repositories, or a run without training.
        OspoError: files that are missing or damaged, or that name a folder of this machine.

    """
    check_names(repo, dataset, what, base)
    if base is not None and config.model in MODEL_FILES and base != config.model:
        raise UsageError(
            f"--base: got {base}, but the model of the run is {config.model}, which has no folder; leave it out."
        )
    folder = run_folder(config, iteration)
    uploads = []
    if repo is not None:
        uploads.append(Upload(repo, "model", _model_files(config, folder, what, base, iteration)))
    if dataset is not None:
        export = collect_pairs(config, iteration, progress=progress)
        uploads.append(Upload(dataset, "dataset", _dataset_files(config, export, dataset, base, iteration)))
    for upload in uploads:
        _refuse_private(upload, config)
    return uploads


def _model_files(config: Config, folder: Path, what: str | None, base: str | None, iteration: int) -> Files:
    train = folder / "train"
    remedy = f"run `ospo-fast train --out {config.out}{f' --iteration {iteration}' * (iteration > 1)}` first"
    no_link(train)
    done = read_json(train / "done.json", {})
    if not done:
        raise UsageError(f"There is no finished training in {folder}; {remedy}.")
    if missing := missing_trained(train, done.get("files")):
        raise OspoError(f"{describe_missing(missing)}; {remedy}.")
    what = what or next((name for name in WHAT if (train / name).is_dir()), WHAT[-1])
    if not no_link(train / what).is_dir():
        raise UsageError(f"--what: got {what}, which training with train.full does not write; use --what model.")
    files: Files = {}
    for path in sorted((train / what).rglob("*")):
        name = path.relative_to(train / what)
        if not (no_link(path).is_dir() or any(part.startswith(".") for part in name.parts)):
            files[name.as_posix()] = regular(path)
    if what == WHAT[0]:
        path = train / what / "adapter_config.json"
        with reading("configuration of the adapter", path, remedy):
            adapter = parse_json(read_bytes(path))
            named = str(adapter["base_model_name_or_path"])
        if base is None and named not in MODEL_FILES and not _is_hub_name(named):
            raise OspoError(
                f"The adapter is of {named[:100]!r}, a folder that others do not have; name the model of the hub that "
                "it is a copy of, as --base OWNER/NAME, or push the merged model with --what model."
            )
        if base is not None:
            adapter["base_model_name_or_path"] = base
            files[path.name] = (json.dumps(adapter, indent=2) + "\n").encode()
    if base is not None or "README.md" not in files:
        files["README.md"] = _model_card(config, folder, done, base, merged=what == WHAT[1])
    return files


def _model_card(config: Config, folder: Path, done: Mapping[str, Any], base: str | None, *, merged: bool) -> bytes:
    from ospo_fast.stages.extension import read_extensions
    from ospo_fast.stages.training_pairs import select_training_pairs

    log = no_link(folder / "train" / "log.jsonl")
    pairs = select_training_pairs(read_stage(folder, input_stage(config)), config)
    with reading("results of training in", folder / "train", "correct its log.jsonl and done.json"):
        others = {*done["left_out"], *done.get("validation_pairs", ())}
        pairs = [item for item in pairs if item.pair_id not in others]
        rows = [parse_json(line) for line in read_bytes(log).splitlines()]
        named = base or done.get("base_model", {}).get("name") or public_name(config.model)
        extensions = read_extensions(folder / "train")
        own = made_here(folder, "images")
        return model_card(
            named, config, pairs, rows, done.get("kept"), done["step"], extensions, merged=merged, own=own
        )


def _dataset_files(config: Config, export: Export, name: str, base: str | None, iteration: int) -> Files:
    from PIL import Image

    from ospo_fast.files import open_image
    from ospo_fast.stages.image_files import encode_png

    files: Files = export.files | {"train.json": export.train_json()}
    scored = all(f"{side}_score" in entry for entry in export.entries for side in SIDES)
    rows = []
    for entry in export.entries:
        row = {"item_id": entry["item_id"], "category": entry["t2i_category"], "prompt": entry["prompt"]}
        row["rejected_prompt"] = entry.get("rejected_prompt") or ""
        row |= {f"{side}_file_name": entry[side] for side in SIDES}
        for side in SIDES if export.masked else ():
            pixels, source = entry[side].replace("images/", "masks/", 1), export.files[entry[side]]
            image = open_image(source) if isinstance(source, Path) else Image.open(io.BytesIO(source))
            path = entry[side].replace("images/", "object_mask/", 1).replace(".png", "_mask.pt")
            files[pixels] = encode_png(_mask_image(files[path], image.size))
            row[f"{side}_mask_file_name"] = pixels
        if scored:
            row |= {f"{side}_score": float(entry[f"{side}_score"]) for side in SIDES}
        rows.append(row)
    # Every row has every column, of one type: the types are those of the first rows.
    files["metadata.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return files | {"README.md": _dataset_card(config, export, rows[0], name, base, iteration)}


def _mask_image(saved: Path | bytes, size: tuple[int, int]) -> Any:
    """Return a mask as a black and white image of the size of the image that it is of."""
    import torch
    from PIL import Image

    assert isinstance(saved, bytes)
    mask = torch.load(io.BytesIO(saved), weights_only=True)
    return Image.fromarray((mask * 255).numpy()).resize(size, Image.Resampling.NEAREST)


def _dataset_card(
    config: Config, export: Export, row: Mapping[str, Any], name: str, base: str | None, iteration: int
) -> bytes:
    from huggingface_hub import DatasetCard, DatasetCardData

    base = base or public_name(config.model)
    folders = ["images", *(["masks"] if export.masked else [])]
    data = DatasetCardData(
        pretty_name=f"OSPO pairs of {base}",
        task_categories=["text-to-image"],
        tags=["ospo", "ospo-fast", "preference-optimization"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": ["metadata.jsonl", *(f"{f}/**/*.png" for f in folders)]}],
            }
        ],
    )
    shown = {column.removesuffix("_file_name") for column in row}
    columns = [f"| {names} | {text} |" for names, text in _COLUMNS.items() if names.split(", ")[0] in shown]
    counts = [f"| {category} | {count} |" for category, count in export.categories().items()]
    later = f" after {iteration - 1} iterations of training" if iteration > 1 else ""
    masks = " mask_dir=DATA/object_mask" if export.masked else " use_mask=False"
    source, license_of = "They were given to a run of ospo-fast", "The license is that of the given images."
    if made_here(run_folder(config, iteration), "images"):
        prompts = "a file" if config.prompts.file else "the model"
        source = (
            f"The model `{base}`{later} generated the images from prompts of {prompts} and judged them itself, with "
            f"ospo-fast: preset {config.preset}, selection by the rule {config.select.rule},"
        )
        license_of = f"The images were generated by `{base}`, so its license applies."
    text = f"""\
# Preference pairs of {base}

{len(export.entries)} pairs of a chosen and a rejected image of the same prompt. {source} by OSPO, object-centric
self-improving preference optimization ([arXiv:2506.02015](https://arxiv.org/abs/2506.02015)).

| column | meaning |
| --- | --- |
{_lines(columns)}

| category | pairs |
| --- | ---: |
{_lines(counts)}

## Use

```python
from datasets import load_dataset

pairs = load_dataset("{name}", split="train")
print(pairs[0]["prompt"], pairs[0]["chosen"].size)
```

The trainer of the [official code](https://github.com/KU-AGI/OSPO) reads `train.json`, whose paths are relative to the
folder of this file: with a copy of the folder in `DATA`, put `DATA/` in front of them, and start the trainer with
`dataset.train.data_path=DATA/train.json{masks}`.

## License

{license_of} Its name in the Hub's form is for you to add, as `license:` in the metadata above.
"""
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}")).encode()


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(lines)


def _refuse_private(upload: Upload, config: Config) -> None:
    """Raise OspoError for a text that holds the path of a folder of this machine."""
    out = Path(config.out)
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 (Path.expanduser raises where there is none)
    folders = {home, Path.cwd(), out.absolute(), out.resolve(), base_folder(config.model) or home}
    known = sorted((str(folder) for folder in folders if len(folder.parts) > 1), key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w.-])(?:{'|'.join(map(re.escape, known))})(?![\w.-])")
    for name, content in upload.files.items():
        if not name.endswith(_TEXTS) or Path(name).name in _VOCABULARY:
            continue
        path = content if isinstance(content, Path) else Path(name)
        with reading("file", path, "correct it"):
            data = content if isinstance(content, bytes) else read_bytes(content)
            text = data.decode()
            found = next((match[0] for match in pattern.finditer(text)), None)
            if found is None and name.endswith(".json"):
                found = next(filter(_PATH.match, _strings(parse_json(data))), None)
        if found is not None:
            raise OspoError(
                f"{path} holds {found[:200]!r}, a path of this machine, which would be published; remove it from the "
                "file or the records that it was made from."
            )


def _strings(value: object) -> Iterator[str]:
    """Yield the texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def render(uploads: Sequence[Upload], private: bool) -> str:
    """Say what `push` would upload; of a folder of files, their number and size."""
    lines = []
    for upload in uploads:
        sizes = upload.sizes()
        new = " (private)" if private else ""
        lines.append(f"{upload.kind} {upload.repo}{new}: {len(sizes)} files, {sum(sizes.values()):,} bytes")
        for top, names in itertools.groupby(sizes, lambda name: name.split("/")[0]):
            found = [sizes[name] for name in names]
            count = f"/  {len(found)} files," if top not in sizes else " "
            lines.append(f"  {top}{count} {sum(found):,} bytes")
    return _lines(lines)


def push(uploads: Sequence[Upload], *, private: bool = False) -> list[str]:
    """Create the repositories where they are missing, and upload the files. Returns their addresses.

    Files of the same name are replaced, and others that are there stay.

    Raises:
        OspoError: no network or token, no right to write, or with `private` a repository that is public.

    """
    from huggingface_hub import HfApi

    api, urls = HfApi(), []
    for upload in uploads:
        try:
            url = api.create_repo(upload.repo, repo_type=upload.kind, private=private or None, exist_ok=True)
            if private and not api.repo_info(upload.repo, repo_type=upload.kind).private:
                raise UsageError(
                    f"--private: got the {upload.kind} {upload.repo}, which is there and public; make it private on "
                    "its page of the hub, or choose another name. Nothing was uploaded to it."
                )
            with tempfile.TemporaryDirectory() as folder:
                _stage(upload.files, Path(folder))
                message = f"Upload the {upload.kind} of a run of ospo-fast"
                api.upload_folder(
                    repo_id=upload.repo, repo_type=upload.kind, folder_path=folder, commit_message=message
                )
        except OspoError:
            raise
        except Exception as error:  # of the network, the hub, or the token
            raise OspoError(
                f"push: cannot upload the {upload.kind} {upload.repo} ({reason(error)}); check the network and the "
                "name, and log in with `hf auth login`, or set HF_TOKEN to a token that may write. The same command "
                "continues."
            ) from error
        urls.append(str(url))
    return urls


def _stage(files: Files, folder: Path) -> None:
    """Bring the files into a folder, as links to those of the run."""
    for name, content in files.items():
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            place.write_bytes(content)
        else:
            place.symlink_to(content.resolve())
