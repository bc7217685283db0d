"""Output head over the image codes, as plain weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast.errors import OpError

_REMEDY = "pass ospo_fast.Head(weight, bias, proj_weight, proj_bias) with its plain weights"
# Names of projection, activation and output layer in transformers' JanusVQVAEHead and in DeepSeek's vision_head.
_LAYER_NAMES = (
    ("proj_out", "activation_fn", "vision_head"),
    ("output_mlp_projector", "vision_activation", "vision_head"),
)


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

    def features(self, hidden: Tensor) -> Tensor:
        """Compute the input (..., F) of the last layer from hidden (..., D)."""
        if self.proj_weight is None:
            return hidden
        return F.gelu(F.linear(hidden, self.proj_weight, self.proj_bias))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Compute all logits (..., V) of hidden (..., D): for sampling and tests."""
        return F.linear(self.features(hidden), self.weight, self.bias)

    def guided(self, conditional: Tensor, unconditional: Tensor, scale: float) -> tuple[Tensor, Head]:
        """Return features and a linear head on them with the logits of classifier-free guidance.

        For the logits c and u of the hidden states `conditional` and `unconditional` (..., D), weight · features + bias
        = u + scale · (c − u), because the last layer is affine. So `token_logprobs(features, head, labels)` are
        log-probabilities under the guided distribution. Gradients reach both hidden states.

        Args:
            conditional: (..., D) float, hidden states under the prompt.
            unconditional: (..., D) float, of the same positions under the unconditional prompt.
            scale: guidance scale; 1 gives the logits of `conditional`.

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
                vision_head; or a `Head`, which is returned as it is. The GELU must be the exact one.

        Raises:
            OpError: any other module, and LoRA-wrapped, quantized or sharded weights; it names the remedy.

        """
        if isinstance(module, Head):
            return module
        if not isinstance(module, nn.Module):
            raise OpError(
                f"Head.of: got {type(module).__name__}, expected nn.Linear, a Linear-GELU-Linear module or Head"
            )
        _check_unwrapped(module)
        if isinstance(module, nn.Linear):
            return cls(*_linear_tensors(module, "head"))
        projection, activation, output = _mlp_layers(module)
        _check_exact_gelu(activation)
        return cls(*_linear_tensors(output, "output layer"), *_linear_tensors(projection, "projection"))


def _mlp_layers(module: nn.Module) -> list[Any]:
    if isinstance(module, nn.Sequential) and len(module) == 3:
        return list(module)
    for names in _LAYER_NAMES:
        if all(hasattr(module, name) for name in names):
            return [getattr(module, name) for name in names]
    raise OpError(
        f"Head.of: {type(module).__name__} is not a known head (nn.Linear or Linear-GELU-Linear); "
        f"if it computes weight·gelu(proj·x) or weight·x, {_REMEDY}"
    )


def _check_unwrapped(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(part, "base_layer") or hasattr(part, "lora_A"):
            raise OpError(
                f"Head.of: {type(part).__name__} has a LoRA adapter, but the fused path would lose its gradient; "
                "remove the head from target_modules, or merge the adapter (merge_and_unload) first"
            )
        if hasattr(part, "modules_to_save") and hasattr(part, "original_module"):
            raise OpError(
                f"Head.of: {type(part).__name__} wraps a copy that is being trained; "
                "pass the active copy, module.modules_to_save[adapter_name]"
            )


def _linear_tensors(module: nn.Module, role: str) -> tuple[Tensor, Tensor | None]:
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise OpError(f"Head.of: its {role} is {type(module).__name__}, expected nn.Linear; {_REMEDY}")
    return module.weight, module.bias


def _check_exact_gelu(activation: Any) -> None:
    name = getattr(activation, "__name__", type(activation).__name__)
    if isinstance(activation, nn.GELU):
        exact, name = activation.approximate == "none", f"nn.GELU(approximate={activation.approximate!r})"
    else:
        # GELUActivation is the erf form of transformers; its tanh forms have other names.
        exact = activation is F.gelu or type(activation).__name__ == "GELUActivation"
    if not exact:
        raise OpError(f"Head.of: the activation is {name}, expected the exact erf GELU, nn.GELU(); use another loss")


def _check_plain(name: str, tensor: Tensor, dims: int) -> None:
    if not isinstance(tensor, Tensor):
        raise OpError(f"Head: {name} is {type(tensor).__name__}, expected a tensor")
    if hasattr(tensor, "placements"):
        raise OpError(
            f"Head: {name} is a DTensor; exclude the head from fully_shard/tensor parallelism, "
            f"or pass ospo_fast.Head with {name}.full_tensor()"
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
        raise OpError(
            f"Head: {name} has no elements (sharded by FSDP or ZeRO-3?); gather it first "
            "(summon_full_params, GatheredParameters) or exclude the head from sharding"
        )
    if tensor.dim() != dims:
        raise OpError(f"Head: {name} has shape {tuple(tensor.shape)}, expected {dims} dimensions")
