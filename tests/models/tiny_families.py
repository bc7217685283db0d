"""Tiny random models of each family (up to 0.3 M parameters), with tokenizers in the form of the published ones."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ospo_fast.models.adapter import Adapter
from ospo_fast.models.families import FAMILIES

CODES = 24
WORDS = "yes no Yes No a red blue green circle square cross two and Questions: ? Is there the image user assistant"


@functools.cache
def _byte_level() -> str:
    """A byte-level BPE of a few merges, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + 60, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS, " ".join(WORDS.split()[::-1])] * 20, trainer)
    return str(tokenizer.to_str())


def build_tokenizer(special: list[str], plain: list[str] | None = None, **attributes: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens; attributes: names of transformers → tokens. plain: before the special."""
    tokenizer = Tokenizer.from_str(_byte_level())
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain or []])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **attributes)


def randomize(module: torch.nn.Module, seed: int = 0, gain: float = 6.0) -> Any:
    """Enlarge the weights of the decoder, so that codes, answers and attention depend on the prompt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "vqmodel" in name or "visual" in name:
                if weight.dim() > 1:
                    weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
            elif weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) * gain * 0.02)
            else:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return module.eval()


EMU3_CHAT = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_emu3(*, image_area: int = 64, layers: int = 2, **sizes: int) -> tuple[Any, Any]:
    from transformers import (
        Emu3Config,
        Emu3ForConditionalGeneration,
        Emu3ImageProcessor,
        Emu3Processor,
        Emu3TextConfig,
        Emu3VQVAEConfig,
        GenerationConfig,
    )

    structure = ["<|endoftext|>", "<image>", *(f"<|extra_{n}|>" for n in (200, 201, 203, 204))]
    structure += ["<|image token|>", "<|image start|>", "<|image end|>"]
    visual = [f"<|visual token {code:06d}|>" for code in range(CODES)]
    tokenizer = build_tokenizer(
        [*structure, *visual],
        bos_token="<|extra_203|>",
        eos_token="<|extra_204|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "image_token": "<image>",
            "boi_token": "<|image start|>",
            "eoi_token": "<|image end|>",
            "image_wrapper_token": "<|image token|>",
            "eof_token": "<|extra_201|>",
        },
    )
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = Emu3TextConfig(
        vocab_size=len(tokenizer),
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            **sizes,
        },
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=tokenizer.pad_token_id,
        **ids,
    )
    vq = Emu3VQVAEConfig(
        codebook_size=CODES, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1],
        num_res_blocks=0, attn_resolutions=[], hidden_size=32, temporal_downsample_factor=1,
    )  # fmt: skip
    config = Emu3Config(
        text_config=text, vq_config=vq, vocabulary_map={**tokenizer.get_vocab()}, tie_word_embeddings=False
    )
    module = Emu3ForConditionalGeneration(config)
    module.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, **ids)
    processing = Emu3ImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, spatial_factor=2)
    processor = Emu3Processor(processing, tokenizer, chat_template=EMU3_CHAT)
    processor.image_area = image_area
    return randomize(module), processor


def build_emu3_5(**sizes: int) -> tuple[Any, Any]:
    from transformers import Emu3ImageProcessor, Emu3Processor, GenerationConfig

    from ospo_fast.models.emu3_5 import Emu35Config, Emu35ForCausalLM
    from ospo_fast.models.emu3_5_tokenizer import NAMED_TOKENS

    structure = ["<|endoftext|>", *(f"<|extra_{n}|>" for n in (100, 200, 201, 203, 204))]
    structure += ["<|image token|>", "<|image start|>", "<|image end|>"]
    visual = [f"<|visual token {code:06d}|>" for code in range(CODES)]
    tokenizer = build_tokenizer([*structure, *visual], **NAMED_TOKENS)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Emu35Config(
        vocab_size=len(tokenizer),
        **{
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 32, **sizes,
        },
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        vocabulary_map={token: tokenizer.convert_tokens_to_ids(token) for token in [*structure, visual[0]]},
        vq_config={
            "embed_dim": 4, "num_embeddings": CODES, "latent_channels": 4, "resolution": 16, "base_channels": 32,
            "channel_multiplier": [1, 1], "num_res_blocks": 1, "attn_resolutions": [8],
        },
        **ids,
    )  # fmt: skip
    module = Emu35ForCausalLM(config)
    module.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, **ids)
    return randomize(module), Emu3Processor(Emu3ImageProcessor(), tokenizer)


def build_chameleon(*, lumina: bool = False, decoder: bool = True, swin: bool = False, **sizes: int) -> tuple[Any, Any]:
    from transformers import (
        ChameleonConfig,
        ChameleonForConditionalGeneration,
        ChameleonImageProcessor,
        ChameleonProcessor,
        ChameleonVQVAEConfig,
        GenerationConfig,
    )

    from ospo_fast.models.chameleon import VQDecoder

    # The names of codes are in another order than their ids, as in the published vocabulary.
    digits = str.maketrans("0123456789", "ABCDEFGHIJ")
    order = [(7 * n + 3) % CODES for n in range(CODES)]
    visual = [f"IMGIMG{str(code).translate(digits)}Z" for code in order]
    reserved = [f"<reserved{n:05d}>" for n in (8706, 8799, *range(8800, 8810))]
    tokenizer = build_tokenizer(
        ["<s>", "<pad>", "</s>", "<unk>", "<racm3:break>", "<eoss>", "<image>", *reserved],
        visual,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        sep_token="<reserved08706>",
    )
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vq = ChameleonVQVAEConfig(
        num_embeddings=CODES, embed_dim=4, latent_channels=4, base_channels=32, channel_multiplier=[1, 1],
        num_res_blocks=0, resolution=8, attn_type="none",
    )  # fmt: skip
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, **sizes,
    }  # fmt: skip
    config = ChameleonConfig(
        vocab_size=len(tokenizer),
        vq_config=vq,
        vocabulary_map={**tokenizer.get_vocab()},
        max_position_embeddings=512,
        swin_norm=swin,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        **shape,
        **ids,
        **({"mask_image_logits": False} if lumina else {}),
    )
    module = ChameleonForConditionalGeneration(config)
    if decoder:
        module.model.vqmodel.decoder = VQDecoder(vq)
    module.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, **ids)
    processing = ChameleonImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return randomize(module), ChameleonProcessor(processing, tokenizer, image_seq_length=16)


