"""Run by test_loss_module.py as each of two processes. Gradients must be those of one process with the whole batch."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from ospo_fast.errors import UsageError
from ospo_fast.integrations.accelerate import training_step
from ospo_fast.integrations.loss_module import LossModule, next_token_loss
from ospo_fast.integrations.transformers import fused_causal_lm_loss
from ospo_fast.integrations.verl import linear_cross_entropy

VOCAB = 24


def build() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
    }


def check_gradients(found: nn.Module, expected: nn.Module, what: str) -> None:
    torch.testing.assert_close(
        gradients(found), gradients(expected), rtol=1e-5, atol=1e-6, msg=lambda message: f"{what}: {message}"
    )


def check_transformers(ids: Tensor, mine: slice) -> None:
    expected = build()
    expected(input_ids=ids, labels=ids).loss.backward()
    models = {name: build() for name in ("DDP", "FSDP2", "FSDP2 with the head by itself")}
    models["DDP"] = DistributedDataParallel(models["DDP"])
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(models["FSDP2 with the head by itself"].lm_head, mesh=mesh)
    for name, model in models.items():
        if name != "DDP":
            fully_shard(model, mesh=mesh)
        fused_causal_lm_loss(model, {"input_ids": ids[mine], "labels": ids[mine]}).backward()
        check_gradients(model, expected, name)


def check_trl(ids: Tensor, mine: slice) -> None:
    """A head that FSDP2 shards by itself."""
    from trl.trainer.utils import add_fused_lm_head

    from ospo_fast.integrations.trl import use_ospo_fast

    expected = build()
    expected(input_ids=ids, labels=ids).loss.backward()
    model = build()
    add_fused_lm_head(model)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.lm_head, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with use_ospo_fast(model):
        model(input_ids=ids[mine], labels=ids[mine], fused_lm_head=True).loss.backward()
    check_gradients(model, expected, "TRL")


def check_statistics_of_trl(rank: int) -> None:
    """Processes compute logits for different numbers of rows, but gather a sharded head equally often."""
    from trl.trainer.utils import add_fused_lm_head

    from ospo_fast.integrations import trl

    trl._CHUNK_ELEMENTS = 4 * VOCAB  # four rows at a time
    ids = torch.randint(VOCAB, (2, 30 if rank else 9), generator=torch.Generator().manual_seed(rank))
    for together in (False, True):
        plain, model = build(), build()
        for prepared in (plain, model):
            add_fused_lm_head(prepared, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
        mesh = init_device_mesh("cpu", (2,))
        head: Any = [model.model.norm, model.lm_head] if together else model.lm_head
        fully_shard(head, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh)
        expected = plain(input_ids=ids, labels=ids, fused_lm_head=True)
        with trl.use_ospo_fast(model):
            found = model(input_ids=ids, labels=ids, fused_lm_head=True)
        for name in ("log_probs", "mean_logits", "is_top1"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
        found.loss.backward()


def check_accelerate(accelerator: Accelerator, ids: Tensor, mine: slice) -> None:
    expected = build()
    expected(input_ids=ids, labels=ids).loss.backward()
    expected = LossModule(expected.model, expected.lm_head, next_token_loss)
    torch.optim.SGD(expected.parameters(), lr=0.1).step()

    model = build()
    module = LossModule(model.model, model.lm_head, next_token_loss)
    bare = copy.deepcopy(module)
    module, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), lr=0.1))
    assert isinstance(module, DistributedDataParallel)
    batch = {"inputs": ids[mine], "labels": ids[mine]}
    training_step(accelerator, module, optimizer, batch)
    torch.testing.assert_close(module.module.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)
    for unwrapped in (bare, module.module):
        with pytest.raises(UsageError, match="bare LossModule with 2 processes"):
            training_step(accelerator, unwrapped, optimizer, batch)


def check_verl(rank: int) -> None:
    """The gradients of hidden add up over the ranks; those of the weight belong to the rows of a rank."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, 8, generator=generator).requires_grad_() for s in ((2, 5), (VOCAB,)))
    ids = torch.randint(VOCAB, (2, 5), generator=generator)
    logps = (hidden @ weight.T / 0.7).log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1).flatten()
    logps = logps.gather(-1, ids[..., None]).flatten()
    expected = torch.autograd.grad((logps.sin() + entropy.square()).sum(), (hidden, weight))

    half = VOCAB // 2
    part = weight.detach()[rank * half : (rank + 1) * half].clone().requires_grad_()
    found_logps, found_entropy = linear_cross_entropy(hidden, part, ids, 0.7, "none", dist.group.WORLD)
    torch.testing.assert_close((found_logps, found_entropy), (logps, entropy), rtol=1e-5, atol=1e-5)
    dhidden, dpart = torch.autograd.grad((found_logps.sin() + found_entropy.square()).sum(), (hidden, part))
    dist.all_reduce(dhidden)
    torch.testing.assert_close(dhidden, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dpart, expected[1][rank * half : (rank + 1) * half], rtol=1e-5, atol=1e-5)


def main() -> None:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    assert accelerator.num_processes == 2
    ids = torch.randint(VOCAB, (4, 9), generator=torch.Generator().manual_seed(0))
    mine = slice(2 * rank, 2 * rank + 2)
    check_transformers(ids, mine)
    check_accelerate(accelerator, ids, mine)
    check_verl(rank)
    if importlib.util.find_spec("trl") is not None:
        check_trl(ids, mine)
        check_statistics_of_trl(rank)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
