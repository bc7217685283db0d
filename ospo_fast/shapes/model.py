"""The models of the Shapes worlds: a `JanusForConditionalGeneration` of small sizes, and its processor.

It is saved by `save_pretrained` and loaded by the code that loads Janus-Pro.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from ospo_fast.shapes import grammar
from ospo_fast.shapes.scenes import (
    COLORS,
    KINDS,
    PLACES,
    RELATIONS,
    SHAPES,
    SHAPES_WORLD,
    World,
    descriptions,
)

if TYPE_CHECKING:
    from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<boi>", "<eoi>", "<|User|>", "<|Assistant|>")
PATCH = 8
GRID = SHAPES_WORLD.image_size // PATCH
CODES = 512
_CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] | lower == 'assistant' %}<|Assistant|>{% else %}<|User|>{% endif %}"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] | lower == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"
)


def _splitter() -> Any:
    """Split off punctuation; words keep the space before them, so that decoding restores the text."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[:;,?./\n]"), "isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True),
        ]
    )


def vocabulary(world: World = SHAPES_WORLD) -> list[str]:
    """List all tokens: the special ones, then the words of all prompts, questions and templates."""
    texts = [*COLORS, *SHAPES, *world.backgrounds, *world.sizes, *world.counts, *RELATIONS, *PLACES, *KINDS]
    texts += ["yes no Yes No none a"]
    texts += [grammar.stage1_answer(d) for kind in KINDS for d in descriptions(kind, world)[-40:]]
    texts += ["prompt replace: swap: drop: dense: questions: / on a background at the in and is are there the where"]
    texts += ["one object? two objects? Contrastive Prompt: Step 2. Prompt 1 Dense: Step 4. Prompt 2 Dense: Questions:"]
    splitter = _splitter()
    pieces = {piece for text in texts for piece, _ in splitter.pre_tokenize_str(" " + text)}
    return [*SPECIAL, *sorted(pieces)]


def build_tokenizer(world: World = SHAPES_WORLD) -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer."""
    from transformers import PreTrainedTokenizerFast

    tokens = vocabulary(world)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokens.index("<bos>"))]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
    )


def build_processor(world: World = SHAPES_WORLD) -> JanusProcessor:
    """Build the processor: tokenizer, image processor and chat template."""
    from transformers import JanusImageProcessorPil, JanusProcessor

    image_processor = JanusImageProcessorPil(
        size={"height": world.image_size, "width": world.image_size},
        min_size=PATCH,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    tokens = (world.image_size // PATCH) ** 2
    return JanusProcessor(image_processor, build_tokenizer(world), chat_template=_CHAT, num_image_tokens=tokens)


def build_config(
    world: World = SHAPES_WORLD, *, hidden: int = 128, layers: int = 5, intermediate: int = 384, heads: int = 4
) -> JanusConfig:
    """Build a configuration; the defaults are those of the shipped models."""
    from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    tokens, grid = vocabulary(world), world.image_size // PATCH
    ids = {name: tokens.index(f"<{name}>") for name in ("bos", "eos", "pad", "image")}
    text = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        initializer_range=hidden**-0.5,  # the usual 0.02 is for widths of thousands
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
        tie_word_embeddings=True,
    )
    vision = JanusVisionConfig(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=world.image_size,
        patch_size=PATCH,
        mlp_ratio=3.0,
        projection_dim=hidden,
        num_image_tokens=grid * grid,
    )
    codes = JanusVQVAEConfig(
        embed_dim=16 if world.textured else 8,
        num_embeddings=CODES,
        latent_channels=64,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1],
        num_res_blocks=0,
        num_patches=grid,
        projection_dim=hidden,
        num_hidden_layers=2,
        image_token_embed_dim=hidden,
    )
    return JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=codes,
        image_token_id=ids["image"],
        tie_word_embeddings=True,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        pad_token_id=ids["pad"],
        template_set=world.name,
    )


def build_model(seed: int = 0, world: World = SHAPES_WORLD, **sizes: int) -> JanusForConditionalGeneration:
    """Build a model with random weights, in fp32 on the CPU."""
    from transformers import JanusForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = JanusForConditionalGeneration(build_config(world, **sizes))
    tokens = vocabulary(world)
    settings = model.generation_config
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = (
        tokens.index(token) for token in ("<bos>", "<eos>", "<pad>")
    )
    settings.generation_kwargs = {"boi_token_id": tokens.index("<boi>")}
    return model.eval()
