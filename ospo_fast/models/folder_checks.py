"""Checks of model and adapter folders, which others may have written, before transformers or peft read them.

Memory and time must depend on what the weights hold, never on numbers or patterns that a configuration merely names.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.errors import OspoError
from ospo_fast.files import read_bytes, reading, regular
from ospo_fast.models.base import TEMPLATE_SETS
from ospo_fast.models.deepseek_config import is_deepseek, to_janus
from ospo_fast.models.families import find_family
from ospo_fast.records import parse_json

if TYPE_CHECKING:
    import torch

ADAPTER_WEIGHTS = "adapter_model.safetensors"
MAX_POSITIONS = 2**20  # a key-value cache and masks of that many are allocated

_MODEL_PART = "vision_language_encoder"  # of a pipeline of diffusers, next to `processor`
_AGAIN = "save or download the model again"
_ADAPTER_AGAIN = "save or download the adapter again"
_CONFIGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
# Keys of config.json that say how many parts are built, each of which has a tensor of its own (labels: of a head).
_COUNTS = ("num_hidden_layers", "num_res_blocks", "depth", "channel_multiplier", "num_labels")
_MAX_PACKED = 8  # quantized values in a byte
# The types of entries in tokenizer.json, and how long one can make a byte of a text. Entries multiply: 24 of ByteLevel
# fill the memory. Precompiled, which no supported model has, allocates what four of its bytes name.
_GROWTH = {
    **dict.fromkeys(("Sequence", "Replace", "Prepend", "Strip", "StripAccents", "Nmt"), 1),
    **dict.fromkeys(("Split", "CharDelimiterSplit", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits"), 1),
    **dict.fromkeys(("BertPreTokenizer", "UnicodeScripts", "FixedLength", "Fuse", "ByteFallback"), 1),
    **dict.fromkeys(("TemplateProcessing", "BertProcessing", "RobertaProcessing"), 1),
    **dict.fromkeys(("Lowercase", "BPEDecoder", "CTC", "WordPiece"), 2),
    **dict.fromkeys(("NFC", "NFD"), 3),
    "ByteLevel": 4,
    **dict.fromkeys(("Metaspace", "BertNormalizer"), 6),
    **dict.fromkeys(("NFKC", "NFKD"), 11),
}
_MAX_GROWTH = 256
_MAX_PIECES = 16  # in a list of a post-processor, which adds special tokens: a template repeats lists of ids
# peft puts these entries of adapter_config.json into regular expressions.
_PATTERN_KEYS = ("rank_pattern", "alpha_pattern", "layers_pattern", "modules_to_save")
_PLAIN = re.compile(r"\^?[\w.]+")
_INIT = re.compile(r"[A-Za-z_]{1,20}(_niter_\d{1,3})?")
_MAX_SETTING = 1024  # of a method within an adapter, such as loftq_iter
_MAX_PATTERN = 10_000  # characters of target_modules
_MATCH_SECONDS = 5.0


def read_json(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """Read a JSON object of a model folder. Raises OspoError, with `unique` also for keys that occur twice."""
    try:
        content = parse_json(read_bytes(path), unique=unique)
    except (OSError, ValueError) as error:
        raise OspoError(
            f"model: cannot read {path} ({getattr(error, 'strerror', None) or error}); give the folder of a saved model"
        ) from error
    if not isinstance(content, dict):
        raise OspoError(f"model: {path} holds no JSON object; {_AGAIN}")
    return content


def read_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a folder of either layout, as transformers' layout has it. Raises OspoError."""
    config = read_json(folder / "config.json")
    return to_janus(config, str(folder)) if is_deepseek(config) else config


def read_text(path: Path) -> str:
    """Read a text of a model folder. Raises OspoError."""
    with reading("text", path, _AGAIN):
        return read_bytes(path).decode()


