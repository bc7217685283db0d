"""attention_columns over the layers of a decoder, and AttentionCapture on a whole decoder, compared with peers.

The peers are reimplemented here without their other features:

- `output_attentions` with eager attention keeps the matrices of all layers.
- DAAM-style hooks run eager attention and gather the columns of each matrix.
- kvpress-style recomputation takes the softmax of the image's rows over all keys, in addition to the attention.
- The official mask path is `output_attentions`, then scikit-image's Otsu of each object on the host. It also encodes
  each image again, which is skipped here, because a model with random weights has no image to encode.

Cases: "columns, N in a batch", "decoder, N in a batch", and on a CPU "long, N tokens": peak memory of one layer with
one head over N tokens and 16 words, each variant in a new process (`_peak_rss.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _measure import Timing, ceilings, chosen, dtype_name, grown_memory, interleaved, peak_mb, row, show, write
from object_masks import skimage_masks
from torch import Tensor

import ospo_fast
from ospo_fast.ops.attention_columns import ColumnRequest, attention_columns_reference

if TYPE_CHECKING:
    from transformers import LlamaModel

PROMPT = 24
# layers, batch, heads, head width, image tokens
CPU_SHAPES = [(6, 1, 16, 128, 576), (5, 32, 4, 32, 36)]
GPU_SHAPES = [(25, 1, 32, 128, 576), (25, 16, 32, 128, 576)]  # Janus-Pro-7B
QUICK_SHAPES = [(2, 2, 2, 16, 16)]
# layers, hidden, heads, width of the MLP, side of the image's grid, batches
CPU_MODEL = (4, 512, 8, 1376, 24, (1, 4))
GPU_MODEL = (30, 4096, 32, 11008, 24, (1, 16))  # Janus-Pro-7B
QUICK_MODEL = (2, 32, 2, 48, 4, (2,))
LONG, WORDS = 32768, 16
STEPS = 20  # timed training steps of each kind; the masks take a few percent of a step
SLOW_TURNS = 10  # limit on a GPU for variants that run image by image or keep all matrices (seconds per turn)
COLUMNS = [[[5], [9, 10]], [[6, 7], [12]]]  # of two prompts that alternate: two objects of one or two tokens each


def make_columns(batch: int) -> Tensor:
    table = torch.full((batch, 2, 2), -1)
    for b in range(batch):
        for o, columns in enumerate(COLUMNS[b % 2]):
            table[b, o, : len(columns)] = torch.tensor(columns)
    return table


def mean_of_columns(probs: Tensor, columns: Tensor) -> Tensor:
    """Average the columns of each object, (B, rows, keys) → (B, O, rows)."""
    used = (columns >= 0).to(probs.dtype)
    index = columns.clamp(min=0).flatten(1)[:, None].expand(-1, probs.shape[1], -1)
    gathered = probs.gather(2, index).view(*probs.shape[:2], *columns.shape[1:])
    return ((gathered * used[:, None]).sum(-1) / used.sum(-1)[:, None]).transpose(1, 2).float()


def probabilities(q: Tensor, k: Tensor, start: int) -> Tensor:
    """Return the eager attention probabilities of the rows from `start` on, (B, H, rows, S)."""
    S = q.shape[2]
    hidden = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)[start:]
    scores = (q[:, :, start:] @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(hidden, -torch.inf)
    return scores.float().softmax(-1).to(q.dtype)


def max_turns(device: str) -> int:
    """Return the limit of turns; on a GPU some variants are far slower than the fastest one."""
    return 30 if device == "cuda" else 1000


def ops(device: str, dtype: torch.dtype, quick: bool) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each shape."""
    for L, B, H, D, T in QUICK_SHAPES if quick else GPU_SHAPES if device == "cuda" else CPU_SHAPES:
        if not chosen(f"columns, {B} in a batch"):
            continue
        S, columns = PROMPT + T, make_columns(B).to(device)
        request = ColumnRequest.from_args(columns, B, S, rows=(PROMPT, T), device=columns.device)

        def inputs(L: int = L, B: int = B, H: int = H, S: int = S, D: int = D) -> tuple[Any, ...]:
            q, k = (torch.randn(L, B, H, S, D, device=device).to(dtype) for _ in range(2))
            lse = torch.stack([log_sum_exp(*layer) for layer in zip(q, k, strict=True)])
            return q, k, lse

        def ours(q: Tensor, k: Tensor, lse: Tensor | None, request: ColumnRequest = request, **options: Any) -> Tensor:
            maps = torch.zeros(*request.columns.shape[:2], request.length, device=device)
            for n in range(len(q)):
                given = None if lse is None else lse[n]
                request.run(q[n], k[n], lse=given, out=maps, weight=1 / len(q), **options)
            return maps

        def eager(q: Tensor, k: Tensor, start: int, columns: Tensor = columns) -> Tensor:
            maps = [
                mean_of_columns(probabilities(*layer, start).mean(1)[:, -(q.shape[3] - PROMPT) :], columns)
                for layer in zip(q, k, strict=True)
            ]
            return torch.stack(maps).mean(0)

        variants: dict[str, Callable[..., Tensor]] = {
            "LSE given": ours,
            "own LSE": lambda q, k, _, run=ours: run(q, k, None),
            "torch, own LSE": lambda q, k, _, run=ours: run(q, k, None, backend="torch"),
            "eager": lambda q, k, _, run=eager: run(q, k, 0),
            "kvpress-style": lambda q, k, _, run=eager: run(q, k, PROMPT),
        }
        if device == "cuda" and B > 1:
            del variants["torch, own LSE"]  # seconds per turn
        arguments = inputs()
        exact = [
            attention_columns_reference(*layer, columns, rows=(PROMPT, T)) for layer in zip(*arguments[:2], strict=True)
        ]
        gate(variants, arguments, torch.stack(exact).mean(0))
        times = interleaved(variants, inputs, seconds=0.02 if quick else 0.5, max_turns=max_turns(device))
        shapes, limits = {"L": L, "B": B, "H": H, "S": S, "D": D}, ceilings()
        # Given the log-sum-exp, the queries of the image are read once; keys, norms and maps are about 1% of them.
        floor = limits.floor_ms(bytes_moved=L * B * H * T * D * dtype.itemsize)
        rows = []
        for name, time in times.items():
            more = {"peak_mb": round(peak_mb(variants[name], *arguments), 3), **limits.metrics(floor, time)}
            rows.append(row("attention_columns", name, shapes, dtype_name(dtype), time, **more))
        yield rows


