"""The tokenizer of Emu3.5, made of the files of the official code in the form of `tokenizers`. Light to import."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from ospo_fast.files import read_bytes, reading

RANKS, VISION_TOKENS = "emu3.tiktoken", "emu3_vision_tokens.txt"
NAMED_TOKENS: dict[str, Any] = {
    "bos_token": "<|extra_203|>",
    "eos_token": "<|extra_204|>",
    "pad_token": "<|endoftext|>",
    "extra_special_tokens": {
        "image_token": "<|image token|>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
    },
}
"""Arguments of a tokenizer of transformers."""
_STRUCTURE = ("<|image token|>", "<|image start|>", "<|image end|>")
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXTRA = 205  # tokens <|extra_0|> …
AGAIN = "copy src/tokenizer_emu3_ibq/ of the official code (baaivision/Emu3.5) into the folder"


def build_tokenizer(folder: Path) -> Any:
    """Build a tokenizer of transformers from `emu3.tiktoken` and `emu3_vision_tokens.txt` of a folder.

    A line of the former is a token in base 64 and its rank, by which pairs of tokens are merged. The ids of special
    tokens follow the ranks.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path, vision_path = folder / RANKS, folder / VISION_TOKENS
    with reading("ranks", path, AGAIN):
        lines = [line.split() for line in read_bytes(path).decode().splitlines() if line.strip()]
        if bad := [n for n, line in enumerate(lines) if len(line) != 2 or not line[1].isdecimal()]:
            raise ValueError(f"line {bad[0] + 1} is not a token and its rank")
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if sorted(ranks.values()) != list(range(len(ranks))) or len(lines) != len(ranks):
            raise ValueError("its ranks are not 0, 1, 2 …, each once")
    with reading("tokens", vision_path, AGAIN):
        vision = read_bytes(vision_path).decode().split("\n")
        vision = [token.strip() for token in vision if token.strip()]
        for n, token in enumerate(vision):
            expected = _STRUCTURE[n] if n < len(_STRUCTURE) else f"<|visual token {n - len(_STRUCTURE):06d}|>"
            if token != expected:
                raise ValueError(f"token {n + 1} is {token!r:.40}, expected {expected!r}")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(_EXTRA)), *vision]

    letters = bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for whole in sorted(ranks, key=ranks.__getitem__):
        pairs = [(whole[:i], whole[i:]) for i in range(1, len(whole))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    tokenizer = Tokenizer(
        models.BPE(
            {text(token): rank for token, rank in ranks.items()},
            [(text(first), text(second)) for first, second in merges],
            ignore_merges=True,
        )
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **NAMED_TOKENS)