def check_kind(config: dict[str, Any], name: str) -> None:
    """Raise OspoError unless a configuration is that of a model of one of the families."""
    if is_deepseek(config):
        config = to_janus(config, name)
    family = find_family(config, name)
    for key, accepted in (*((key, dict) for key in family.sections), ("template_set", str)):
        optional = () if family.is_own and accepted is dict else (type(None),)  # those of transformers have defaults
        if not isinstance(value := config.get(key), (accepted, *optional)):
            what = "an object" if accepted is dict else "a text"
            raise OspoError(
                f"model: {key} in the config.json of {name} is {value!r:.60}, expected {what}; save or download the "
                "model again"
            )
    templates = config.get("template_set")
    if templates is not None and templates not in TEMPLATE_SETS:
        raise OspoError(
            f"model: template_set in the config.json of {name} is {templates!r:.60}, expected one of "
            f"{', '.join(TEMPLATE_SETS)}; remove it, and name a file of your own in the setting templates"
        )
    text = (config.get("text_config") or {}) if family.text_types else config
    positions = text.get("max_position_embeddings", 1)
    if not isinstance(positions, int) or not 1 <= positions <= MAX_POSITIONS:
        raise OspoError(
            f"model: max_position_embeddings in the config.json of {name} is {positions!r:.60}, expected 1 to "
            f"{MAX_POSITIONS}; save or download the model again"
        )
    if family.text_types and text.get("model_type", family.text_types[0]) not in family.text_types:
        raise OspoError(f"model: {name} has a {text['model_type']!r} language model, expected {family.text_types[0]!r}")


def model_part(folder: Path) -> Path:
    """Return the folder of the autoregressive model in that of a pipeline of diffusers; other folders as they are."""
    part = folder / _MODEL_PART
    is_pipeline = (folder / "model_index.json").is_file() and not (folder / "config.json").is_file()
    if is_pipeline and (part / "config.json").is_file():
        refuse_pipes(part)
        return part
    return folder


def processor_part(folder: Path) -> Path:
    """Return the folder of the processor of a model folder: in a pipeline of diffusers, one next to it."""
    part = folder.parent / "processor"
    if folder.name == _MODEL_PART and not (folder / "tokenizer.json").is_file() and part.is_dir():
        refuse_pipes(part)
        refuse_code(part)
        return part
    return folder


def refuse_pipes(folder: Path) -> None:
    """Raise OspoError for a pipe or a device among the files that other packages open, for which they would wait."""
    for pattern in ("*", "additional_chat_templates/*"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):  # a link to nothing
                mode = path.stat().st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise OspoError(f"model: {path} is no regular file; delete it, or {_AGAIN}")


def refuse_code(folder: Path) -> None:
    """Raise OspoError for an entry that makes transformers load code, or other files than those checked here."""
    for path in (folder / name for name in _CONFIGS):
        content = read_json(path) if path.is_file() else {}
        for part in (content, *content.values()):
            for key, value in part.items() if isinstance(part, dict) else ():
                kernel = "attn_implementation" in key and "/" in str(value)
                if kernel or (key in ("auto_map", "transformers_weights", "fast_tokenizer_files") and value):
                    raise OspoError(
                        f"model: {path} has {key} {value!r:.60}, which names code or files outside of the installed "
                        "transformers' own; remove this entry"
                    )


def check_tokenizer(folder: Path) -> None:
    """Raise OspoError for entries of tokenizer.json that take memory or time by what they name."""
    # `tokenizers` builds all entries of a key that occurs twice.
    path, remedy = folder / "tokenizer.json", "use the tokenizer.json of the published model"
    content = read_json(path, unique=True)
    for sections in (("normalizer", "pre_tokenizer"), ("post_processor",), ("decoder",)):
        parts, where = [content[name] for name in sections if content.get(name) is not None], " and ".join(sections)
        entries = [entry for part in parts for entry in _entries(part)]
        for entry in entries:
            if not isinstance(entry, dict) or str(entry.get("type")) not in _GROWTH:
                raise OspoError(
                    f"model: {path} has {entry!r:.60} in its {where}, expected an object of one of the types "
                    f"{', '.join(sorted(_GROWTH))}; {remedy}"
                )
        if (growth := math.prod(map(_growth, entries))) > _MAX_GROWTH:
            raise OspoError(
                f"model: {path} has a {where} that can make a text {growth:.3g} times as long, expected at most "
                f"{_MAX_GROWTH} times; {remedy}"
            )
    if (most := max(_lengths(content.get("post_processor")), default=0)) > _MAX_PIECES:
        raise OspoError(
            f"model: {path} has a list of {most} values in its post_processor, expected at most {_MAX_PIECES}; {remedy}"
        )


