"""Which layers the fused decoder may read, and that it calls quantized ones as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from ospo_fast.generation import ImageGenerator
from ospo_fast.generation.decoder import ROW_TILE, Cache, InferenceDecoder
from ospo_fast.generation.overrides import find_override
from ospo_fast.generation.projections import FusedProjection, ModuleProjection, build_projection, is_plain
from tests.quantization import CASES, copy_dequantized, linear_layers, use

if TYPE_CHECKING:
    from ospo_fast.models.adapter import Adapter

PROMPTS = ["a red circle", "two blue squares and a red circle", "a green cross"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.scripted import save_tiny

    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=CASES, ids=["-".join(case) for case in CASES])
def quantized(request: pytest.FixtureRequest, saved: Path, monkeypatch: pytest.MonkeyPatch) -> Adapter:
    from ospo_fast.models import load_model

    library, kind = request.param
    use(library, monkeypatch)
    return load_model(saved, quantize=kind)


def test_plain_layers_are() -> None:
    layer = nn.Linear(4, 4)
    assert is_plain(layer)
    assert isinstance(build_projection([layer], FusedProjection), FusedProjection)


def test_quantized_layers_are_not_plain(quantized: Adapter) -> None:
    """Their `weight` has the shape of a matrix, or is bytes: read as numbers, it would give other images silently."""
    assert not any(map(is_plain, linear_layers(quantized.decoder).values()))
    decoder = InferenceDecoder(quantized)
    assert all(isinstance(part, ModuleProjection) for layer in decoder.layers for part in layer.projections)
    assert not decoder.plain
    assert not decoder.packed
    assert find_override(quantized) is None


@torch.no_grad()
def loop(model: Any, ids: Tensor) -> list[int]:
    """Greedy codes by the model's own modules, without a cache."""
    embeds = model.embed_tokens(ids)[None]
    codes: list[int] = []
    for _ in range(model.layout.tokens):
        hidden = model.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1]
        codes.append(int(model.head(hidden).argmax()))
        embeds = torch.cat([embeds, model.embed_codes(torch.tensor([codes[-1:]]))], 1)
    return codes


def test_greedy_codes_are_those_of_the_own_modules(quantized: Adapter, saved: Path) -> None:
    from ospo_fast.models import load_model

    given: dict[str, Any] = {"seeds": [0] * 3, "output": "codes", "temperature": 0, "progress": False}
    codes = ImageGenerator(quantized).generate(PROMPTS, guidance_scale=1.0, **given)
    assert codes.tolist() == [loop(quantized, quantized.image_prompt(prompt)) for prompt in PROMPTS]
    plain = load_model(saved)
    whole = ImageGenerator(plain).generate(PROMPTS, guidance_scale=1.0, **given)
    assert not torch.equal(whole, codes)
    if not hasattr(quantized.module, "is_loaded_in_8bit"):  # bitsandbytes rounds activations too
        copy_dequantized(quantized, plain)
        rounded = ImageGenerator(plain).generate(PROMPTS, guidance_scale=1.0, **given)
        assert float((rounded == codes).float().mean()) > 0.9  # but for near-ties


@torch.no_grad()
def test_the_bits_of_a_row_do_not_depend_on_its_batch(quantized: Adapter) -> None:
    decoder = InferenceDecoder(quantized)
    x = torch.randn(4 * ROW_TILE, 6, quantized.hidden_size)

    def run(rows: Tensor) -> Tensor:
        cache = Cache(decoder, len(rows), 6)
        steps = [decoder(x[rows, :5], cache, 0)[:, -1], decoder(x[rows, 5:], cache, 5)[:, -1]]
        return torch.cat(steps, 1)

    whole = run(torch.arange(len(x)))
    for size in (ROW_TILE, 2 * ROW_TILE, 3 * ROW_TILE):  # what `pad_rows` runs
        rows = torch.randperm(len(x))[:size]
        assert torch.equal(run(rows), whole[rows])