def log_sum_exp(q: Tensor, k: Tensor) -> Tensor:
    S = q.shape[2]
    hidden = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    scores = q.float() @ k.float().transpose(2, 3) * q.shape[3] ** -0.5
    return scores.masked_fill(hidden, -torch.inf).logsumexp(-1)


def gate(variants: dict[str, Callable[..., Tensor]], arguments: tuple[Any, ...], exact: Tensor) -> None:
    """Check that our error against float64 is at most twice that of eager attention, plus a few roundings."""
    error = {name: float((run(*arguments).double() - exact).abs().max()) for name, run in variants.items()}
    bound = 2 * error["eager"] + 8 * torch.finfo(torch.float32).eps * float(exact.max())
    for name in ("LSE given", "own LSE"):
        assert error[name] <= bound, f"{name}: error {error[name]:.2e} above {bound:.2e}"


def decoders(device: str, dtype: torch.dtype, quick: bool) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each batch and group of variants."""
    L, hidden, H, inner, side, batches = QUICK_MODEL if quick else GPU_MODEL if device == "cuda" else CPU_MODEL
    batches = [B for B in batches if chosen(f"decoder, {B} in a batch")]
    if not batches:
        return
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=H, max_position_embeddings=1024,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaModel(config).to(dtype).eval()
    for B in batches:
        yield from decoder(model, L, B, side, device, dtype, quick)


def decoder(
    model: LlamaModel, L: int, B: int, side: int, device: str, dtype: torch.dtype, quick: bool
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each group of variants. The variants of a group are interleaved."""
    T, columns = side * side, make_columns(B)
    skip = 5 if L > 10 else 1 if L > 2 else 0
    kept = range(skip, L - skip)
    grid = {"rows": (PROMPT, T), "grid": (side, side), "skip": skip}

    def inputs() -> tuple[Tensor]:
        return (torch.randn(B, PROMPT + T, model.config.hidden_size, device=device).to(dtype),)

    @torch.no_grad()
    def plain(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, use_cache=False).last_hidden_state

    @torch.no_grad()
    def capture(x: Tensor, *, stop_early: bool = False) -> Tensor:
        with ospo_fast.AttentionCapture(model, columns=columns, stop_early=stop_early, **grid) as captured:
            model(inputs_embeds=x, use_cache=False)
        return captured.maps

    def masks(x: Tensor) -> Tensor:
        return ospo_fast.object_masks(capture(x, stop_early=True)).union

    @torch.no_grad()
    def output_attentions(x: Tensor) -> Tensor:
        """Keep the matrices of all layers and gather the columns, image by image, as the official code does."""
        model.set_attn_implementation("eager")
        maps = []
        for b in range(B):
            attentions = model(inputs_embeds=x[b : b + 1], use_cache=False, output_attentions=True).attentions
            probs = torch.stack([attentions[layer] for layer in kept]).float().mean((0, 2))
            maps.append(mean_of_columns(probs[:, PROMPT:], columns[b : b + 1].to(device)))
        model.set_attn_implementation("sdpa")
        return torch.cat(maps).view(B, -1, side, side)

    def official(x: Tensor) -> Tensor:
        return torch.from_numpy(skimage_masks(output_attentions(x).cpu())).amax(1)

    @torch.no_grad()
    def hooks(x: Tensor) -> Tensor:
        """Run the whole batch with eager attention; a hook on each layer gathers the columns and drops the matrix."""
        model.set_attn_implementation("eager")
        maps: list[Tensor] = []

        def gather(_module: Any, _inputs: Any, output: Any) -> None:
            maps.append(mean_of_columns(output[1].float().mean(1)[:, PROMPT:], columns.to(device)))

        handles = [model.layers[layer].self_attn.register_forward_hook(gather) for layer in kept]
        model(inputs_embeds=x, use_cache=False)
        for handle in handles:
            handle.remove()
        model.set_attn_implementation("sdpa")
        return torch.stack(maps).mean(0).view(B, -1, side, side)

    def step(x: Tensor, *, online: bool) -> Tensor:
        """Run forward and backward of a training step, with or without masks of the current policy."""
        x = x.requires_grad_()
        if online:
            with ospo_fast.AttentionCapture(model, columns=columns, **grid) as captured:
                output = model(inputs_embeds=x, use_cache=False).last_hidden_state
            ospo_fast.object_masks(captured.maps)
        else:
            output = model(inputs_embeds=x, use_cache=False).last_hidden_state
        (grad,) = torch.autograd.grad(output.float().square().mean(), x)
        return grad

    x = inputs()[0]
    expected = output_attentions(x)
    for maps in (capture(x), capture(x, stop_early=True), hooks(x)):
        torch.testing.assert_close(maps, expected, rtol=2 ** (-5 if dtype == torch.bfloat16 else -10), atol=1e-5)
    model.requires_grad_(False)
    groups: list[dict[str, Callable[[Tensor], Tensor]]] = [
        {"forward": plain, "forward with capture": capture},
        {
            "masks": masks,
            "output_attentions": output_attentions,
            "official mask path": official,
            "DAAM-style hooks": hooks,
        },
        {"training step": lambda x: step(x, online=False), "online masks": lambda x: step(x, online=True)},
    ]
    shapes = {"L": L, "B": B, "H": model.config.num_attention_heads, "D": model.config.hidden_size, "T": T}
    for variants in groups:
        rows = []
        if "online masks" in variants and not quick:
            turns, seconds = STEPS, math.inf
        else:
            slow = "output_attentions" in variants and device == "cuda"
            turns, seconds = SLOW_TURNS if slow else max_turns(device), 0.02 if quick else 1.0
        times = interleaved(variants, inputs, seconds=seconds, max_turns=turns)
        first: Timing = next(iter(times.values()))
        for name, time in times.items():
            metrics = {"ms_per_image": round(time.median_ms / B, 4)}
            metrics["to_first"] = round(time.median_ms / first.median_ms, 4)
            memory = round(peak_mb(variants[name], inputs()[0]), 3)
            rows.append(row("AttentionCapture", name, shapes, dtype_name(dtype), time, peak_mb=memory, **metrics))
        yield rows


