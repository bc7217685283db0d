"""Output head over the image codes, as plain weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops.linear import invariant_gelu, invariant_linear


@dataclass(frozen=True, eq=False)
class Head:
    """Compute logits = weight · gelu(proj_weight · x + proj_bias) + bias, or weight · x + bias without projection.

    The GELU is the exact (erf) one. A head with tensors that require grad is trainable.

    Args:
        weight: (V, F) float.
        bias: (V,) or None.
        proj_weight: (F, D) or None, for a linear head with D = F.
        proj_bias: (F,) or None.

    Raises:
        OpError: wrong shapes, different dtypes or devices, tensors that are sharded, quantized or on the meta device.

    """

    weight: Tensor
    bias: Tensor | None = None
    proj_weight: Tensor | None = None
    proj_bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self._is_plain_linear():
            return  # at once: a linear head is made in every call of an op
        for name, tensor in zip(("weight", "bias", "proj_weight", "proj_bias"), self.tensors, strict=True):
            if tensor is not None:
                _check_plain(name, tensor, dims=2 if name.endswith("weight") else 1)
                if tensor.dtype != self.weight.dtype or tensor.device != self.weight.device:
                    raise OpError(
                        f"Head: {name} is {tensor.dtype} on {tensor.device}, weight is {self.weight.dtype} on "
                        f"{self.weight.device}; all of a head's tensors must share dtype and device"
                    )
        if self.proj_weight is None and self.proj_bias is not None:
            raise OpError("Head: proj_bias was given without proj_weight; give both or neither")
        for prefix, bias, weight in (("", self.bias, self.weight), ("proj_", self.proj_bias, self.proj_weight)):
            if bias is not None and weight is not None and len(bias) != len(weight):
                expected = f"{len(weight)}, the rows of {prefix}weight"
                raise OpError(f"Head: {prefix}bias has {len(bias)} elements, expected {expected}")
        if self.proj_weight is not None and self.weight.shape[1] != self.proj_weight.shape[0]:
            raise OpError(
                f"Head: weight {tuple(self.weight.shape)} does not match proj_weight {tuple(self.proj_weight.shape)}; "
                "expected (V, F) and (F, D)"
            )

    def _is_plain_linear(self) -> bool:
        weight, bias = self.weight, self.bias
        if self.proj_weight is not None or self.proj_bias is not None or not _is_plain(weight, 2):
            return False
        if bias is None:
            return True
        same = _is_plain(bias, 1) and bias.dtype == weight.dtype and bias.device == weight.device
        return same and bias.shape[0] == weight.shape[0]

    @property
    def num_codes(self) -> int:
        """V, the number of codes."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """D, the width of the hidden states."""
        return self.weight.shape[1] if self.proj_weight is None else self.proj_weight.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """weight, bias, proj_weight, proj_bias."""
        return self.weight, self.bias, self.proj_weight, self.proj_bias

    @property
    def trainable(self) -> bool:
        """Whether any tensor requires grad."""
        return any(tensor is not None and tensor.requires_grad for tensor in self.tensors)

    def features(self, hidden: Tensor, *, batch_invariant: bool = False) -> Tensor:
        """Compute the input (..., F) of the last layer from hidden (..., D).

        batch_invariant: with the same bits in any batch, for fp32 on a CPU; see `token_logprobs`.
        """
        if self.proj_weight is None:
            return hidden
        if batch_invariant:
            return invariant_gelu(invariant_linear(hidden, self.proj_weight, self.proj_bias))
        return F.gelu(F.linear(hidden, self.proj_weight, self.proj_bias))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute all logits (..., V) of hidden (..., D): for sampling and tests."""
        return F.linear(self.features(hidden), self.weight, self.bias)

    def guided(
        self, conditional: Tensor, unconditional: Tensor, scale: float, *, batch_invariant: bool = False
    ) -> tuple[Tensor, Head]:
        """Return features and a linear head on them with the logits of classifier-free guidance.

        For the logits c and u of the hidden states `conditional` and `unconditional` (..., D), weight · features + bias
        = u + scale · (c − u), because the last layer is affine. So `token_logprobs(features, head, labels)` are
        log-probabilities under the guided distribution. Gradients reach both hidden states.

        Args:
            conditional: (..., D) float, hidden states under the prompt.
            unconditional: (..., D) float, of the same positions under the unconditional prompt.
            scale: guidance scale; 1 gives the logits of `conditional`.
            batch_invariant: give features of a row the same bits in any batch, for fp32 on a CPU; see `token_logprobs`.

        Returns:
            Features (..., F) and a head on them with `weight` and `bias`.

        Raises:
            OpError: shapes that differ.

        """
        if conditional.shape != unconditional.shape:
            raise OpError(
                f"Head.guided: unconditional has shape {tuple(unconditional.shape)}, expected that of conditional, "
                f"{tuple(conditional.shape)}; give both for the same positions"
            )
        scale = _dispatch.check_float("Head.guided", "scale", scale)
        if batch_invariant:  # lerp rounds differently in vectors and at their ends
            u = self.features(unconditional, batch_invariant=True)
            features = u + (self.features(conditional, batch_invariant=True) - u) * scale
        else:
            features = torch.lerp(self.features(unconditional), self.features(conditional), scale)
        return features, Head(self.weight, self.bias)

    def to(self, dtype: torch.dtype) -> Head:
        """Return the head in another dtype; gradients reach the original tensors."""
        weight, *rest = self.tensors
        return Head(weight.to(dtype), *(None if tensor is None else tensor.to(dtype) for tensor in rest))

    @classmethod
    def of(cls, module: Head | nn.Module) -> Head:
        """Return the head with the weights of a module.

        Args:
            module: nn.Linear; nn.Sequential(Linear, GELU, Linear); transformers' JanusVQVAEHead; DeepSeek's
                vision_head; or a `Head`, which is returned as it is. The GELU must be the exact one. Of peft's
                `modules_to_save` the active copy is taken. Weights sharded by FSDP2 are gathered as they are now, so
                call this in every step.

        Raises:
            OpError: any other module; active LoRA adapters, which plain weights do not hold; hooks and patched
                forwards; quantized weights, and weights that are sharded in another way. It names the remedy.

        """
        from ospo_fast.ops import _head_modules  # it builds on this class

        if isinstance(module, Head):
            return module
        if not isinstance(module, nn.Module):
            raise OpError(
                f"Head.of: got {type(module).__name__}, expected nn.Linear, a Linear-GELU-Linear module or Head"
            )
        return _head_modules.head_of(module)


