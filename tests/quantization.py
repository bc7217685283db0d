"""What tests of quantized weights share: the libraries and kinds, and the weights as plain ones."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

CASES = [(library, kind) for library in ("torchao", "bitsandbytes") for kind in ("int8", "int4")]


def use(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantize by this library, or skip the test where it is not installed."""
    from ospo_fast.models import quantized

    pytest.importorskip(library)
    if library == "bitsandbytes":  # which on such CPUs packs weights with other scales
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.setattr(quantized, "find_library", lambda device: library)


def dequantized(layer: Any) -> Tensor:
    """The weights of a quantized layer as its own product reads them."""
    from peft.utils.integrations import dequantize_bnb_weight

    weight = layer.weight
    if type(weight).__module__.startswith("bitsandbytes"):
        return dequantize_bnb_weight(weight, state=getattr(layer, "state", None)).to(torch.float32)
    return weight.dequantize() if hasattr(weight, "qdata") else weight.get_original_weight()


def linear_layers(decoder: Any) -> dict[str, nn.Linear]:
    return {name: part for name, part in decoder.layers.named_modules() if isinstance(part, nn.Linear)}


@torch.no_grad()
def copy_dequantized(model: Any, plain: Any) -> None:
    """Give the plain model the weights that the layers of a quantized one have."""
    own = linear_layers(plain.decoder)
    for name, layer in linear_layers(model.decoder).items():
        own[name].weight.copy_(dequantized(layer))
