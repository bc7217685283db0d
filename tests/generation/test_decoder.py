"""The lean forward pass against transformers', and the promise that a row's bits do not depend on its batch."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from ospo_fast.errors import OspoError
from ospo_fast.generation.decoder import ROW_TILE, Cache, LeanDecoder
from ospo_fast.models.janus import JanusUnifiedModel


class Bare:
    """As much of a unified model as the decoder looks at."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        self.decoder = decoder
        self.device = torch.device("cpu")
        self.dtype = torch.float32


def llama(**changes: object) -> LlamaModel:
    sizes = {
        "vocab_size": 10, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 64, **changes,
    }  # fmt: skip
    return LlamaModel(LlamaConfig(**sizes)).eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 2},  # grouped queries
        {"head_dim": 16},  # heads wider than hidden / heads
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
    ],
)
@torch.no_grad()
def test_hidden_states_are_transformers(changes: dict) -> None:
    model = llama(**changes)
    decoder = LeanDecoder(Bare(model))
    decoder.positions(24)
    x = torch.randn(5, 24, 48)
    expected = model(inputs_embeds=x).last_hidden_state
    # A prompt, a longer suffix on top of it, then single steps: the three ways in which the engine calls it.
    cache = Cache(decoder, 5, 24)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    parts = [decoder(x[:, :9], cache, 0), decoder(x[:, 9:16], cache, 9)]
    parts += [decoder(x[:, i : i + 1], cache, i) for i in range(16, 24)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rows_can_be_copied_and_viewed() -> None:
    decoder = LeanDecoder(Bare(llama()))
    decoder.positions(12)
    x = torch.randn(4, 12, 48)
    whole = Cache(decoder, 4, 12)
    expected = decoder(x, whole, 0)[:, 11]
    first = Cache(decoder, 4, 11)
    decoder(x[:, :11], first, 0)
    moved = Cache(decoder, 3, 12)
    order = torch.tensor([2, 0, 3])
    moved.copy_rows(first, order, 11)
    torch.testing.assert_close(decoder(x[order, 11:], moved, 11)[:, 0], expected[order])
    decoder(x[:1], whole.part(slice(3, 4)), 0)
    assert torch.equal(whole.keys[:, 3], cache_of(decoder, x[:1]).keys[:, 0])


def cache_of(decoder: LeanDecoder, x: torch.Tensor) -> Cache:
    cache = Cache(decoder, len(x), x.shape[1])
    decoder(x, cache, 0)
    return cache


def test_batches_are_filled_to_whole_tiles_or_to_the_batch_size() -> None:
    decoder = LeanDecoder(Bare(llama()))
    assert [decoder.filled(n, 7, 1000) for n in (1, ROW_TILE, ROW_TILE + 1)] == [ROW_TILE, ROW_TILE, 2 * ROW_TILE]
    # 32 rows of a large model would not fit beside its weights.
    assert [decoder.filled(n, 7, 2**30) for n in (1, 7)] == [7, 7]
    decoder.device = torch.device("cuda")
    assert [decoder.filled(n, 64, 1000) for n in (1, 64)] == [64, 64]


@pytest.mark.parametrize("threads", [1, 2])
@torch.no_grad()
def test_a_rows_bits_do_not_depend_on_its_batch(tiny: JanusUnifiedModel, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decoder = LeanDecoder(tiny)
        decoder.positions(16)
        x = torch.randn(8 * ROW_TILE, 16, tiny.hidden_size)

        def run(rows: torch.Tensor) -> torch.Tensor:
            cache = Cache(decoder, len(rows), 16)
            steps = [decoder(x[rows, :13], cache, 0)[:, -1]]
            steps += [decoder(x[rows, i : i + 1], cache, i)[:, -1] for i in range(13, 16)]
            hidden = torch.stack(steps, 1)
            return torch.cat((tiny.head(hidden[:, -1]), tiny.text_logits(hidden[:, -1]), hidden.flatten(1)), 1)

        whole = run(torch.arange(len(x)))
        for size in (1, 2, 3, 7):
            rows = torch.randperm(len(x))[: size * ROW_TILE]
            assert torch.equal(run(rows), whole[rows])
    finally:
        torch.set_num_threads(before)


def test_other_decoders_are_refused() -> None:
    other = torch.nn.Module()
    other.layers = torch.nn.ModuleList([torch.nn.Module()])
    other.layers[0].self_attn = torch.nn.Linear(2, 2)
    other.config = None
    with pytest.raises(OspoError, match="Llama"):
        LeanDecoder(Bare(other))