def check_token_ids(source: str, tokenizer: Any, *, known: bool = True) -> None:
    """Raise OspoError unless a loaded tokenizer has the tokens of its files, with their ids.

    `tokenizers` numbers added tokens in their order: one that is missing in the file moves all behind it, and there is
    only a warning. transformers gives one that is missing, and that tokenizer_config.json names, an id of its own.
    source: the folder or the hub name that it was loaded from. known: refuse the latter too.
    """
    from huggingface_hub import try_to_load_from_cache

    path, remedy = Path(source, "tokenizer.json"), "use the tokenizer of the published model"
    if not os.path.isdir(source):  # noqa: PTH112 (Path.is_dir raises for long names)
        path = Path(str(try_to_load_from_cache(source, "tokenizer.json")))
    if not path.is_file():
        return  # made of other files, of which none names ids
    content, settings = read_json(path), path.with_name("tokenizer_config.json")
    added = [entry for entry in content.get("added_tokens") or () if isinstance(entry, dict)]
    ids = tokenizer.convert_tokens_to_ids([entry.get("content") for entry in added])
    for entry, own in zip(added, ids, strict=True):
        if own != entry.get("id"):
            raise OspoError(
                f"model: {path} gives {entry.get('content')!r:.60} the id {entry.get('id')}, and with the tokens of "
                f"this file it gets {own}, as if others were missing; {remedy}"
            )
    stored = read_json(settings).get("added_tokens_decoder") if settings.is_file() else None
    stored = {str(number): entry for number, entry in stored.items()} if isinstance(stored, dict) else {}
    vocabulary = content.get("model", {}).get("vocab") or ()  # an object, or a list of tokens and scores
    names = {token[0] if isinstance(token, list) else token for token in vocabulary}
    names |= {entry.get("content") for entry in added}
    for token, own in tokenizer.get_added_vocab().items() if known else ():
        other = stored.get(str(own))
        if token not in names and (other.get("content") if isinstance(other, dict) else other) != token:
            raise OspoError(f"model: {path} has no token {token!r:.60}, which {settings} names; {remedy}")


def _entries(entry: Any) -> Iterator[Any]:
    """Yield an entry of tokenizer.json and those that it is a sequence of."""
    yield entry
    for key in ("normalizers", "pretokenizers", "processors", "decoders") if isinstance(entry, dict) else ():
        found = entry.get(key)
        for inner in found if isinstance(found, list) else ():
            yield from _entries(inner)


def _lengths(value: Any) -> Iterator[int]:
    """Yield the length of each list in a value of JSON."""
    if isinstance(value, list):
        yield len(value)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _lengths(inner)


def _growth(entry: dict[str, Any]) -> float:
    """Return the most bytes that an entry makes of one, by its type and by the fields of Replace and Prepend."""
    pattern, content, before = (entry.get(name) for name in ("pattern", "content", "prepend"))
    growth = float(_GROWTH[entry["type"]])
    if isinstance(before, str):
        growth = max(growth, 1.0 + _size(before))
    if isinstance(pattern, dict) and isinstance(content, str):
        text = pattern.get("String")  # else a regular expression, which can match between any two characters
        plain = isinstance(text, str) and text
        growth = max(growth, _size(content) / _size(plain) if plain else 1.0 + _size(content))
    return growth


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def weight_files(folder: Path, *, pickled: bool = False) -> list[Path]:
    """Return the files that the weights are taken from: one, or those of an index. Raises OspoError.

    With `pickled`, where there are no safetensors, they can also be files of `torch.save`.
    """
    names = ("model.safetensors", *(["pytorch_model.bin"] if pickled else []))
    for single, index in ((folder / name, folder / f"{name}.index.json") for name in names):
        if single.is_file():
            return [single]
        if index.is_file():
            return _indexed_files(index, single.suffix)
    known = ", or ".join(f"{name}, or {name}.index.json and its files" for name in names)
    raise OspoError(f"model: {folder} holds no weights ({known}); {_AGAIN}")


def _indexed_files(index: Path, suffix: str) -> list[Path]:
    folder, names = index.parent, read_json(index).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    files = [folder / name for name in names]
    for file in files:
        # Path.is_file raises for long names.
        if file.parent != folder or file.suffix != suffix or not os.path.isfile(file):  # noqa: PTH113
            raise OspoError(f"model: {index} names {file.name!r:.60}, which is no *{suffix} of its folder; {_AGAIN}")
    return files


