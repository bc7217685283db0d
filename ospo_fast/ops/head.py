"""The head that turns hidden states into logits over the image codes, as bare weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast.errors import OpError

_REMEDY = "pass ospo_fast.Head(weight, bias, proj_weight, proj_bias) with its plain weights"


@dataclass(frozen=True, eq=False)
class Head:
    """logits = weight · gelu(proj_weight · x + proj_bias) + bias with the exact (erf) GELU; without proj a linear head.

    weight (V, F), bias (V,) or None, proj_weight (F, D) or None, proj_bias (F,) or None; then F = D.
    All of one floating dtype and on one device. Tensors that require grad make the head trainable.
    """

    weight: Tensor
    bias: Tensor | None = None
    proj_weight: Tensor | None = None
    proj_bias: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor, dims in (
            ("weight", self.weight, 2),
            ("bias", self.bias, 1),
            ("proj_weight", self.proj_weight, 2),
            ("proj_bias", self.proj_bias, 1),
        ):
            if tensor is not None:
                _check_plain(name, tensor, dims)
                if tensor.dtype != self.weight.dtype or tensor.device != self.weight.device:
                    raise OpError(
                        f"Head: {name} is {tensor.dtype} on {tensor.device}, weight is {self.weight.dtype} on "
                        f"{self.weight.device}; all of a head's tensors must share dtype and device"
                    )
        if self.proj_weight is None and self.proj_bias is not None:
            raise OpError("Head: proj_bias was given without proj_weight; give both or neither")
        _check_length("bias", self.bias, self.weight.shape[0], "rows of weight")
        if self.proj_weight is not None:
            _check_length("proj_bias", self.proj_bias, self.proj_weight.shape[0], "rows of proj_weight")
            if self.weight.shape[1] != self.proj_weight.shape[0]:
                raise OpError(
                    f"Head: weight {tuple(self.weight.shape)} does not follow proj_weight "
                    f"{tuple(self.proj_weight.shape)}; expected (V, F) after (F, D)"
                )

    @property
    def num_codes(self) -> int:
        """V, the number of codes."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """D, the width of the hidden states that the head takes."""
        return self.weight.shape[1] if self.proj_weight is None else self.proj_weight.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """weight, bias, proj_weight, proj_bias."""
        return self.weight, self.bias, self.proj_weight, self.proj_bias

    @property
    def trainable(self) -> bool:
        """Whether any of its tensors requires grad."""
        return any(tensor is not None and tensor.requires_grad for tensor in self.tensors)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden (..., D), all at once: for sampling and for tests."""
        if self.proj_weight is not None:
            hidden = F.gelu(F.linear(hidden, self.proj_weight, self.proj_bias))
        return F.linear(hidden, self.weight, self.bias)

    def guided(self, conditional: Tensor, unconditional: Tensor, scale: float) -> tuple[Tensor, Head]:
        """Features and a linear head on them, whose logits are those of classifier-free guidance.

        For c and u, the logits of the hidden states conditional and unconditional (..., D), weight · features + bias =
        u + scale · (c − u), because the last layer is affine. `token_logprobs` of the two are log-probabilities under
        the distribution that guidance draws from, without logits; gradients reach both hidden states.
        Raises OpError: shapes that differ.
        """
        if conditional.shape != unconditional.shape:
            raise OpError(
                f"Head.guided: unconditional has shape {tuple(unconditional.shape)}, expected that of conditional, "
                f"{tuple(conditional.shape)}; give both for the same positions"
            )
        if self.proj_weight is not None:
            conditional, unconditional = (
                F.gelu(F.linear(hidden, self.proj_weight, self.proj_bias)) for hidden in (conditional, unconditional)
            )
        return torch.lerp(unconditional, conditional, scale), Head(self.weight, self.bias)

    def to(self, dtype: torch.dtype) -> Head:
        """The same head in another dtype; gradients still reach the original tensors."""
        weight, *rest = self.tensors
        return Head(weight.to(dtype), *(None if tensor is None else tensor.to(dtype) for tensor in rest))

    @classmethod
    def of(cls, module: Head | nn.Module) -> Head:
        """The head in a module: nn.Linear; nn.Sequential(Linear, GELU, Linear); transformers' JanusVQVAEHead
        (proj_out, activation_fn, vision_head); DeepSeek's vision_head (output_mlp_projector, vision_activation,
        vision_head). The GELU must be the exact one. Any other module, LoRA-wrapped, quantised or sharded weights:
        OpError that names the remedy.
        """
        if isinstance(module, Head):
            return module
        if not isinstance(module, nn.Module):
            raise OpError(
                f"Head.of: got {type(module).__name__}, expected nn.Linear, a Linear-GELU-Linear module or Head"
            )
        _check_unwrapped(module)
        if isinstance(module, nn.Linear):
            return cls(*_linear(module, "head"))
        first, activation, last = _mlp_parts(module)
        _check_exact_gelu(activation)
        return cls(*_linear(last, "output layer"), *_linear(first, "projection"))


