"""Run by test_loss_distributed.py as each of two processes: python two_processes.py RANK STORE.

Both train the same small model on half of a batch each, under DDP and under FSDP2, and check their gradients against
those of one process with the whole batch.
"""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ospo_fast import OSPOLoss, OSPOLossConfig, token_logprobs
from ospo_fast.errors import OpError

WIDTH, CODES, LENGTH, PAIRS = 8, 11, 14, 4


class Model(nn.Module):
    """A body, a head and the loss in one forward, as DDP and FSDP want it."""

    def __init__(self, train_head: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        head = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, CODES))
        self.head = head.requires_grad_(train_head)
        self.loss = OSPOLoss(OSPOLossConfig.preset("full"))

    def forward(self, inputs: Tensor, labels: Tensor, masks: Tensor) -> Tensor:
        return self.loss(self.body(inputs), labels, self.head, object_masks=masks).loss


def half(rank: int, inputs: Tensor, labels: Tensor, masks: Tensor) -> tuple[Tensor, ...]:
    """The pairs of one process; the rows are chosen, rejected and swapped, the masks chosen and rejected."""
    size = PAIRS // 2
    mine = slice(rank * size, rank * size + size)
    return tuple(x.unflatten(0, (-1, PAIRS))[:, mine].flatten(0, 1) for x in (inputs, labels, masks))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    labels = torch.randint(CODES, (3 * PAIRS, LENGTH))
    labels[:, :2] = -100
    batch = torch.randn(3 * PAIRS, LENGTH, WIDTH), labels, torch.rand(2 * PAIRS, 3, 4) < 0.4
    for train_head in (False, True):
        plain = Model(train_head)
        plain(*batch).backward()
        expected = gradients(plain)
        assert len(expected) == (8 if train_head else 4)
        plain.zero_grad()

        distributed = DistributedDataParallel(copy.deepcopy(plain))
        sharded_whole = copy.deepcopy(plain)
        fully_shard(sharded_whole, mesh=mesh)  # its forward holds the head's weights whole
        sharded_body = copy.deepcopy(plain)
        fully_shard(sharded_body.body, mesh=mesh)  # the head is on every process
        models = {"DDP": distributed, "FSDP2": sharded_whole}
        if not train_head:
            models["FSDP2 without the head"] = sharded_body
        for name, model in models.items():
            for _ in range(2):  # the second time onto the first gradients
                model(*half(rank, *batch)).backward()
            found = gradients(model)
            assert found.keys() == expected.keys(), name
            for parameter, grad in found.items():
                torch.testing.assert_close(
                    grad, 2 * expected[parameter], msg=lambda m, n=name, p=parameter: f"{n} {p}: {m}"
                )

    head = nn.Linear(WIDTH, CODES)
    fully_shard(head, mesh=mesh)
    with pytest.raises(OpError, match="exclude the head from fully_shard"):
        token_logprobs(batch[0], head, labels)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
