"""Tiny random models of each family (up to 0.3 M parameters), with tokenizers in the form of the published ones."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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