def _is_plain(tensor: Tensor, dims: int) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.is_meta
    return plain and tensor.dim() == dims and tensor.numel() > 0


def _check_plain(name: str, tensor: Tensor, dims: int) -> None:
    if _is_plain(tensor, dims):
        return
    if not isinstance(tensor, Tensor):
        raise OpError(f"Head: {name} is {type(tensor).__name__}, expected a tensor")
    if hasattr(tensor, "placements"):
        raise OpError(
            f"Head: {name} is a DTensor with placements {tensor.placements} that FSDP2 does not manage, expected a "
            f"plain tensor; use {name}.full_tensor(grad_placements=[Partial('avg')]) if every process has its own "
            "data, full_tensor(grad_placements=[Replicate()]) if all compute the same loss, to_local() with "
            "process_group= for rows that are split over processes, or exclude the head from sharding"
        )
    if hasattr(tensor, "__tensor_flatten__"):
        raise OpError(f"Head: {name} is a {type(tensor).__name__}, expected a plain tensor; dequantize the head first")
    if tensor.is_meta:
        raise OpError(
            f"Head: {name} is on the meta device (offloaded or not loaded); load the head onto the device first"
        )
    if not tensor.is_floating_point():
        raise OpError(f"Head: {name} is {tensor.dtype}, expected a floating dtype; exclude the head from quantization")
    if tensor.numel() == 0:
        from ospo_fast.ops._sharded_weights import check_present

        check_present("Head", name, tensor)
    if tensor.dim() != dims:
        # FSDP1 leaves the flat part of this process in its place.
        remedy = "; call the loss inside the forward of the sharded module" if tensor.dim() == 1 else ""
        raise OpError(f"Head: {name} has shape {tuple(tensor.shape)}, expected {dims} dimensions{remedy}")
