"""Train a `LossModule` with Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ospo_fast.integrations.loss_module import LossModule, split_loss
from ospo_fast.packages import required_by

with required_by("ospo_fast.integrations.lightning", "lightning", extra="lightning"):
    import lightning


class LossLightningModule(lightning.LightningModule):
    """Train backbone and head on a loss of hidden states, without logits in memory.

    A batch is a mapping of arguments of `LossModule`: `inputs`, `labels`, and those of the loss. Loss and metrics are
    logged as `train/…`, `val/…` and `test/…`.

    Args:
        module: backbone, head and loss.
        optimizer: builds the optimizer of the parameters that require grad, such as
            `functools.partial(torch.optim.AdamW, lr=1e-5)`.

    """

    def __init__(self, module: LossModule, optimizer: Callable[[Iterable[nn.Parameter]], Any]) -> None:
        super().__init__()
        self.module, self._build_optimizer = module, optimizer

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._step(batch, "train", average=False)

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the loss of a batch; Lightning adds the index to the names of metrics if there are several loaders."""
        return self._step(batch, "val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the loss of a batch, as `validation_step` does."""
        return self._step(batch, "test")

    def configure_optimizers(self) -> Any:
        """Return the optimizer."""
        return self._build_optimizer(p for p in self.parameters() if p.requires_grad)

    def _step(self, batch: Mapping[str, Any], name: str, *, average: bool = True) -> Tensor:
        loss, metrics = split_loss(self.module(**batch))
        size = len(batch["labels"])
        values = {f"{name}/{key}": value for key, value in {**metrics, "loss": loss}.items()}
        self.log_dict(values, batch_size=size, sync_dist=average)
        return loss
