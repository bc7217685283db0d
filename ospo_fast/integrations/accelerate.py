"""Train a `LossModule` with Accelerate: one step that is right under gradient accumulation, DDP and FSDP2.

```python
accelerator = Accelerator(gradient_accumulation_steps=2)
module = LossModule(model.model, model.lm_head, OSPOLoss())
module, optimizer, loader = accelerator.prepare(module, optimizer, loader)
for batch in loader:  # inputs, labels, and the arguments of the loss
    loss, metrics = training_step(accelerator, module, optimizer, batch)
```
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ospo_fast.errors import UsageError
from ospo_fast.integrations.loss_module import LossModule, split_loss
from ospo_fast.packages import required_by

with required_by("ospo_fast.integrations.accelerate", "accelerate"):
    from accelerate import Accelerator


def training_step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: Any,
    batch: Mapping[str, Any],
    *,
    scheduler: Any = None,
    max_grad_norm: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run forward and backward of a batch, and the optimizer where the accumulated batch ends.

    Gradients of the processes are averaged, as Accelerate does: a mean over tokens is the mean of their means.

    Args:
        accelerator: has prepared `module` and `optimizer`.
        module: what `accelerator.prepare` returned for a `LossModule`.
        optimizer: what it returned for the optimizer.
        batch: arguments of `LossModule`: `inputs`, `labels`, and those of the loss.
        scheduler: what it returned for a learning-rate scheduler, or None.
        max_grad_norm: norm to which gradients are clipped; None: not at all.

    Returns:
        The loss of this process and its metrics, detached.

    Raises:
        UsageError: a module that several processes would train each by itself.

    """
    if accelerator.num_processes > 1 and isinstance(module, LossModule) and not _is_sharded(module):
        raise UsageError(
            f"training_step: module is a bare LossModule with {accelerator.num_processes} processes, expected the one "
            "that accelerator.prepare(module) returned; do not unwrap it (module.module), or gradients are not averaged"
        )
    with accelerator.accumulate(module):
        loss, metrics = split_loss(module(**batch))
        accelerator.backward(loss)
        if max_grad_norm is not None and accelerator.sync_gradients:
            accelerator.clip_grad_norm_(module.parameters(), max_grad_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    return loss.detach(), {name: value.detach() for name, value in metrics.items()}


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 or tensor parallelism holds the module's parameters: they wrap no module around it."""
    return any(hasattr(parameter, "placements") for parameter in module.parameters())
