"""attention_columns over the layers of a decoder, against what it replaces; and AttentionCapture on a whole decoder.

Peers are written out here as they work, without what else they do: eager `output_attentions` keeps the matrices of all
layers; hooks in the manner of DAAM let eager attention run and take the wanted columns of each matrix; a window
recompute in the manner of kvpress takes the softmax of the image's rows over all keys, once more beside the attention.
The official mask path is the first of them and then, on the host, scikit-image's Otsu of each object; that it encodes
each image anew is left out, since random weights have no image to encode.

Cases: "columns, N in a batch" and "decoder, N in a batch".
"""

import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from _measure import Timing, ceilings, chosen, dtype_name, interleaved, peak_mb, row, show, write
from object_masks import skimage_masks
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

import ospo_fast
from ospo_fast.ops.attention_columns import ColumnRequest, attention_columns_reference

PROMPT = 24
# layers, batch, heads, head width, image tokens
CPU_SHAPES = [(6, 1, 16, 128, 576), (5, 32, 4, 32, 36)]
GPU_SHAPES = [(25, 1, 32, 128, 576), (25, 16, 32, 128, 576)]  # Janus-Pro-7B
QUICK_SHAPES = [(2, 2, 2, 16, 16)]
# layers, hidden, heads, width of the MLP, side of the image's grid, batches
CPU_MODEL = (4, 512, 8, 1376, 24, (1, 4))
GPU_MODEL = (30, 4096, 32, 11008, 24, (1, 16))  # Janus-Pro-7B
QUICK_MODEL = (2, 32, 2, 48, 4, (2,))
STEPS = 20  # training steps timed of each kind: the masks are a few per cent of one
WHOLE_TURNS = 10  # on a GPU, of the ways that go image by image or keep all matrices: seconds a turn
COLUMNS = [[[5], [9, 10]], [[6, 7], [12]]]  # of two prompts, in turns: two objects of one or two tokens


def columns_of(batch: int) -> Tensor:
    table = torch.full((batch, 2, 2), -1)
    for b in range(batch):
        for o, found in enumerate(COLUMNS[b % 2]):
            table[b, o, : len(found)] = torch.tensor(found)
    return table


def mean_of_columns(probs: Tensor, columns: Tensor) -> Tensor:
    """(B, rows, keys) → (B, O, rows): mean over each object's columns."""
    used = (columns >= 0).to(probs.dtype)
    index = columns.clamp(min=0).flatten(1)[:, None].expand(-1, probs.shape[1], -1)
    taken = probs.gather(2, index).view(*probs.shape[:2], *columns.shape[1:])
    return ((taken * used[:, None]).sum(-1) / used.sum(-1)[:, None]).transpose(1, 2).float()


def probabilities(q: Tensor, k: Tensor, start: int) -> Tensor:
    """(B, H, rows, S): the softmax of the rows from `start` on, as eager attention takes it."""
    S = q.shape[2]
    hidden = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)[start:]
    scores = (q[:, :, start:] @ k.transpose(2, 3) * q.shape[3] ** -0.5).masked_fill(hidden, -torch.inf)
    return scores.float().softmax(-1).to(q.dtype)


def most(device: str) -> int:
    """Turns at most: on a GPU a variant that is far faster than the others would keep them running."""
    return 30 if device == "cuda" else 1000


def ops(device: str, dtype: torch.dtype, quick: bool) -> Iterator[list[dict[str, Any]]]:
    """The rows of each shape."""
    for L, B, H, D, T in QUICK_SHAPES if quick else GPU_SHAPES if device == "cuda" else CPU_SHAPES:
        if not chosen(f"columns, {B} in a batch"):
            continue
        S, columns = PROMPT + T, columns_of(B).to(device)
        request = ColumnRequest.from_args(columns, B, S, rows=(PROMPT, T), device=columns.device)

        def inputs(L: int = L, B: int = B, H: int = H, S: int = S, D: int = D) -> tuple[Any, ...]:
            q, k = (torch.randn(L, B, H, S, D, device=device).to(dtype) for _ in range(2))
            lse = torch.stack([probabilities_lse(*layer) for layer in zip(q, k, strict=True)])
            return q, k, lse

        def ours(q: Tensor, k: Tensor, lse: Tensor | None, request: ColumnRequest = request, **options: Any) -> Tensor:
            maps = torch.zeros(*request.columns.shape[:2], request.length, device=device)
            for n in range(len(q)):
                told = None if lse is None else lse[n]
                request.run(q[n], k[n], lse=told, out=maps, weight=1 / len(q), **options)
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
            del variants["torch, own LSE"]  # seconds a turn
        arguments = inputs()
        exact = [
            attention_columns_reference(*layer, columns, rows=(PROMPT, T)) for layer in zip(*arguments[:2], strict=True)
        ]
        gate(variants, arguments, torch.stack(exact).mean(0))
        times = interleaved(variants, inputs, seconds=0.02 if quick else 0.5, most=most(device))
        shapes, limits = {"L": L, "B": B, "H": H, "S": S, "D": D}, ceilings()
        # With the log-sum-exp given: the image's queries once; wanted keys, norms and maps are a hundredth of them.
        floor = limits.floor_ms(bytes_moved=L * B * H * T * D * dtype.itemsize)
        rows = []
        for name, time in times.items():
            more = {"peak_mb": round(peak_mb(variants[name], *arguments), 3), **limits.metrics(floor, time)}
            rows.append(row("attention_columns", name, shapes, dtype_name(dtype), time, **more))
        yield rows


