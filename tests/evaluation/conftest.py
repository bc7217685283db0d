"""A tiny random vision-language model of transformers, and a language model without image input."""

from pathlib import Path

import pytest

WORDS = (
    *("<unk>", "<pad>", "<s>", "</s>", "<image>", "user", "assistant", ":", "?", ".", "Answer", "in", "one", "word"),
    *("yes", "Yes", "no", "No", "two", "2", "is", "there", "a", "red", "blue", "circle", "square", "how", "many"),
)
CHAT = (
    "{% for message in messages %}{{ message.role }} : {% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %} assistant :"
)


def save_tokenizer(folder: Path, words=WORDS, extra=None):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, extra_special_tokens=extra or {"image_token": "<image>"}
    )
    fast.save_pretrained(folder)
    return fast


def save_judge(folder: Path, words=WORDS) -> Path:
    """Save a LLaVA of two layers, whose images of 8 x 8 pixels are four tokens."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = save_tokenizer(folder, words)
    size = {"height": 8, "width": 8}
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 8}, crop_size=size), tokenizer, patch_size=4,
        vision_feature_select_strategy="default", chat_template=CHAT, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=8, patch_size=4, **sizes),
        text_config=LlamaConfig(vocab_size=len(words), max_position_embeddings=128, **sizes),
        image_token_index=words.index("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(8)  # so that answers depend on image and question
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="session")
def text_model(tmp_path_factory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("text")
    save_tokenizer(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes)).save_pretrained(folder)
    return folder
