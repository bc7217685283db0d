"""Weights of 4 and 8 bits: the linear layers of a decoder's layers, by bitsandbytes or torchao.

Embeddings, heads, norms, the vision encoder and the VQ model keep their dtype. Activations keep it too, except those of
8-bit layers of bitsandbytes on CUDA, which are rounded row by row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.packages import check_installed

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

KINDS = ("int8", "int4")
BYTES = {"int8": 1.0, "int4": 0.53}  # of a weight, with its share of the scales
_BLOCK = 64  # weights of 4 bits that share a scale


def check_quantize(quantize: str | None, dtype: str | torch.dtype | None = None) -> None:
    """Check the setting `quantize` without torch.

    Raises:
        UsageError: an unknown value, or float64, which neither library takes.
        MissingPackageError: neither bitsandbytes nor torchao is installed.

    """
    if quantize is None:
        return
    if quantize not in KINDS:
        raise UsageError(f"quantize: got {quantize!r:.60}, expected one of {', '.join(KINDS)}, or null")
    if str(dtype).removeprefix("torch.") in ("float64", "double"):
        raise UsageError(f"quantize: got {quantize!r} with dtype float64, expected float32, bfloat16 or float16")
    check_installed(f"quantize={quantize}", "bitsandbytes", "torchao", extra="quantize", one_of_them=True)


def find_library(device: torch.device) -> str:
    """Return the library that quantizes on a device: on CUDA bitsandbytes, for its kernels, where it is installed.

    Elsewhere it is torchao. bitsandbytes would there fetch kernels from the hub, and it packs 4-bit weights again at
    the first pass without gradients, with scales of fewer bits: a model would not generate with what it was trained on.

    Raises MissingPackageError if torchao is needed and not installed.
    """
    if device.type == "cuda" and importlib.util.find_spec("bitsandbytes") is not None:
        return "bitsandbytes"
    check_installed(f"quantize on {device.type}", "torchao", extra="quantize")
    return "torchao"


def to_device(module: Any, decoder_path: str, device: torch.device, quantize: str | None) -> Any:
    """Move a module to a device, and quantize the linear layers of the decoder's layers there, one layer after another.

    So the device holds one layer in the dtype of the module at most. Returns the module.
    """
    from torch import nn

    if quantize is None:
        return module.to(device)
    decoder = module.get_submodule(decoder_path)
    layers, decoder.layers = decoder.layers, nn.ModuleList()
    module.to(device)
    decoder.layers = layers
    convert = _bitsandbytes if find_library(device) == "bitsandbytes" else _torchao
    for layer in layers:
        layer.to(device)
        for name, linear in list(layer.named_modules()):
            if type(linear) is nn.Linear:
                layer.set_submodule(name, convert(linear.requires_grad_(False), quantize, name))
    if convert is _bitsandbytes:  # where peft looks for what adapters of such layers need
        setattr(module, f"is_loaded_in_{quantize.removeprefix('int')}bit", True)
    return module


def _torchao(linear: nn.Linear, quantize: str, name: str) -> nn.Module:
    import torch
    from torch import nn
    from torchao.quantization import Int8WeightOnlyConfig, quantize_, to_nf4

    if quantize == "int8":
        quantize_(linear, Int8WeightOnlyConfig())
        return linear
    blocks, rest = divmod(linear.weight.numel(), _BLOCK)
    if rest:
        raise OspoError(
            f"quantize: {name} has {linear.weight.numel()} weights, expected a multiple of {_BLOCK} for int4; use int8"
        )
    scales = next(size for size in (256, 128, 64, 32, 16, 8, 4, 2, 1) if blocks % size == 0)  # that share one of theirs
    with torch.no_grad():
        linear.weight = nn.Parameter(to_nf4(linear.weight.detach(), _BLOCK, scales), requires_grad=False)
    return linear


def _bitsandbytes(linear: nn.Linear, quantize: str, name: str) -> nn.Module:
    import bitsandbytes

    library: Any = bitsandbytes.nn
    weight, sizes = linear.weight, (linear.in_features, linear.out_features, linear.bias is not None)
    options: dict[str, Any] = {"requires_grad": False}
    if quantize == "int8":
        # Outliers, which a threshold would leave in the dtype, are found by all rows of a batch: a row would depend on
        # the others.
        result = library.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=0.0, device="meta")
        result.weight = library.Int8Params(weight.data, has_fp16_weights=False, **options)
    else:
        result = library.Linear4bit(*sizes, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
        result.weight = library.Params4bit(weight.data, quant_type="nf4", module=result, **options)
    result.bias = linear.bias
    module: nn.Module = result.to(weight.device).train(linear.training)  # quantizes
    return module


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module of transformers has layers of `to_device`, and not those of quantized files."""
    from torch import nn

    config = getattr(module, "config", None)
    return getattr(config, "quantization_config", None) is None and any(
        isinstance(part, nn.Linear) and _is_packed(part.weight) for part in module.modules()
    )


def _is_packed(weight: Any) -> bool:
    return type(weight).__module__.split(".")[0] in ("bitsandbytes", "torchao")


def check_adapter_layers(module: nn.Module, name: str) -> None:
    """Raise OspoError if an adapter of peft, which stays in `module`, changes other layers than quantized ones."""
    for path, part in module.named_modules():
        base = part._modules.get("base_layer", part._modules.get("original_module"))
        if base is not None and not _is_packed(getattr(base, "weight", None)):
            raise OspoError(
                f"quantize: the adapter {name} changes {path}, expected linear layers of the decoder's layers alone; "
                "merge it by `ospo-fast convert` and load the result"
            )


def stored_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors that hold the parameters of a module, each once: of quantized ones, codes and scales."""
    seen = set()
    for part in module.modules():
        for weight in part._parameters.values():
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                yield from _parts(weight)
                if type(weight).__name__ == "Int8Params":
                    yield from _parts(_int8_scales(weight, part))


def _int8_scales(weight: Any, layer: Any) -> Tensor:
    """Return the scales of an 8-bit layer of bitsandbytes, whose first pass moves them."""
    scales: Tensor = layer.state.SCB if weight.SCB is None else weight.SCB
    return scales


def _parts(weight: Any) -> Iterator[Tensor]:
    """Yield the tensors that hold a value: those inside a subclass, and the scales of 4 bits, which have scales too."""
    from torch import Tensor

    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _parts(getattr(weight, name))
    elif isinstance(weight, Tensor):
        yield weight
        yield from _parts(getattr(weight, "quant_state", None))
    elif weight is not None:  # a state of bitsandbytes
        yield weight.absmax
        yield from _parts(weight.state2)


def stored_bytes(*modules: nn.Module) -> int:
    """Return the bytes that the parameters of modules take."""
    return sum(tensor.numel() * tensor.element_size() for module in modules for tensor in stored_tensors(module))