def long_steps() -> dict[str, Callable[[int], Tensor]]:
    """Return the variants of the case of long sequences: functions of the number of tokens."""
    from transformers import LlamaConfig, LlamaModel

    def model(attention: str) -> LlamaModel:
        config = LlamaConfig(
            vocab_size=8, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, max_position_embeddings=LONG, attn_implementation=attention,
        )  # fmt: skip
        return LlamaModel(config).eval()

    words = torch.arange(WORDS)[None, :, None]

    @torch.no_grad()
    def forward(tokens: int) -> Tensor:
        return model("sdpa")(inputs_embeds=torch.randn(1, tokens, 64), use_cache=False).last_hidden_state

    @torch.no_grad()
    def capture(tokens: int) -> Tensor:
        decoder = model("sdpa")
        with ospo_fast.AttentionCapture(decoder, columns=words, rows=(PROMPT, tokens - PROMPT)) as captured:
            decoder(inputs_embeds=torch.randn(1, tokens, 64), use_cache=False)
        return captured.maps

    @torch.no_grad()
    def output_attentions(tokens: int) -> Tensor:
        outputs = model("eager")(inputs_embeds=torch.randn(1, tokens, 64), use_cache=False, output_attentions=True)
        return mean_of_columns(torch.stack(outputs.attentions).mean((0, 2))[:, PROMPT:], words)

    return {"forward": forward, "forward with capture": capture, "output_attentions": output_attentions}


