"""Tiny random chat models of transformers: LLaVA, Gemma 3, Qwen2-VL, and Llama, which takes no images."""

import itertools
from pathlib import Path

import torch

from tests.evaluation.conftest import CHAT, WORDS, save_judge, save_tokenizer

FAMILIES = ("llava", "gemma3", "qwen2_vl", "llama")
MARKS = {"llava": "<image>", "gemma3": "<start_of_image>", "qwen2_vl": "<vision_start> <image_pad> <vision_end>"}
# The chat template of a tokenizer, which takes texts alone.
TEXT_CHAT = "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}assistant :"
PARTS_CHAT = CHAT.replace("{% endfor %}{% endfor %}", "{% endfor %} {% endfor %}")
_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def set_chat(folder: Path, template: str) -> Path:
    (folder / "chat_template.jinja").write_text(template)
    return folder


def save(family: str, folder: Path) -> Path:
    """Save a model whose images of 8 x 8 pixels are 4 tokens, with 128 positions (Llama: 2048)."""
    folder.mkdir(parents=True, exist_ok=True)
    if family == "llava":
        return set_chat(save_judge(folder), PARTS_CHAT)
    torch.manual_seed(1)
    module = {"gemma3": _gemma3, "qwen2_vl": _qwen2_vl, "llama": _llama}[family](folder)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.dim() == 2:
                weight.mul_(8)  # so that texts depend on the prompt
    module.save_pretrained(folder)
    return folder


def _llama(folder: Path):
    from transformers import LlamaConfig, LlamaForCausalLM

    save_tokenizer(folder)
    set_chat(folder, TEXT_CHAT)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **_SIZES))


def _gemma3(folder: Path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    special = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = (*WORDS, *special.values())
    tokenizer = save_tokenizer(folder, words, special)
    processor = Gemma3ImageProcessor(size={"height": 8, "width": 8})
    # Its template begins with the first token of the tokenizer, as the published one.
    chat = "<s> " + PARTS_CHAT.replace(MARKS["llava"], MARKS["gemma3"])
    Gemma3Processor(processor, tokenizer, chat_template=chat, image_seq_length=4).save_pretrained(folder)
    text = {**_SIZES, "vocab_size": len(words), "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128}
    text |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {**_SIZES, "num_hidden_layers": 1, "image_size": 8, "patch_size": 2}
    module = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**text, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1},
            vision_config=vision,
            mm_tokens_per_image=4,
            **{f"{kind}_token_index": words.index(special[f"{kind}_token"]) for kind in ("boi", "eoi", "image")},
        )
    )
    torch.nn.init.normal_(module.model.multi_modal_projector.mm_input_projection_weight)  # else 0: it sees nothing
    return module


def _qwen2_vl(folder: Path):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    special = {"image": "<image_pad>", "video": "<video_pad>", "vision_start": "<vision_start>"}
    special["vision_end"] = "<vision_end>"
    words = (*WORDS, *special.values())
    save_tokenizer(folder, words, {f"{name}_token": token for name, token in special.items()})
    # For texts and for parts: without torchvision, transformers opens its tokenizer alone.
    chat = PARTS_CHAT.replace(MARKS["llava"], MARKS["qwen2_vl"])
    chat = chat.replace("{% for part", "{% if message.content is string %}{{ message.content }}{% else %}{% for part")
    set_chat(folder, chat.replace("{% endfor %} {% endfor %}", "{% endfor %}{% endif %} {% endfor %}"))
    size = {"shortest_edge": 64, "longest_edge": 64}
    Qwen2VLImageProcessor(patch_size=2, merge_size=2, size=size).save_pretrained(folder)
    text = {**_SIZES, "vocab_size": len(words), "num_key_value_heads": 1, "max_position_embeddings": 128}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 2, "mlp_ratio": 1}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**text, "bos_token_id": 2, "eos_token_id": 3},
            vision_config=vision,
            **{f"{name}_token_id": words.index(token) for name, token in special.items()},
        )
    )


def save_speaker(folder: Path, sentence: str) -> Path:
    """Save a Llama that answers every chat with this sentence, whose words, all different, are in `WORDS`."""
    from transformers import LlamaForCausalLM

    save("llama", folder)
    module = LlamaForCausalLM.from_pretrained(folder)
    words = [":", *sentence.split(), "</s>"]
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()  # so that the next word depends on the last one alone
        module.lm_head.weight.zero_()
        for word, following in itertools.pairwise(words):
            embedded = module.model.embed_tokens.weight[WORDS.index(word)]
            module.lm_head.weight[WORDS.index(following)] = 1000 * embedded / embedded.norm()
    module.save_pretrained(folder)
    return folder