def check_sizes(folder: Path) -> None:
    """Raise OspoError unless the weights are those that config.json describes, before memory or time depend on it.

    transformers fills tensors that are missing or of another size at random, before it refuses the latter.
    """
    import torch

    path, files = folder / "config.json", weight_files(folder)
    config, shapes = read_json(path), tensor_shapes(files)
    check_counts(path, config, len(shapes))
    family = find_family(config, str(folder))
    model_class = family.transformers_class(family.model_class)
    with torch.device("meta"):
        empty = model_class(model_class.config_class.from_pretrained(str(folder)))
    tensors, packed = empty.state_dict(keep_vars=True), config.get("quantization_config")
    found = set()
    for name, tensor in tensors.items() if not packed else ():
        if name in shapes:
            found.add(id(tensor))  # tied tensors are one
            check_shape(path, name, list(tensor.shape), shapes[name])
    size, most = sum(weight.numel() for weight in empty.parameters()), sum(file.stat().st_size for file in files)
    if size > _MAX_PACKED * most:
        raise OspoError(
            f"model: by {path}, the model has {size} weights, expected at most {_MAX_PACKED} for each of the {most} "
            f"bytes of its files; {_AGAIN}"
        )
    if packed or all(id(tensor) in found for tensor in tensors.values()):
        return
    # transformers also knows names of earlier versions.
    _, info = model_class.from_pretrained(
        None,
        config=empty.config,
        state_dict={name: torch.empty(shape, device="meta") for name, shape in shapes.items()},
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    for name, shape, built in sorted(info["mismatched_keys"]):
        check_shape(path, name, list(built), list(shape))
    refuse_missing(info["missing_keys"], str(folder), _AGAIN)


def check_counts(path: Path, config: Mapping[str, Any], count: int) -> None:
    """Raise OspoError for a number of layers in a config.json above `count`, the number of tensors of the weights."""
    for section, values in (("", config), *config.items()):
        for key in _COUNTS if isinstance(values, dict) else ():
            value = values.get(key)
            value = len(value) if isinstance(value, list) else value
            if isinstance(value, (int, float)) and value > count:
                raise OspoError(
                    f"model: {key} in {path}{section and f' ({section})'} is {value}, expected at most {count}, as "
                    f"many as the weights have tensors; {_AGAIN}"
                )


def check_shape(path: Path, name: str, built: list[int], shape: list[int]) -> None:
    """Raise OspoError unless a tensor has the shape that a configuration gives it."""
    if built != shape:
        raise OspoError(
            f"model: by {path}, {name} has the shape {built}, expected that of the weights, {shape}; {_AGAIN}"
        )


def refuse_missing(names: Iterable[str], source: str, remedy: str) -> None:
    """Raise OspoError for tensors that weights lack, which transformers initializes at random."""
    if missing := sorted(names):
        raise OspoError(f"model: {source} lacks {len(missing)} tensors of the model ({missing[0]}, …); {remedy}")


def refuse_unknown(names: Iterable[str], module: torch.nn.Module, source: str, remedy: str) -> None:
    """Raise OspoError for tensors of parts that a list of `module` does not have, such as layers beyond the last one.

    They were left out, so that what the config.json describes is another model. Of tensors elsewhere, which a
    published file may have for other uses, transformers warns.
    """
    modules = dict(module.named_modules())
    found = []
    for name in sorted(names):
        parts = name.split(".")
        for n, part in enumerate(parts):
            parent, own = ".".join(parts[:n]), ".".join(parts[: n + 1])
            if part.isdecimal() and type(modules.get(parent)).__name__ == "ModuleList" and own not in modules:
                found.append(name)
                break
    if found:
        raise OspoError(
            f"model: {source} has {len(found)} tensors ({found[0]}, …) of more parts than its config.json describes; "
            f"{remedy}"
        )


def check_adapter(folder: Path) -> dict[str, Any]:
    """Return the adapter_config.json of a LoRA folder. Raises OspoError if its weights do not bear it out."""
    path = folder / "adapter_config.json"
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise OspoError(
            f"model: {path} has peft_type {config.get('peft_type')!r:.60}, expected 'LORA'; merge an adapter of "
            "another kind into its model and save that"
        )
    if config.get("megatron_config") or config.get("megatron_core") not in (None, "megatron.core"):
        raise OspoError(f"model: {path} has megatron_config or megatron_core, which name code; remove these entries")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise OspoError(f"model: {folder} holds no {ADAPTER_WEIGHTS}; save the adapter with safetensors")
    for key in _PATTERN_KEYS:
        value = config.get(key) or ()
        for name in (value,) if isinstance(value, str) else value:
            if not isinstance(name, str) or not _PLAIN.fullmatch(name):
                raise OspoError(
                    f"model: {path} has {name!r:.60} in {key}, expected names of modules without patterns; write the "
                    "names out"
                )
    shapes = tensor_shapes([folder / ADAPTER_WEIGHTS])
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    # peft fills matrices of that rank at random before it compares them with the weights.
    for rank in (config.get("r"), *(config.get("rank_pattern") or {}).values()):
        if isinstance(rank, (int, float)) and rank > largest:
            raise OspoError(
                f"model: {path} has the rank {rank}, expected at most {largest}, the largest size in the adapter's "
                f"weights; {_ADAPTER_AGAIN}"
            )
    init = str(config.get("init_lora_weights"))
    if not _INIT.fullmatch(init):
        raise OspoError(f"model: {path} has init_lora_weights {init!r:.60}, which is no method of peft; use true")
    for section, values in config.items():
        for key, value in values.items() if isinstance(values, dict) and section not in _PATTERN_KEYS else ():
            if isinstance(value, (int, float)) and value > _MAX_SETTING:
                raise OspoError(
                    f"model: {path} has {section}.{key} {value}, expected at most {_MAX_SETTING}; {_ADAPTER_AGAIN}"
                )
    config.pop("runtime_config", None)  # which peft ignores in a file, and takes as an object elsewhere
    return config


def match_targets(config: dict[str, Any], folder: Path, module: torch.nn.Module) -> dict[str, Any]:
    """Replace the regular expressions among the targets of an adapter with the names of modules that they match.

    The expressions of others can take exponential time in `re`, which peft uses. `regex` ends them in time.
    """
    import regex

    ends = time.monotonic() + _MATCH_SECONDS
    result = dict(config)
    for key in ("target_modules", "exclude_modules"):
        pattern = config.get(key)
        if not isinstance(pattern, str) or pattern.lower() == "all-linear":
            continue
        place = f"model: {folder / 'adapter_config.json'} has {key} {pattern!r:.60}"
        try:
            if len(pattern) > _MAX_PATTERN:
                raise TimeoutError
            names = [
                name
                for name, _ in module.named_modules()
                if regex.fullmatch(pattern, name, timeout=max(ends - time.monotonic(), 1e-3))
            ]
        except TimeoutError:
            raise OspoError(
                f"{place}, which takes too long to match; write the names of the modules as a list"
            ) from None
        if key == "target_modules" and not names:
            raise OspoError(f"{place}, which matches no module of the base model; check its base_model_name_or_path")
        result[key] = names
    return result


def check_adapter_fits(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], base: Path) -> None:
    """Do `check_adapter_tensors` by the configuration of a base model alone, without its weights."""
    sizes = {name: value for name, value in read_config(base).items() if name != "architectures"}
    module = find_family(sizes, str(base)).build_empty(sizes)
    check_adapter_tensors(folder, match_targets(config, folder, module), tensors, module)


