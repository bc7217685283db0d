"""The code of the guides in docs/ runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ospo_fast

DOCS = Path(__file__).parents[1] / "docs"


def attention_names() -> dict[str, Any]:
    from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        vocab_size=30, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, eos_token_id=None,
    )  # fmt: skip
    bart = BartConfig(
        vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    return {
        "of": ospo_fast,
        "model": LlamaForCausalLM(llama).eval(),
        "seq2seq": BartForConditionalGeneration(bart).eval(),
        "ids": torch.randint(3, 30, (1, 20)),
        "decoder_ids": torch.randint(3, 30, (1, 8)),
        "start": 20,
        "image": Image.new("RGB", (48, 48), "white"),
        "grid_maps": torch.rand(1, 2, 6, 6),
    }


@pytest.mark.parametrize(("guide", "names"), [("attention.md", attention_names)])
def test_guide(guide: str, names: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / guide).read_text(encoding="utf-8"), re.DOTALL)
    namespace = names()
    with torch.no_grad():
        for block in blocks:
            exec(block, namespace)
    assert len(blocks) == 5
    assert namespace["steps"].shape == (1, 1, 7)
    assert [tuple(maps.shape) for maps in namespace["maps"]] == [(1, 2, 12)] * 2
    assert (tmp_path / "attention.png").is_file()
    assert namespace["capture"].maps.shape == (1, 1, 5)


def test_every_guide_is_run() -> None:
    without_code = {"configuration.md", "reference-run.md", "reliability.md"}
    assert {path.name for path in DOCS.glob("*.md")} == {"attention.md", *without_code}
    assert not [name for name in without_code if "```python" in (DOCS / name).read_text(encoding="utf-8")]
