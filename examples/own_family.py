"""A family of your own: a whole adapter of a text-and-image decoder, to copy.

The toy family is a tiny random Llama of transformers. Its vocabulary has words, the codes of images and an end-of-row
token. An image is 4 x 4 codes, and a code is a gray value. Comments that begin with "Replace" say what your family has
there; docs/families.md explains each member.

    python examples/own_family.py --out image.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ospo_fast as of
from ospo_fast.models.adapter import VocabularyAdapter, fit_images, refuse_other_size
from ospo_fast.models.base import Message
from ospo_fast.models.layout import ImageLayout
from ospo_fast.stages.teacher_forcing import hidden_states, teacher_forced

GRAYS, GRID, PIXELS = 16, (4, 4), 8  # codes of the codebook, codes of an image, pixels of a side of a code
SIZE = (GRID[0] * PIXELS, GRID[1] * PIXELS)
SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<boi>", "<eoi>", "<image>", "<eol>"]
WORDS = ["a", "dark", "bright", "square", "is", "it", "?", "yes", "no", "system", "user", "assistant"]


class ToyAdapter(VocabularyAdapter):
    """Adapter of a toy model. `ospo_fast.models.base.UnifiedModel` documents the members."""

    decoder_path = "model"  # Replace: where the module has its decoder; `head_path` is that of its head, "lm_head"
    # Replace: `special_tokens`, where the tokenizer has other names for the tokens of images than boi_token, eoi_token
    # and image_token.

    def __init__(self, module: Any, processor: Any, *, name: str, image_size: tuple[int, int] | None = None) -> None:
        refuse_other_size(name, image_size, [SIZE])  # Replace: the sizes that the model knows
        # Replace: `ImageLayout((GRID,))` without structure tokens. Layout and codes are set before super().__init__.
        self.layout = ImageLayout.rows(GRID, self.vocabulary_id(processor, "<eol>", name))
        # Replace: the id of each code, which config.json or the tokenizer knows.
        code_ids = {code: self.vocabulary_id(processor, f"code{code}", name) for code in range(GRAYS)}
        super().__init__(
            module, processor, name=name, text=module.config, code_ids=code_ids, num_codes=len(code_ids)
        )  # fmt: skip

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of images in pixels."""
        return SIZE

    # Texts. Replace: the formats that the model was trained with, token by token.

    def _split_template(self) -> tuple[str, str]:
        return "<s>", "<boi>"  # before and behind the prompt of an image; the last token is begin-of-image

    def unconditional(self, ids: Tensor) -> Tensor:
        """Return the prompt for guidance: one without words."""
        return torch.tensor([self.bos_id, self.boi_id])

    def _image_text(self) -> str:
        return f"<boi>{'<image>' * self.layout.tokens}<eoi>"  # as many as `embed_images` returns for an image

    def _chat_text(self, messages: list[Message], image: bool) -> str:
        # Replace: `return self._render_image_chat(messages, image)`, where the processor has a chat template.
        last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
        turns = [
            f"{message['role']} {self._image_text() if image and n == last else ''}{message['content']}"
            for n, message in enumerate(messages)
        ]
        return " ".join(["<s>", *turns, "assistant"])

    # Pixels. Replace: the decoder and the encoder of the VQ model.

    def _decode(self, codes: Tensor) -> Tensor:  # (N, T) → (N, 3, H, W), of which [0, 1] is shown
        grays = codes.view(-1, 1, *GRID).float() / (GRAYS - 1)
        return grays.repeat_interleave(PIXELS, 2).repeat_interleave(PIXELS, 3).expand(-1, 3, -1, -1)

    def _pixels(self, images: list[Image.Image]) -> Tensor:  # → (N, 3, H, W), normalized as the encoder takes it
        return fit_images(images, SIZE, mean=[0.0] * 3, std=[1.0] * 3).to(self.device, self.dtype)

    def _encode_pixels(self, pixels: Tensor) -> Tensor:  # (N, 3, H, W) → (N, T)
        grays = torch.nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), PIXELS)
        return (grays * (GRAYS - 1)).round().long().flatten(1)


def build_model() -> ToyAdapter:
    """Build a random model. Replace: `from_pretrained` of its class and of its processor."""
    vocabulary = [*SPECIAL, *WORDS, *(f"code{code}" for code in range(GRAYS))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"},
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    return ToyAdapter(LlamaForCausalLM(config).eval(), SimpleNamespace(tokenizer=fast), name="toy")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Generate two images of a prompt, and take one step of training on them: the darker one is chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the first image to this file")
    args = parser.parse_args(argv)

    model, prompt = build_model(), "a dark square"
    generator = of.ImageGenerator(model)
    codes = generator.generate([prompt], num_images=2, seeds=[0, 1], guidance_scale=3.0, output="codes")  # (2, 16)
    images = model.decode_codes(codes)
    if args.out:
        images[0].save(args.out)

    codes = codes[codes.sum(1).argsort()]  # chosen, rejected
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=1e-3)
    loss_fn = of.OSPOLoss(of.OSPOLossConfig.preset("v3"))
    losses: list[float] = []
    for _ in range(2):  # before the step, and after it
        batch = teacher_forced(model, [model.image_prompt(prompt)] * 2, codes)
        loss = loss_fn(hidden_states(model, batch.embeds), batch.labels, model.head).loss
        optimizer.zero_grad()
        loss.backward()
        if not losses:
            optimizer.step()
        losses.append(loss.item())
    print(f"grays of the chosen image:\n{codes[0].view(GRID)}\nloss {losses[0]:.4f}, after one step {losses[1]:.4f}")
    return {"codes": codes, "images": images, "losses": losses}


if __name__ == "__main__":
    main()