def check_adapter_tensors(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], module: torch.nn.Module
) -> None:
    """Raise OspoError unless the tensors of an adapter are finite and exactly those that it needs on `module`.

    peft only warns of missing ones, which it fills at random. Here it fills a model without memory.
    """
    import peft
    import torch

    with torch.device("meta"):
        empty = type(module)(module.config)
        plain = peft.LoraConfig.from_peft_type(**{**config, "init_lora_weights": True})
        wrapped = peft.PeftModel(empty, plain)
    found = peft.set_peft_model_state_dict(wrapped, {name: tensor.to("meta") for name, tensor in tensors.items()})
    own, absent = wrapped.state_dict(keep_vars=True), set(found.missing_keys)
    there = {id(tensor) for name, tensor in own.items() if name not in absent}  # tied tensors are one
    for problem, names in (
        ("are not finite", [name for name, tensor in tensors.items() if not tensor.isfinite().all()]),
        # Names without ".default" are of the base model.
        ("are missing", [name for name in absent if ".default" in name and id(own.get(name)) not in there]),
        ("are unknown to the model", found.unexpected_keys),
    ):
        if names:
            raise OspoError(
                f"model: {len(names)} tensors of the adapter {folder} {problem} ({', '.join(sorted(names)[:2])}, …); "
                f"{_ADAPTER_AGAIN}, or check its base_model_name_or_path"
            )


def tensor_shapes(files: Sequence[Path]) -> dict[str, list[int]]:
    """Return the shape of each tensor in safetensors files, whose headers hold them."""
    from safetensors import safe_open

    shapes = {}
    for path in files:
        with reading("weights", path, _AGAIN), safe_open(regular(path), framework="pt") as file:
            shapes.update({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118 (no mapping)
    return shapes
