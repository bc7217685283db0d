"""The weights that training changes: LoRA matrices on every process, or all of the decoder, sharded by FSDP2."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ospo_fast.config import TrainConfig
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.files import MAX_BYTES
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.quantized import is_quantized
from ospo_fast.stages.checkpoints import (
    check_optimizer,
    check_tensors,
    load_shards,
    read_checkpoint,
    read_sharded,
    write_checkpoint,
    write_sharded,
)
from ospo_fast.stages.parallel import Ranks

State = dict[str, Any]
_TRAINED = ("layers", "norm")  # of a decoder, with train.full
_GATE_UP = ("gate_proj", "up_proj")


def check_lora(model: UnifiedModel, settings: TrainConfig) -> None:
    """Raise UsageError for a target that names no linear layer of the decoder, or a model with an adapter in it."""
    modules = list(model.decoder.named_modules())
    if any("base_layer" in module._modules for _, module in modules):  # whose adapter training would replace
        raise UsageError(
            f"quantize: {model.name} is an adapter, which quantize keeps apart from its base model, expected a whole "
            "model for training; merge it by `ospo-fast convert`, or set quantize=null."
        )
    for target in lora_targets(model, settings):
        found = [module for name, module in modules if f".{name}".endswith(f".{target}")]
        if not found or not all(isinstance(module, nn.Linear) for module in found):
            known = sorted({name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)})
            raise UsageError(
                f"train.lora_targets: got {target!r}, expected names of linear layers of the decoder: "
                f"{', '.join(known)}."
            )


def lora_targets(model: UnifiedModel, settings: TrainConfig) -> list[str]:
    """Return `train.lora_targets`, where a decoder has gate and up projection in one, that one for them."""
    found = {name.rpartition(".")[2] for name, _ in model.decoder.named_modules()}
    fused = "gate_up_proj" if "gate_up_proj" in found else None
    named = [fused if fused and name in _GATE_UP and name not in found else name for name in settings.lora_targets]
    return list(dict.fromkeys(named))


def disable_dropout(module: nn.Module) -> None:
    """Turn off the dropout of a model for good: its noise would be part of what the loss compares."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("attention_dropout", "dropout"):  # that layers of transformers hand to a function
            if isinstance(vars(part).get(name), float):
                setattr(part, name, 0.0)


def add_lora(model: UnifiedModel, settings: TrainConfig) -> Any:
    """Add LoRA layers to the language model and freeze everything else; return the PeftModel around `model.module`."""
    from peft import LoraConfig, get_peft_model

    prefix = next((name for name, module in model.module.named_modules() if module is model.decoder), None)
    if prefix is None:
        raise OspoError(f"train: `decoder` of {model.name} should be a submodule of `module`; correct the model class.")
    start = f"{prefix}." if prefix else ""
    names = "|".join(map(re.escape, lora_targets(model, settings)))
    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=rf"{re.escape(start)}(?:.*\.)?({names})",
        bias="none",
    )
    return get_peft_model(model.module, lora)