def steps(case: str, variant: str, quick: bool) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Return a tiny step and the step of a case (`_peak_rss.py`)."""
    function = long_steps()[variant]
    assert case == f"long, {LONG} tokens"
    return lambda: function(64), lambda: function(512 if quick else LONG)


def long_sequences(device: str, dtype: torch.dtype, quick: bool) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of long sequences."""
    case = f"long, {LONG} tokens"
    if device != "cpu" or not chosen(case):
        return
    small = {name: function(512) for name, function in long_steps().items()}
    assert small.pop("forward").shape == (1, 512, 64)
    assert len({maps.shape for maps in small.values()}) == 1
    rows = []
    for name in ["forward with capture"] if quick else long_steps():  # each imports torch and transformers
        if found := grown_memory("attention_columns", case, name, quick):
            time = Timing(*3 * [found.pop("ms")], repeats=1)
            shapes = {"L": 1, "B": 1, "H": 1, "D": 64, "T": 512 if quick else LONG, "words": WORDS}
            rows.append(row("AttentionCapture", name, shapes, dtype_name(dtype), time, **found))
    yield rows


def run(out: Path, quick: bool) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    rows: list[dict[str, Any]] = []
    for part in chain(ops(device, dtype, quick), decoders(device, dtype, quick), long_sequences(device, dtype, quick)):
        rows += part
        write(rows, out, "attention_columns")  # keeps the rows when a later shape fails
    show(rows)
