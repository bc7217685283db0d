"""The engine: plans batches for the free memory, and decodes images and texts in one loop."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ospo_fast.cost import causal
from ospo_fast.errors import OpError, OspoError, UsageError
from ospo_fast.generation.decode_batch import DecodeBatch
from ospo_fast.generation.decoder import COPIED_BYTES, Decoder
from ospo_fast.generation.module_decoder import build_decoder
from ospo_fast.generation.projections import GuidedHead, PackedHead, head_projection
from ospo_fast.generation.requests import CUDA_ROWS, Completion, Request, max_batch_size, plan_batches
from ospo_fast.generation.sampling import Sampling
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.layout import image_layout
from ospo_fast.oom import BatchSizeLimit
from ospo_fast.ops.head import Head
from ospo_fast.work import count

_SETTINGS = ("scaling", "attention_scaling", "is_causal", "variance_epsilon")
_ADAPTER_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


class Engine:
    """Decoding of requests of one model, with what batches share: decoder, embeddings, head, buffers, memory limits.

    text: decode text tokens, not image codes. decoder: in place of the one that `build_decoder` chooses. Other
    arguments: see `ImageGenerator`.
    """

    def __init__(
        self,
        model: UnifiedModel,
        *,
        text: bool = False,
        batch_size: int | None = None,
        capture: bool = True,
        jacobi_window: int = 0,
        decoder: Decoder | None = None,
    ) -> None:
        self.model, self._text = model, text
        self.decoder = decoder or build_decoder(model, text=text)
        self._batch_size, self._capture, self._item_name = batch_size, capture, "text" if text else "image"
        self.stop_ids = tuple(model.eos_ids) if text else ()  # an image ends after its last code
        layout, device = image_layout(model), model.device
        # Structure token j of an image is number K + j. Behind step n comes `_given[n]`; −1: the code that is sampled.
        self._structure = [] if text else list(dict.fromkeys(token for _, token in layout.structure))
        self._given: Tensor | None = None
        if self._structure:
            given = {place: model.num_codes + self._structure.index(token) for place, token in layout.structure}
            # One more: the step counter of a finished row is the number of tokens.
            self._given = torch.tensor([given.get(n, -1) for n in range(layout.tokens + 1)], device=device)
        # By which the rotary positions of an image token differ from its position in the cache, (A, N).
        self._shift: Tensor | None = None
        if layout.positions is not None and not text:
            self._shift = (torch.tensor(layout.positions) - torch.arange(layout.tokens)).to(device)
        # Of image codes: the head, and the embedding of every code. Text tokens use the model's own modules, and so do
        # codes where hooks have to see every one.
        self._head = None if text else head_projection(model.head, self.decoder.packed)
        rows = 0 if text or self.decoder.calls_modules else model.num_codes + len(self._structure)
        self._table = torch.empty(rows, model.hidden_size, device=device, dtype=model.dtype)
        if jacobi_window and (self._structure or self._shift is not None):
            raise UsageError(
                f"jacobi_window: got {jacobi_window}, expected 0, because images of {model.name} have structure tokens "
                "or positions of their own between the codes"
            )
        self._window = max(1, min(jacobi_window, layout.tokens - 1))
        self._batch_class: Callable[..., DecodeBatch] = DecodeBatch
        if self._window > 1:
            from ospo_fast.experimental.jacobi import JacobiDecodeBatch

            self._batch_class = functools.partial(JacobiDecodeBatch, window=self._window)
        self._batch: DecodeBatch | None = None  # kept for the next batch: its graph is captured
        self._max_cache_bytes: int | None = None  # known once a batch has run out of memory
        self._embed_codes()

    def refresh(self) -> None:
        """Reload the model's weights into the same buffers, so that captured graphs stay valid."""
        self.decoder.refresh()
        if self._head is not None:
            self._head.refresh()
        if head := self.__dict__.get("guided_head"):  # once it has been used
            head.refresh()
        self._embed_codes()

    @functools.cached_property
    def guided_head(self) -> GuidedHead | None:
        """Head of log-probabilities that `generation.exact` computes again; None where it cannot."""
        return GuidedHead(Head.of(self.model.head)) if why_not_exact(self.model, self.decoder) is None else None

    def guided_logits(self, hidden: Tensor, sampling: Sampling) -> Tensor:
        """Compute guided logits (rows, V) fp32 of hidden states (branches · rows, D)."""
        if self.guided_head is not None:
            return self.guided_head(hidden, sampling.guidance_scale, sampling.branches)
        return sampling.guided(self.logits(hidden))

    def _embed_codes(self) -> None:
        if not len(self._table):
            return
        model, count = self.model, self.model.num_codes
        with torch.autocast(model.device.type, enabled=False):
            self._table[:count].copy_(model.embed_codes(torch.arange(count, device=model.device)))
            if self._structure:
                self._table[count:].copy_(model.embed_tokens(torch.tensor(self._structure, device=model.device)))

    def embed(self, ids: Tensor, out: Tensor) -> None:
        """Write the embeddings of tokens (M,) into `out` (M, D); a structure token has a number behind the codes."""
        if len(self._table):
            torch.index_select(self._table, 0, ids, out=out)
        elif self._head is None:
            out.copy_(self.model.embed_tokens(ids[:, None])[:, 0])
        elif self._structure and int(ids.max()) >= self.model.num_codes:  # then all of a batch are structure tokens
            given = torch.tensor(self._structure, device=ids.device)[ids - self.model.num_codes]
            out.copy_(self.model.embed_tokens(given[:, None])[:, 0])
        else:
            out.copy_(self.model.embed_codes(ids[:, None])[:, 0])

    def put_structure(self, tokens: Tensor, steps: Tensor) -> None:
        """Replace the tokens (M,) sampled at `steps` (M,) that are structure tokens of an image."""
        if self._given is not None:
            given = self._given[steps]
            torch.where(given < 0, tokens, given, out=tokens)

    def rotary_positions(self, lengths: Tensor, steps: Tensor) -> Tensor | None:
        """Return positions (A, B·M) of image tokens before step `steps` (M,) at `lengths` (B, M) of the cache.

        None: the positions are the lengths.
        """
        if self._shift is None:
            return None
        positions: Tensor = (lengths + self._shift[:, (steps - 1).clamp(min=0)][:, None]).clamp(min=0)
        return positions.flatten(1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits (M, V), rows contiguous, of hidden states (M, D)."""
        if isinstance(self._head, PackedHead):
            return self._head(hidden)
        return self.decoder.text_logits(hidden) if self._head is None else self.decoder.run_padded(self._head, hidden)

    def decode(
        self, requests: Sequence[Request], sampling: Sampling, groups: Sequence[Hashable] | None = None
    ) -> Iterator[tuple[list[Request], list[Completion]]]:
        """Yield batches of requests with their results.

        A batch that runs out of memory is halved and decoded again, and no later batch is larger.
        groups: see `plan_batches`.
        """
        # Rounded up, so that later calls with longer prompts can reuse the buffers and the graph.
        length = max(len(r.ids) + r.max_tokens for r in requests)
        if sampling.branches == 2:
            partners = {len(r.ids): self.model.unconditional(r.ids) for r in requests}  # they depend on the length
            length = max(length, max(map(len, partners.values())) + max(r.max_tokens for r in requests))
            if length > self.model.max_positions:
                raise UsageError(
                    f"guidance_scale: got {sampling.guidance_scale}, but the unconditional prompt of {self.model.name} "
                    f"and an image take {length} of its {self.model.max_positions} positions; use 1, or smaller images"
                )
        length = -(-length // 64) * 64
        if self._batch is not None and (self._batch.sampling != sampling or self._batch.length < length):
            self._batch = None  # before the free memory is measured
        row_bytes = sampling.branches * self.decoder.row_bytes(length)
        kept = self._batch.slots if self._batch is not None else 0  # these do not count as free memory
        max_size = self._batch_size or max(kept, max_batch_size(self.decoder, row_bytes, self._window))
        # A GPU pads every batch to the size where throughput saturates. The size that fits would make results depend on
        # the free memory.
        full_size = max(1, CUDA_ROWS // self._window) if self.decoder.device.type == "cuda" else max_size
        pad_rows = functools.partial(
            self.decoder.pad_rows, batch_size=self._batch_size or full_size, row_bytes=row_bytes
        )
        if self._max_cache_bytes is not None:
            max_size = max(1, min(max_size, self._max_cache_bytes // row_bytes))
        planned = min(max_size, len(requests))
        limit = BatchSizeLimit(planned, self._item_name, "free some, use a smaller dtype or shorter prompts")
        make_batch = functools.partial(
            self._batch_class,
            weakref.proxy(self),  # a cycle would keep the memory of both until the next garbage collection
            sampling,
            length=length,
            max_tokens=max(r.max_tokens for r in requests),
            pad_rows=pad_rows,
            capture=self._capture,
        )
        batches = plan_batches(requests, groups, planned)
        try:
            for batch, completions in limit.run(batches, functools.partial(self._decode_batch, make_batch, limit)):
                self._count(batch, completions, sampling.branches)
                yield batch, completions
        finally:
            if limit.max_size < planned:
                self._max_cache_bytes = limit.max_size * row_bytes

    def _count(self, requests: Sequence[Request], completions: Sequence[Completion], branches: int) -> None:
        """Count what was generated. Of images, Jacobi decoding takes fewer steps for the same codes."""
        lengths = set()
        for request, completion in zip(requests, completions, strict=True):
            prompt, steps = len(request.ids), completion.steps if self._text else request.max_tokens
            # An unconditional prompt is computed once for each length. The last token is not read.
            prefills = 1 if prompt in lengths else branches
            lengths.add(prompt)
            count(
                tokens=prefills * prompt + branches * (steps - 1),
                images=int(not self._text),
                attended=prefills * causal(prompt) + branches * causal(steps - 1, before=prompt),
                codes=0 if self._text else branches * steps,
                words=steps if self._text else 0,
            )

    def _decode_batch(
        self, make_batch: Callable[..., DecodeBatch], limit: BatchSizeLimit, requests: list[Request]
    ) -> list[Completion]:
        if self._batch is not None and len(requests) > self._batch.slots:
            self._batch = None  # its memory is freed first
        try:
            self._batch = batch = self._batch or make_batch(slots=limit.max_size)
            batch.prefill(requests)
            while count := batch.steps_left():
                for _ in range(count):
                    batch.runner(batch.step)
            return batch.completions()
        except BaseException:
            self._batch = None  # free buffers and graph before a smaller batch is tried
            raise


def why_not_exact(model: UnifiedModel, decoder: Decoder | None = None) -> str | None:
    """Return why another forward pass may round the log-probabilities of a model differently, None if it does not.

    decoder: that of the model; without it only what needs none is checked.
    """
    if model.dtype != torch.float32 or model.device.type != "cpu":
        return f"it is {model.dtype} on {model.device}, expected float32 on a CPU"
    try:
        head = Head.of(model.head)
    except (OpError, OspoError) as error:
        return str(error)
    if head.weight.dtype != torch.float32 or head.weight.device.type != "cpu":
        return f"its head is {head.weight.dtype} on {head.weight.device}, expected float32 on a CPU"
    if decoder is None or decoder.exact:
        return None
    if not decoder.plain:
        return "its decoder has layers that are no linear layers, if with plain LoRA adapters, such as quantized ones"
    if decoder.packed:
        return f"its heads have width {decoder.head_dim}, expected a multiple of 16 up to 256"
    return (
        "its decoder has no packed weights, expected the compiled module, a CPU with vector instructions and at most "
        f"{COPIED_BYTES >> 30} GiB of weights"
    )


@contextmanager
def eval_mode(model: UnifiedModel) -> Iterator[None]:
    """Switch the model to evaluation mode inside the context: a model in training generates without dropout."""
    training = [module for module in model.module.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def signature(model: UnifiedModel) -> tuple[object, ...]:
    """Return a signature of modules, hooks and weight addresses. A change requires a new `Engine`."""
    found: list[object] = [image_layout(model)]
    for root in (model.decoder, model.head):
        for module in root.modules():
            found += [id(module), type(module), len(module._forward_hooks), len(module._forward_pre_hooks)]
            found += [(p.data_ptr(), p.shape, p.dtype) for p in module.parameters(recurse=False)]
            # Rotary tables and the scale are computed once.
            found += [(b.data_ptr(), 0 if b.is_inference() else b._version) for b in module.buffers(recurse=False)]
            found += [vars(module).get(name) for name in _SETTINGS]
            if type(module).__module__.startswith("peft."):  # a captured step keeps the adapters of its time
                found += [str(vars(module).get(name)) for name in _ADAPTER_STATE]
    return tuple(found)