class LoraWeights:
    """LoRA matrices in float32 or float64, whole on every process. DDP adds up their gradients, in their dtype."""

    def __init__(self, model: UnifiedModel, settings: TrainConfig, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        disable_dropout(model.decoder)
        self.peft = add_lora(model, settings)
        self.peft.train()
        self.parameters: dict[str, Any] = {name: p for name, p in self.peft.named_parameters() if p.requires_grad}
        self.checkpointed: Any = model.module  # the module of transformers that recomputes activations

    def distribute(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward pass that does as `run`, and after whose backward pass the gradients are means over ranks.

        DDP sees the trained matrices alone: the frozen weights are neither broadcast nor checked.
        """
        if self.ranks.size == 1:
            return run
        return nn.parallel.DistributedDataParallel(_Forward(run, self.parameters), gradient_as_bucket_view=True)

    def accumulating(self, forward: Any) -> AbstractContextManager[Any]:
        """Return the context of passes of a step before its last one, in which the ranks do not meet."""
        context: AbstractContextManager[Any] = nullcontext() if self.ranks.size == 1 else forward.no_sync()
        return context

    def publish(self) -> None:
        """Let `model` have the weights of now, and no dropout."""
        self.peft.eval()

    def train(self) -> None:
        """Make the model ready for the next step after `publish`."""
        self.peft.train()

    def before_training(self) -> AbstractContextManager[Any]:
        """Return a context in which `model` has the weights from before training."""
        context: AbstractContextManager[Any] = self.peft.disable_adapter()
        return context

    def whole(self) -> dict[str, Tensor]:
        """Return the trained weights, on the CPU, as of the last call of `publish`."""
        return {name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}

    @torch.no_grad()
    def load_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the weights to those of `whole`, after `publish`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    def check_whole(self, tensors: Any) -> None:
        """Raise ValueError unless the value has the form of `whole`."""
        check_tensors("adapter", tensors, self.parameters)

    def save_checkpoint(self, path: Path, state: State, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint of weights, optimizer and `state`. Raises OspoError on every rank."""

        def write() -> None:
            write_checkpoint(path, {**state, "adapter": self.whole(), "optimizer": optimizer.state_dict()["state"]})

        self.ranks.first(write)

    def read_checkpoint(self, path: Path) -> State:
        """Read a checkpoint. Raises an exception of any kind if it is damaged."""
        state: State = read_checkpoint(path, self.max_bytes())
        return state

    def check_checkpoint(self, state: State) -> None:
        """Raise an exception of any kind unless weights and optimizer of a checkpoint have the form of these."""
        self.check_whole(state["adapter"])
        if not all(tensor.isfinite().all() for tensor in state["adapter"].values()):
            raise ValueError("its adapter is not finite")
        check_optimizer(state["optimizer"], list(self.parameters.values()))

    def load_checkpoint(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        """Set weights and optimizer to those of a checkpoint."""
        self.load_whole(state["adapter"])
        groups = optimizer.state_dict()["param_groups"]  # their values are those of the settings
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})

    def max_bytes(self) -> int:
        """Return the most bytes that a file of this run can have: the weights, their moments, and room for the rest."""
        weights: int = sum(p.numel() * p.element_size() for p in self.parameters.values())
        return MAX_BYTES + 4 * weights

    def merge(self) -> None:
        """Turn the model into the trained one, for good. Quantized layers keep their adapters, which stay exact."""
        if not is_quantized(self.model.module):
            self.peft.merge_and_unload()
        self.model.module.requires_grad_(False)


class FullWeights:
    """All weights of the decoder but its embeddings of text, in float32 at least.

    They are a copy of those of `model`, which keep their dtype, and get the trained ones, rounded, for evaluations and
    at the end. `model.decoder` is the copy between them. With several processes FSDP2 shards the copy and its moments.
    On a GPU it computes in bfloat16, and adds up gradients in float32.
    """

    def __init__(self, model: UnifiedModel, ranks: Ranks) -> None:
        self.model, self.ranks, self.plain = model, ranks, model.decoder
        model.module.requires_grad_(False)
        disable_dropout(model.decoder)
        # Embeddings, and the VQ model where a decoder holds it.
        others = [part for name, part in model.decoder.named_children() if name not in _TRAINED]
        others = [part for part in others if next(part.parameters(), None) is not None]
        self.checkpointed: Any = copy.deepcopy(model.decoder, {id(part): part for part in others})
        frozen = {weight for part in others for weight in part.parameters()}
        if ranks.size > 1:
            _shard(self.checkpointed, frozen, model.device.type, ranks.size)
        else:
            _unfreeze(self.checkpointed, frozen)
        self.parameters: dict[str, Any] = {n: p for n, p in self.checkpointed.named_parameters() if p.requires_grad}
        self.checkpointed.train()
        model.decoder = self.checkpointed

    def distribute(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """See `LoraWeights`; the hooks of FSDP2 are in the decoder."""
        return run

    def accumulating(self, forward: Any) -> AbstractContextManager[Any]:
        """See `LoraWeights`. The ranks meet in every pass: whole gradients of all weights would not fit."""
        return nullcontext()

    def train(self) -> None:
        """See `LoraWeights`."""
        self.model.decoder = self.checkpointed

    @torch.no_grad()
    def publish(self) -> None:
        """See `LoraWeights`. Every rank gets all weights, one by one."""
        own = dict(self.plain.named_parameters())
        for name, parameter in self.parameters.items():
            own[name].copy_(parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter)
        self.model.decoder = self.plain

    def _own(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.plain.named_parameters() if name in self.parameters}

    def whole(self) -> dict[str, Tensor]:
        """See `LoraWeights`; in the dtype of the model."""
        return {name: p.detach().cpu().contiguous() for name, p in self._own().items()}

    @torch.no_grad()
    def load_whole(self, tensors: Mapping[str, Tensor]) -> None:
        """See `LoraWeights`. Sets the weights of the model, and not those that train: it is for the end of training."""
        for name, parameter in self._own().items():
            parameter.copy_(tensors[name])

    def check_whole(self, tensors: Any) -> None:
        """See `LoraWeights`."""
        check_tensors("weights", tensors, self._own())

    def save_checkpoint(self, path: Path, state: State, optimizer: torch.optim.Optimizer) -> None:
        """See `LoraWeights`."""
        tensors, updates = self._state(optimizer)
        write_sharded(path, tensors, {**state, "updates": updates}, self.ranks)

    def _state(self, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], int]:
        """Return the tensors of a checkpoint by name, and the number of updates, which AdamW counts per parameter."""
        tensors: dict[str, Any] = {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        updates = 0
        for name, parameter in self.parameters.items():
            if moments := optimizer.state.get(parameter):
                updates = int(moments["step"])
                tensors |= {f"{key}.{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        return tensors, updates

    def read_checkpoint(self, path: Path) -> State:
        """See `LoraWeights`. Weights and optimizer are checked, and stay in their files."""
        return {**read_sharded(path, self.max_bytes(), self.ranks), "path": path}

    def check_checkpoint(self, state: State) -> None:
        """See `LoraWeights`."""
        if type(state["updates"]) is not int or state["updates"] < 0:
            raise ValueError("its number of updates should be an integer")

    def load_checkpoint(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        """See `LoraWeights`. Raises OspoError for tensors of other names or shapes."""
        if state["updates"]:
            for parameter in self.parameters.values():
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(state["updates"])),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        load_shards(state["path"], self._state(optimizer)[0], self.ranks)

    def max_bytes(self) -> int:
        """See `LoraWeights`."""
        weights: int = sum(p.numel() * p.element_size() for p in self.parameters.values())
        return MAX_BYTES + 4 * weights

    def merge(self) -> None:
        """See `LoraWeights`."""
        self.parameters, self.checkpointed = {}, None


class _Forward(nn.Module):
    """A function as a module that has the trained parameters alone, for DDP."""

    def __init__(self, run: Callable[..., Any], parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.run, self.trained = run, nn.ParameterList(parameters.values())

    def forward(self, *args: Any) -> Any:
        return self.run(*args)


def _unfreeze(module: nn.Module, frozen: set[nn.Parameter]) -> None:
    """Let the weights of a module train, in float32 at least."""
    for parameter in module.parameters():
        if parameter not in frozen and not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            parameter.requires_grad_(True)


def _shard(decoder: Any, frozen: set[nn.Parameter], device: str, ranks: int) -> None:
    """Unfreeze the weights of a decoder of transformers and shard them over all processes.

    Block by block: no process holds more than one whole block in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device, (ranks,)),
        "mp_policy": half if device == "cuda" else MixedPrecisionPolicy(),
    }
    blocks = set(decoder._no_split_modules or ())
    parts = [part for name, part in decoder.named_children() if name in _TRAINED]  # others are shared with the model
    for module in [module for part in parts for module in part.modules() if type(module).__name__ in blocks]:
        _unfreeze(module, frozen)
        fully_shard(module, **options)
    _unfreeze(decoder, frozen)
    fully_shard(decoder, ignored_params=frozen, **options)