def probabilities_lse(q: Tensor, k: Tensor) -> Tensor:
    S = q.shape[2]
    hidden = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    scores = q.float() @ k.float().transpose(2, 3) * q.shape[3] ** -0.5
    return scores.masked_fill(hidden, -torch.inf).logsumexp(-1)


def gate(variants: dict[str, Callable[..., Tensor]], arguments: tuple[Any, ...], exact: Tensor) -> None:
    """No variant of ours is further from float64 than twice eager attention's error and a few roundings."""
    error = {name: float((run(*arguments).double() - exact).abs().max()) for name, run in variants.items()}
    bound = 2 * error["eager"] + 8 * torch.finfo(torch.float32).eps * float(exact.max())
    for name in ("LSE given", "own LSE"):
        assert error[name] <= bound, f"{name}: error {error[name]:.2e} above {bound:.2e}"


def decoders(device: str, dtype: torch.dtype, quick: bool) -> Iterator[list[dict[str, Any]]]:
    """The rows of each batch and group of variants."""
    L, hidden, H, inner, side, batches = QUICK_MODEL if quick else GPU_MODEL if device == "cuda" else CPU_MODEL
    batches = [B for B in batches if chosen(f"decoder, {B} in a batch")]
    if not batches:
        return
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
    """The rows of each group of variants, which take turns."""
    T, columns = side * side, columns_of(B)
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
        with ospo_fast.AttentionCapture(model, columns=columns, stop_early=stop_early, **grid) as found:
            model(inputs_embeds=x, use_cache=False)
        return found.maps

    def masks(x: Tensor) -> Tensor:
        return ospo_fast.object_masks(capture(x, stop_early=True)).union

    @torch.no_grad()
    def output_attentions(x: Tensor) -> Tensor:
        """Image by image, as the official code does: all matrices of all layers, then the few columns."""
        model.set_attn_implementation("eager")
        maps = []
        for b in range(B):
            found = model(inputs_embeds=x[b : b + 1], use_cache=False, output_attentions=True).attentions
            probs = torch.stack([found[layer] for layer in kept]).float().mean((0, 2))
            maps.append(mean_of_columns(probs[:, PROMPT:], columns[b : b + 1].to(device)))
        model.set_attn_implementation("sdpa")
        return torch.cat(maps).view(B, -1, side, side)

    def official(x: Tensor) -> Tensor:
        return torch.from_numpy(skimage_masks(output_attentions(x).cpu())).amax(1)

    @torch.no_grad()
    def hooks(x: Tensor) -> Tensor:
        """The whole batch with eager attention; a hook on each layer takes the columns and lets the matrix go."""
        model.set_attn_implementation("eager")
        maps: list[Tensor] = []

        def take(_module: Any, _inputs: Any, output: Any) -> None:
            maps.append(mean_of_columns(output[1].float().mean(1)[:, PROMPT:], columns.to(device)))

        handles = [model.layers[layer].self_attn.register_forward_hook(take) for layer in kept]
        model(inputs_embeds=x, use_cache=False)
        for handle in handles:
            handle.remove()
        model.set_attn_implementation("sdpa")
        return torch.stack(maps).mean(0).view(B, -1, side, side)

    def step(x: Tensor, *, online: bool) -> Tensor:
        """Forward and backward, as a training step runs them, with and without the masks of the policy."""
        x = x.requires_grad_()
        if online:
            with ospo_fast.AttentionCapture(model, columns=columns, **grid) as found:
                output = model(inputs_embeds=x, use_cache=False).last_hidden_state
            ospo_fast.object_masks(found.maps)
        else:
            output = model(inputs_embeds=x, use_cache=False).last_hidden_state
        (grad,) = torch.autograd.grad(output.float().square().mean(), x)
        return grad

    x = inputs()[0]
    wanted = output_attentions(x)
    for maps in (capture(x), capture(x, stop_early=True), hooks(x)):
        torch.testing.assert_close(maps, wanted, rtol=2 ** (-5 if dtype == torch.bfloat16 else -10), atol=1e-5)
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
        steps = "online masks" in variants and not quick
        whole = WHOLE_TURNS if "output_attentions" in variants and device == "cuda" else most(device)
        turns, seconds = (STEPS, math.inf) if steps else (whole, 0.02 if quick else 1.0)
        times = interleaved(variants, inputs, seconds=seconds, most=turns)
        first: Timing = next(iter(times.values()))
        for name, time in times.items():
            figures = {"ms_per_image": round(time.median_ms / B, 4)}
            figures["to_first"] = round(time.median_ms / first.median_ms, 4)
            memory = round(peak_mb(variants[name], inputs()[0]), 3)
            rows.append(row("AttentionCapture", name, shapes, dtype_name(dtype), time, peak_mb=memory, **figures))
        yield rows


def run(out: Path, quick: bool) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    rows: list[dict[str, Any]] = []
    for part in chain(ops(device, dtype, quick), decoders(device, dtype, quick)):
        rows += part
        write(rows, out, "attention_columns")  # what is measured stays when a later shape fails
    show(rows)
