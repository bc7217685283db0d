"""A tiny model in DeepSeek's layout, written without the code under test.

Names and shapes are those of DeepSeek's classes at these sizes; the values follow from the names. golden.npz has what
DeepSeek's classes compute with them.
"""

from __future__ import annotations

import itertools
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).parent
SPECIAL = tuple(f"<\uff5c{name}\uff5c>" for name in ("begin▁of▁sentence", "end▁of▁sentence", "▁pad▁"))
TAGS = ("<image_placeholder>", "<begin_of_image>", "<end_of_image>", "<|User|>", "<|Assistant|>")
TOWER = {"width": 32, "layers": 2, "heads": 4, "patch_size": 4, "mlp_ratio": 2}
VQ = {"ch": 32, "ch_mult": [1, 1, 2], "num_res_blocks": 1, "z_channels": 16}
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, CODES, CODE_SIZE, SIDE = 32, 48, 2, 4, 2, 64, 8, 16
Shapes = dict[str, tuple[int, ...]]


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE, which LlamaTokenizer of transformers would rebuild as another one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("y", "e"), ("ye", "s"), ("n", "o"), ("Y", "e"), ("Ye", "s"), ("N", "o"), ("Ġ", "a")]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *TAGS)])
    return tokenizer


VOCABULARY = 256 + 7 + len(SPECIAL) + len(TAGS)


def config(*, tied: bool = False, dtype: str = "float32") -> dict[str, Any]:
    def projector(kind: str, inner: int) -> dict[str, Any]:
        params = {"depth": 2, "input_dim": inner, "n_embed": HIDDEN, "projector_type": "mlp_gelu"}
        return {"cls": "MlpProjector", "model_type": kind, "params": params}

    language = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "max_position_embeddings": 128,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "torch_dtype": dtype,
        "vocab_size": VOCABULARY,
    }
    head = {"image_token_embed": HIDDEN, "image_token_size": CODES, "n_embed": HIDDEN}
    vision = {"image_size": SIDE, "model_name": "siglip_large_patch16_384", "select_feature": "same"}
    return {
        "aligner_config": projector("aligner", TOWER["width"]),
        "architectures": ["MultiModalityCausalLM"],
        "gen_aligner_config": projector("gen_aligner", CODE_SIZE),
        "gen_head_config": {"cls": "vision_head", "model_type": "gen_head", "params": head},
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": CODES, "n_embed": CODE_SIZE, **VQ},
        },
        "language_config": {**language, **({"tie_word_embeddings": True} if tied else {})},
        "model_type": "multi_modality",
        "torch_dtype": dtype,
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {**vision, "select_layer": -1, **TOWER},
        },
    }


def read_keys(path: Path) -> Shapes:
    """Return names and shapes of a list: `a.[0-2,4].b.* 3x2 3` has four modules, with a weight and a bias each."""
    result: Shapes = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        name, *sizes = line.split()
        shapes = [tuple(map(int, size.split("x"))) for size in sizes]
        parts = [_numbers(part) if i % 2 else [part] for i, part in enumerate(re.split(r"\[([\d,-]+)\]", name))]
        for chosen in map("".join, itertools.product(*parts)):
            if chosen.endswith(".*"):
                result |= {chosen[:-1] + "weight": shapes[0], chosen[:-1] + "bias": shapes[1]}
            else:
                result[chosen] = shapes[0]
    return result


def _numbers(text: str) -> list[str]:
    spans = [span.split("-") for span in text.split(",")]
    return [str(i) for span in spans for i in range(int(span[0]), int(span[-1]) + 1)]