def build_glm_image(*, target: tuple[int, int] = (64, 96), **sizes: int) -> tuple[Any, Any]:
    from transformers import (
        GenerationConfig,
        GlmImageConfig,
        GlmImageForConditionalGeneration,
        GlmImageImageProcessorPil,
        GlmImageProcessor,
    )

    # The ids of codes and of the tokens behind them come first, and rows of lm_head have the same numbers.
    vision = [f"<|dit_token_{n}|>" for n in range(CODES + 4)]
    base = Tokenizer.from_str(_byte_level())
    content = json.loads(base.to_str())
    shift = len(vision)
    content["model"]["vocab"] = {
        **{token: n for n, token in enumerate(vision)},
        **{token: n + shift for token, n in content["model"]["vocab"].items()},
    }
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in vision])
    others = ["<|endoftext|>", "<|image|>", "<sop>", "<eop>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in others])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        bos_token=f"<|dit_token_{CODES}|>",
        eos_token=f"<|dit_token_{CODES + 1}|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image|>", "grid_bos_token": "<sop>", "grid_eos_token": "<eop>"},
    )
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, **sizes,
    }  # fmt: skip
    frequencies = shape["hidden_size"] // shape["num_attention_heads"] // 4  # of half of the head
    config = GlmImageConfig(
        text_config={
            **shape,
            "vocab_size": len(fast),
            "vision_vocab_size": len(vision),
            "max_position_embeddings": 1024,
            "pad_token_id": fast.pad_token_id,
            "eos_token_id": CODES + 1,
            "attention_bias": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [frequencies // 2, frequencies // 4, frequencies // 4],
                "partial_rotary_factor": 0.5,
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "patch_size": 16,
            "image_size": 64,
            "spatial_merge_size": 1,
        },
        vq_config={"embed_dim": 8, "num_embeddings": CODES, "latent_channels": 16},
        image_token_id=fast.convert_tokens_to_ids("<|image|>"),
        image_start_token_id=CODES,
        image_end_token_id=CODES + 1,
    )
    module = GlmImageForConditionalGeneration(config)
    module.generation_config = GenerationConfig(pad_token_id=fast.pad_token_id, eos_token_id=CODES + 1)
    processing = GlmImageImageProcessorPil(
        patch_size=16, temporal_patch_size=1, merge_size=1, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 16, "longest_edge": 2**20},
    )  # fmt: skip
    processor = GlmImageProcessor(processing, fast)
    processor.target_h, processor.target_w = target
    return randomize(module), processor


class AllowedTokens:
    """A logits processor of transformers: at each step of an image, the codes or the one structure token."""

    def __init__(self, model: Any, prompt: int) -> None:
        self._codes, self._prompt = model.code_ids, prompt
        self._given = dict(model.layout.structure)
        self._mask: torch.Tensor | None = None

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the scores (B, V) of the next token."""
        if self._mask is None:
            self._mask = torch.full_like(scores[:1], -torch.inf)
            self._mask[:, self._codes] = 0
        given = self._given.get(ids.shape[1] - self._prompt)
        if given is None:
            return scores + self._mask
        forced = torch.full_like(scores, -torch.inf)
        forced[:, given] = 0
        return forced


_BUILDERS: dict[str, tuple[str, Callable[[], tuple[Any, Any]], tuple[int, int] | None]] = {
    "emu3": ("emu3", build_emu3, (8, 10)),
    "emu3_5": ("emu3_5", build_emu3_5, (8, 12)),
    "chameleon": ("chameleon", build_chameleon, None),
    "chameleon, swin": ("chameleon", functools.partial(build_chameleon, swin=True), None),
    "lumina": ("chameleon", functools.partial(build_chameleon, lumina=True), (8, 12)),
    "glm_image": ("glm_image", build_glm_image, (64, 96)),
}
VARIANTS = list(_BUILDERS)


def build(variant: str, name: str = "tiny") -> Adapter:
    """The adapter of a tiny random model."""
    family, builder, image_size = _BUILDERS[variant]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, processor = builder()
    return FAMILIES[family].adapt(module, processor, name=name, image_size=image_size)


def save_glm_pipeline(folder: Path, module: Any, processor: Any) -> Path:
    """Save a GLM-Image model as the folder of a pipeline of diffusers, of which the other parts are tiny and random."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, GlmImagePipeline, GlmImageTransformer2DModel
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    torch.manual_seed(0)
    pipeline = GlmImagePipeline(
        tokenizer=ByT5Tokenizer(),
        processor=processor,
        text_encoder=T5EncoderModel(T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        vision_language_encoder=module,
        vae=AutoencoderKL(
            block_out_channels=[8, 8, 8, 8], down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4, norm_num_groups=4, layers_per_block=1,
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4, sample_size=64,
        ),
        transformer=GlmImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            text_embed_dim=8, time_embed_dim=8, condition_dim=4, prior_vq_quantizer_codebook_size=CODES,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder
