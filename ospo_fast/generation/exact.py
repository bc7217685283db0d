"""Log-probabilities of generated codes with the bits of the generation engine, and with gradients.

`ImageGenerator.generate(return_logps=True)` decodes token by token. Here whole sequences run through the same kernels,
as the rows of one step: packed products, norms, gates, and attention of each row over the positions up to its own.
The order of every sum depends on the row alone, so both give the same bits, for any batch, packing and order. Gradients
are the ordinary ones, by products of torch. They differ from those of transformers' modules by rounding alone.

Layers compute in evaluation mode, without dropout. Adapters of LoRA are added to the weights before the product, here
and in generation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ospo_fast.cost import causal
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation.decoder import InferenceDecoder, Layer
from ospo_fast.generation.engine import eval_mode, why_not_exact
from ospo_fast.generation.overrides import find_override
from ospo_fast.generation.requests import tokenize_prompts
from ospo_fast.generation.sampling import Sampling
from ospo_fast.generation.validation import check_codes
from ospo_fast.models.base import UnifiedModel, run_check
from ospo_fast.models.layout import image_layout
from ospo_fast.models.resolve import resolve_model
from ospo_fast.ops.decode_attention import decode_attention, rotate
from ospo_fast.ops.head import Head
from ospo_fast.ops.linear import PackedLinear
from ospo_fast.ops.rms_norm import add_rms_norm
from ospo_fast.ops.silu_mul import silu_mul
from ospo_fast.ops.token_logprobs import token_logprobs
from ospo_fast.work import count, passes


def exact_logprobs(
    model: UnifiedModel | nn.Module,
    prompts: Sequence[str | Tensor],
    codes: Tensor,
    *,
    processor: Any = None,
    guidance_scale: float = 5.0,
    temperature: float = 1.0,
) -> Tensor:
    """Compute the log-probability of each code, with the bits of `ImageGenerator.generate(return_logps=True)`.

    ℓ = log softmax(z / temperature)[code], with the logits z of `Head.guided` behind the prompt and the codes before.
    exp(ℓ − ℓ_old) is exactly 1 for the ℓ_old of the generation, as long as the weights are the same. Gradients reach
    all parameters that require them: of the decoder, its LoRA adapters, embeddings and head. All sequences run in one
    pass; split the calls where memory is short, which changes no bit.

    Args:
        model: see `ImageGenerator`.
        prompts: N texts, or token ids (S,) int64 that end in begin-of-image.
        codes: (N, T) int64, of one image for each prompt.
        processor: see `ImageGenerator`.
        guidance_scale: that of the generation.
        temperature: that of the generation, positive. There is no truncation: its distribution changes by steps.

    Returns:
        (N, T) fp32.

    Raises:
        UsageError: an invalid argument.
        OspoError: a model that cannot be exact: another dtype or device than float32 on a CPU, hooks and patched
            modules, quantized layers, adapters other than LoRA of linear layers of the decoder, no compiled module.

    """
    sampling = Sampling(guidance_scale, temperature)
    if not sampling.temperature:
        raise UsageError("temperature: got 0, which gives every code the log-probability 0; expected a positive number")
    model, ids, codes = _check(model, processor, prompts, codes)
    guided = sampling.branches == 2
    unconditional = [model.unconditional(one) for one in ids] if guided else []
    states = _run(model, ids + unconditional, torch.cat((codes, codes)) if guided else codes)
    hidden, head = states[: len(ids)], Head.of(model.head)
    if guided:
        hidden, head = head.guided(hidden, states[len(ids) :], sampling.guidance_scale, batch_invariant=True)
    count(codes=codes.numel(), backward=torch.is_grad_enabled())
    with torch.autocast("cpu", enabled=False):
        return token_logprobs(hidden, head, codes, temperature=sampling.temperature, batch_invariant=True)


def exact_hidden_states(
    model: UnifiedModel | nn.Module,
    prompts: Sequence[str | Tensor],
    codes: Tensor,
    *,
    processor: Any = None,
    unconditional: bool = False,
) -> Tensor:
    """Compute the hidden states (N, T, D) that predict each code, with the bits of the generation; differentiable.

    For losses of your own: `token_logprobs(hidden, model.head, codes, batch_invariant=True)`, with guidance behind
    `Head.guided(…, batch_invariant=True)`, is what `exact_logprobs` computes.

    Args:
        model: see `exact_logprobs`.
        prompts: see `exact_logprobs`.
        codes: see `exact_logprobs`.
        processor: see `exact_logprobs`.
        unconditional: compute those behind the unconditional prompts that belong to the prompts.

    Raises:
        UsageError, OspoError: see `exact_logprobs`.

    """
    model, ids, codes = _check(model, processor, prompts, codes)
    return _run(model, [model.unconditional(one) for one in ids] if unconditional else ids, codes)


def _check(
    model: UnifiedModel | nn.Module, processor: Any, prompts: Sequence[str | Tensor], codes: Tensor
) -> tuple[UnifiedModel, list[Tensor], Tensor]:
    """Return the adapter, the token ids of the prompts and the codes as int64."""
    model = resolve_model(model, processor)
    run_check(model, "check_generation")
    ids = tokenize_prompts(model, prompts)
    check_codes(codes, len(ids), model)
    return model, ids, codes.cpu().long()


def _run(model: UnifiedModel, ids: list[Tensor], codes: Tensor) -> Tensor:
    """Return the hidden states (N, T, D) behind prompts (S_n,) and codes (N, T)."""
    decoder = _build_decoder(model)
    if not ids:
        return torch.zeros(*codes.shape, model.hidden_size, dtype=model.dtype)
    longest = max(map(len, ids)) + image_layout(model).tokens
    if longest > model.max_positions:  # prompts are checked
        raise UsageError(
            f"guidance_scale: the unconditional prompt of {model.name} and an image take {longest} positions, expected "
            f"at most {model.max_positions}; use 1, or smaller images"
        )
    with eval_mode(model), torch.autocast("cpu", enabled=False):
        batch = _Sequences(model, ids, codes)
        return decoder.hidden_states(batch)[batch.predicting]


def why_no_exact_logprobs(model: UnifiedModel) -> str | None:
    """Return why a model has no exact log-probabilities, None if it has: what `exact_logprobs` raises an error for."""
    return _try_decoder(model)[1]


def _try_decoder(model: UnifiedModel) -> tuple[_ExactDecoder | None, str | None]:
    reason = why_not_exact(model) or find_override(model)
    if reason is not None:
        return None, reason
    decoder = _ExactDecoder(model)
    reason = why_not_exact(model, decoder)
    return (decoder, None) if reason is None else (None, reason)


def _build_decoder(model: UnifiedModel) -> _ExactDecoder:
    """Pack the weights as they are now. Raises OspoError for a model that cannot be exact."""
    decoder, reason = _try_decoder(model)
    if decoder is not None:
        return decoder
    raise OspoError(
        f"model: {model.name} has no exact log-probabilities: {reason}; or use token_logprobs on the hidden states of "
        "its own modules, which round differently"
    )


class _Sequences:
    """N prompts, each with the tokens of its image but the last one, behind which nothing is predicted, in M rows."""

    def __init__(self, model: UnifiedModel, prompts: list[Tensor], codes: Tensor) -> None:
        layout = image_layout(model)
        behind = layout.tokens - 1
        starts = torch.tensor([len(ids) for ids in prompts])
        lengths = starts + behind
        self.count, self.length = len(prompts), int(lengths.max())
        self.slots = torch.arange(len(prompts)).repeat_interleave(lengths)  # (M,)
        self.places = torch.cat([torch.arange(length) for length in lengths.tolist()])  # (M,)
        # (N, T): the rows that predict the codes. The last row of a sequence predicts its last token.
        self.predicting = lengths.cumsum(0)[:, None] - layout.tokens + torch.tensor(layout.code_positions)
        # A structure token has a number behind the codes, as in the engine.
        structure = list(dict.fromkeys(token for _, token in layout.structure))
        tokens = layout.spread(codes, 0)
        for place, token in layout.structure:
            tokens[:, place] = model.num_codes + structure.index(token)
        # Of all codes, as in the engine: embeddings of some could be a product of another size.
        table = model.embed_codes(torch.arange(model.num_codes))
        if structure:
            table = torch.cat((table, model.embed_tokens(torch.tensor(structure)).to(table)))
        texts = model.embed_tokens(torch.cat(prompts)).split(starts.tolist())
        pairs = zip(texts, F.embedding(tokens[:, :behind], table), strict=True)
        self.embeds = torch.cat(list(itertools.chain.from_iterable(pairs)))  # (M, D)
        self.positions: Tensor | None = None  # (A, M) on each axis, where they are not the places
        if layout.positions is not None:
            image = torch.tensor(layout.positions)[:, :behind]
            parts = [torch.cat((torch.arange(n).expand(len(image), n), n + image), 1) for n in starts.tolist()]
            self.positions = torch.cat(parts, 1)
        count(
            tokens=len(self.slots),
            attended=sum(map(causal, lengths.tolist())),
            **passes(model),
        )


class _ExactDecoder(InferenceDecoder):
    """`InferenceDecoder` with a pass over whole sequences that has gradients."""

    def hidden_states(self, batch: _Sequences) -> Tensor:
        """Run all rows of the sequences → their hidden states (M, D)."""
        x, rows = batch.embeds, batch.places if batch.positions is None else batch.positions
        tables = self._tables_at(rows) if self._rotates_before else None
        h = _normed(x, self.layers[0].norm)
        for layer, next_norm in zip(self.layers, [*(n.norm for n in self.layers[1:]), self._norm], strict=True):
            qkv = self._turned(layer, _product(layer.qkv, h), tables)
            x = x + _normed(_product(layer.out, self._attend(qkv, batch)), layer.out_norm)
            y = _by_kernel(silu_mul, _silu_mul, _product(layer.gate_up, _normed(x, layer.mlp_norm)))
            x = x + _normed(_product(layer.down, y), layer.down_norm)
            h = _normed(x, next_norm)
        return h

    def _turned(self, layer: Layer, qkv: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
        """Apply the norms of heads, and rotations that the kernel of attention does not know."""
        if layer.head_norms is None and tables is None:
            return qkv
        parts = list(qkv.view(len(qkv), -1, self.head_dim).split((self.heads, self.kv_heads, self.kv_heads), 1))
        for i, norm in enumerate(layer.head_norms or ()):
            parts[i] = norm(parts[i])
        if tables is not None:
            parts[:2] = [self._rotate(part, *tables) for part in parts[:2]]
        return torch.cat(parts, 1).flatten(1)

    def _attend(self, qkv: Tensor, batch: _Sequences) -> Tensor:
        """Run causal attention within each sequence: qkv (M, (H + 2·Hkv)·D) → (M, H·D)."""
        cos, sin = self._kernel_tables
        slots, places, grouped = batch.slots, batch.places, self.heads != self.kv_heads

        def kernel(qkv: Tensor) -> Tensor:
            keys, values = qkv.new_empty(2, batch.count, self.kv_heads, batch.length, self.head_dim)
            return decode_attention(
                qkv, cos, sin, keys, values, slots, places, heads=self.heads, scale=self._scale, shared_slots=True
            )

        def reference(qkv: Tensor) -> Tensor:
            turned, values = qkv.view(len(qkv), -1, self.head_dim).split((self.heads + self.kv_heads, self.kv_heads), 1)
            heads = torch.cat((rotate(turned, cos[places][:, None], sin[places][:, None]), values), 1)
            padded = heads.new_zeros(batch.count, batch.length, *heads.shape[1:]).index_put((slots, places), heads)
            q, k, v = padded.transpose(1, 2).split((self.heads, self.kv_heads, self.kv_heads), 1)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self._scale, enable_gqa=grouped)
            return y.transpose(1, 2)[slots, places].flatten(1)

        return _by_kernel(kernel, reference, qkv)


class _ByKernel(torch.autograd.Function):
    """The values of a kernel, and the gradients of its reference, which runs again in the backward."""

    @staticmethod
    def forward(ctx: Any, kernel: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.reference = reference
        return kernel(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(needed) for t, needed in zip(ctx.saved_tensors, needs, strict=True)]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.reference(*inputs), [t for t in inputs if t.requires_grad], grad))
        return None, None, *(next(found) if needed else None for needed in needs)


def _by_kernel(kernel: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    y: Tensor = _ByKernel.apply(kernel, reference, *inputs)  # type: ignore[no-untyped-call]
    return y


def _product(product: Any, x: Tensor) -> Tensor:
    assert isinstance(product, PackedLinear)
    return product.differentiable(x)


def _normed(x: Tensor, norm: Any) -> Tensor:
    """Return the RMS norm of x (M, D); without a norm, x."""
    if norm is None:
        return x
    eps = norm.variance_epsilon

    def kernel(x: Tensor, weight: Tensor) -> Tensor:
        return add_rms_norm(None, x, weight, eps)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))

    return _by_kernel(kernel, reference, x, norm.weight)


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