def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The same values of a name everywhere: the stream of RandomState is fixed."""
    drawn = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if re.search(r"norm\w*\.weight$", name):
        drawn = 1 + 0.2 * drawn
    elif len(shape) > 1 and "embed" not in name:
        drawn = drawn / np.sqrt(np.prod(shape[1:]))
    else:
        drawn = 0.3 * drawn
    return torch.from_numpy(drawn.astype(np.float32))


def tensors(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    result = {name: value(name, shape).to(dtype) for name, shape in read_keys(HERE / "deepseek_tiny_keys.txt").items()}
    if tied:
        result["language_model.lm_head.weight"] = result["language_model.model.embed_tokens.weight"].clone()
    return result


def write_files(folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
    """Write all files but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    bos, eos, pad = SPECIAL
    special = {"additional_special_tokens": list(TAGS), "bos_token": bos, "eos_token": eos, "pad_token": pad}
    for name, content in (
        ("config.json", config(tied=tied, dtype=str(dtype).removeprefix("torch."))),
        (
            "preprocessor_config.json",
            {
                "background_color": [127, 127, 127],
                "do_normalize": True,
                "image_mean": [0.5, 0.5, 0.5],
                "image_processor_type": "VLMImageProcessor",
                "image_size": SIDE,
                "image_std": [0.5, 0.5, 0.5],
                "min_size": 2,
                "processor_class": "VLChatProcessor",
                "rescale_factor": 1 / 255,
            },
        ),
        (
            "processor_config.json",
            {
                "add_special_token": False,
                "ignore_id": -100,
                "image_tag": TAGS[0],
                "mask_prompt": True,
                "num_image_tokens": 16,
                "processor_class": "VLChatProcessor",
                "sft_format": "deepseek",
            },
        ),
        ("special_tokens_map.json", special),
        (
            "tokenizer_config.json",
            {
                **special,
                "add_bos_token": True,
                "add_eos_token": False,
                "model_max_length": 16384,
                "tokenizer_class": "LlamaTokenizerFast",
                "unk_token": None,
            },
        ),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_weights(
    folder: Path, weights: dict[str, torch.Tensor], *, form: str = "safetensors", shards: int = 1
) -> None:
    """Write weights as safetensors or as files of torch.save (bin), in one file or several with an index."""
    from safetensors.torch import save_file

    stem = "model" if form == "safetensors" else "pytorch_model"
    save = save_file if form == "safetensors" else torch.save
    if shards == 1:
        save(weights, folder / f"{stem}.{form}")
        return
    places = {name: f"{stem}-{i % shards + 1:05}-of-{shards:05}.{form}" for i, name in enumerate(weights)}
    for place in sorted(set(places.values())):
        save({name: weights[name] for name in weights if places[name] == place}, folder / place)
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps(index))


TARGETS = ("q_proj", "down_proj")
TRAINER = "model.language_model.base_model.model."


def trainer_state(
    weights: dict[str, torch.Tensor], *, rank: int = 2, dtype: torch.dtype = torch.float32, whole: bool = True
) -> dict[str, torch.Tensor]:
    """The state_dict of the official trainer with LoRA on TARGETS: of the whole model, or of the matrices alone."""
    state = {}
    for name, tensor in weights.items():
        head, _, last = name.rpartition(".")
        if head.rpartition(".")[2] not in TARGETS or not name.startswith("language_model.model.layers."):
            inner = name.removeprefix("language_model.")
            state[f"model.{name}" if inner == name else TRAINER + inner] = tensor
            continue
        place = TRAINER + head.removeprefix("language_model.")
        state[f"{place}.base_layer.{last}"] = tensor
        for side, shape in (("A", (rank, tensor.shape[1])), ("B", (tensor.shape[0], rank))):
            state[f"{place}.lora_{side}.default.weight"] = value(f"{place}.{side}", shape).to(dtype)
    return state if whole else {name: tensor for name, tensor in state.items() if ".lora_" in name}


def write_trainer_file(path: Path, state: dict[str, torch.Tensor], base: str | None, **lora: Any) -> None:
    """Write a checkpoint as Lightning does, and the config.yaml of the official trainer, which is JSON, next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": {"model_path": base, "cache_dir": None, "attn_mode": "eager"},
        "use_peft": True,
        "lora": {"lora_rank": 2, "lora_alpha": 6, "lora_dropout": 0.05, "target_modules": list(TARGETS), **lora},
    }
    (path.parent / "config.yaml").write_text(json.dumps(settings, indent=4))
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}}
    checkpoint = {
        "epoch": 0,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.1",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_loop.batch_progress": {"total": {"ready": 3}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": None, "best_k_models": {}}},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.95), "params": [0]}]}],
        "lr_schedulers": [{"last_epoch": 3, "_last_lr": [1e-5]}],
    }
    torch.save(checkpoint, path)