def _mlp_parts(module: nn.Module) -> tuple[nn.Module, Any, nn.Module]:
    for names in (
        ("proj_out", "activation_fn", "vision_head"),
        ("output_mlp_projector", "vision_activation", "vision_head"),
    ):
        if all(hasattr(module, name) for name in names):
            return getattr(module, names[0]), getattr(module, names[1]), getattr(module, names[2])
    if isinstance(module, nn.Sequential) and len(module) == 3:
        return module[0], module[1], module[2]
    raise OpError(
        f"Head.of: {type(module).__name__} is not a known head (nn.Linear or Linear-GELU-Linear); "
        f"if it computes weight·gelu(proj·x) or weight·x, {_REMEDY}"
    )


def _check_unwrapped(module: nn.Module) -> None:
    for part in module.modules():
        if hasattr(part, "base_layer") or hasattr(part, "lora_A"):
            raise OpError(
                f"Head.of: {type(part).__name__} carries a LoRA adapter, whose gradient the fused path would lose; "
                "leave the head out of target_modules, or merge the adapter (merge_and_unload) first"
            )
        if hasattr(part, "modules_to_save") and hasattr(part, "original_module"):
            raise OpError(
                f"Head.of: {type(part).__name__} wraps a copy that is being trained; "
                "pass the active copy, module.modules_to_save[adapter_name]"
            )


def _linear(module: nn.Module, role: str) -> tuple[Tensor, Tensor | None]:
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise OpError(f"Head.of: its {role} is {type(module).__name__}, expected nn.Linear; {_REMEDY}")
    return module.weight, module.bias


def _check_exact_gelu(activation: Any) -> None:
    if isinstance(activation, nn.GELU):
        exact, got = activation.approximate == "none", f"nn.GELU(approximate={activation.approximate!r})"
    elif (
        type(activation).__name__ == "GELUActivation"
    ):  # transformers' name for the erf form; its tanh forms have others
        exact, got = True, ""
    else:
        exact, got = activation is F.gelu, getattr(activation, "__name__", type(activation).__name__)
    if not exact:
        raise OpError(
            f"Head.of: the activation is {got}, expected the exact erf GELU: nn.GELU(); retrain or use another loss"
        )


def _check_plain(name: str, tensor: Tensor, dims: int) -> None:
    if not isinstance(tensor, Tensor):
        raise OpError(f"Head: {name} is {type(tensor).__name__}, expected a tensor")
    if hasattr(tensor, "placements"):
        raise OpError(
            f"Head: {name} is a DTensor; leave the head out of fully_shard/tensor parallelism, "
            f"or pass ospo_fast.Head with {name}.full_tensor()"
        )
    if hasattr(tensor, "__tensor_flatten__"):
        raise OpError(f"Head: {name} is a {type(tensor).__name__}, expected a plain tensor; dequantise the head first")
    if tensor.is_meta:
        raise OpError(
            f"Head: {name} is on the meta device (offloaded or not loaded); load the head onto the device first"
        )
    if not tensor.is_floating_point():
        raise OpError(f"Head: {name} is {tensor.dtype}, expected a floating dtype; leave the head out of quantisation")
    if tensor.numel() == 0:
        raise OpError(
            f"Head: {name} has no elements (sharded by FSDP or ZeRO-3?); gather it first "
            "(summon_full_params, GatheredParameters) or leave the head out of sharding"
        )
    if tensor.dim() != dims:
        raise OpError(f"Head: {name} has shape {tuple(tensor.shape)}, expected {dims} dimensions")


def _check_length(name: str, tensor: Tensor | None, length: int, what: str) -> None:
    if tensor is not None and tensor.shape[0] != length:
        raise OpError(f"Head: {name} has {tensor.shape[0]} elements, expected {length}, the {what}")
