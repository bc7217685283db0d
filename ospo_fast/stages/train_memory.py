"""Whether a training pass fits into memory with all of its activations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ospo_fast.config import TrainConfig
from ospo_fast.cost import ModelShapes, activation_bytes, head_bytes
from ospo_fast.errors import OspoError
from ospo_fast.models.base import UnifiedModel


def needs_checkpointing(
    model: UnifiedModel, settings: TrainConfig, parameters: Sequence[Tensor], *, sequences: int, longest: int
) -> bool:
    """Return whether an estimate of what a pass allocates exceeds what is free on the device of a model.

    Gradients and moments of AdamW are counted, because they are allocated after the first pass. A model whose sizes
    are not known is taken to be large.

    Args:
        model: with its weights on the device.
        settings: of training.
        parameters: that train; of sharded ones, those of this process count.
        sequences: of a pass: chosen, rejected and swapped rows, and those of guidance.
        longest: tokens of the longest of all sequences.

    """
    config: Any = getattr(model.module, "config", None)
    try:
        if config.model_type != "janus":
            return True
        shapes = ModelShapes.from_config(config.to_dict(), model.name)
    except (AttributeError, OspoError):
        return True
    size = 2 if model.device.type == "cuda" else torch.empty((), dtype=model.dtype).element_size()
    rank, dropout = (0, True) if settings.full else (settings.lora_rank, settings.lora_dropout > 0)
    need = activation_bytes(
        shapes, sequences * longest, checkpointing=False, itemsize=size, rank=rank, dropout=dropout,
        targets=tuple(settings.lora_targets),
    )  # fmt: skip
    need += head_bytes(shapes, sequences * shapes.tokens, itemsize=size)
    own = [getattr(parameter, "_local_tensor", parameter) for parameter in parameters]
    need += 3 * sum(tensor.numel() * tensor.element_size() for tensor in own)
    return need > free_bytes(model.device)


def free_bytes(device: torch.device) -> float:
    """Return the memory that this process can still allocate on a device.

    The processes of torch.distributed.run on a machine share its main memory in equal parts.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return float(psutil.virtual_memory().available) / (int(count) if count.isdigit() and int(count) else 1)
