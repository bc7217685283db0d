"""Weights that are sharded over processes: by FSDP2, as DTensors of the user, or by DeepSpeed ZeRO-3.

FSDP2 and DeepSpeed are known by the attributes of their objects, so that neither is imported.
"""

from __future__ import annotations

import contextlib
import math
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ospo_fast.errors import OpError
from ospo_fast.ops.head import Head

# ---------------------------------------------------------------- DeepSpeed ZeRO-3


def check_present(owner: str, name: str, tensor: Tensor) -> None:
    """Raise OpError for a tensor without elements, as sharding leaves them."""
    if tensor.numel() > 0:
        return
    if hasattr(tensor, "ds_id"):
        why = "DeepSpeed ZeRO-3 has partitioned it"
        remedy = (
            "call the loss inside the forward of the module that DeepSpeed wraps, or forward and backward inside `with "
            f"deepspeed.zero.GatheredParameters([{name}])`"
        )
    else:
        why = "sharded by FSDP?"
        remedy = "call the loss inside the forward of the sharded module, or exclude the head from sharding"
    raise OpError(f"{owner}: {name} has no elements ({why}), expected the whole tensor; {remedy}")


def gathered_parameters(tensors: Iterable[Tensor | None]) -> Any:
    """Return a context in which frozen parameters that DeepSpeed ZeRO-3 has partitioned since the forward are whole."""
    partitioned = [t for t in tensors if t is not None and t.numel() == 0 and hasattr(t, "ds_id")]
    if not partitioned:
        return contextlib.nullcontext()
    check_accumulates(partitioned)
    return sys.modules["deepspeed"].zero.GatheredParameters(partitioned)


def check_accumulates(parameters: Iterable[Tensor]) -> None:
    """Raise OpError if autograd would have to accumulate the gradient of an empty parameter, which it cannot."""
    if any(parameter.numel() == 0 and parameter.requires_grad for parameter in parameters):
        raise OpError(
            "Head: DeepSpeed ZeRO-3 has partitioned its weights since the forward, expected them whole in the backward "
            "too, because they require grad; call backward inside the same GatheredParameters context, or call the "
            "loss inside the forward of the module that DeepSpeed wraps"
        )


# ---------------------------------------------------------------- FSDP2


def gather_parameter(weight: Any, bias: Any, check_module: Any) -> tuple[Tensor, Any]:
    """Gather weight and bias of a layer that FSDP2 has sharded, for this call.

    Their gradients are averaged over the processes, as FSDP2 does. check_module: called before anything is gathered.
    """
    managed = find_sharded(weight)
    if managed is None:
        Head(weight)  # says what to do; hooks of tensor parallelism are not the point
    parameter, group, state = managed
    if getattr(parameter, "is_dtensor", False) or getattr(group, "gradient_divide_factor", None) is not None:
        raise OpError(
            f"Head: the weight is sharded over {weight.device_mesh} with {weight.placements}, by more than FSDP2 or "
            "with another gradient divisor; expected FSDP2 alone; call the loss inside the forward of the sharded "
            "module, or exclude the head from sharding"
        )
    check_module()
    dtype = getattr(getattr(state, "_mp_policy", None), "param_dtype", None)
    return _gather(weight, dtype), bias if bias is None or not hasattr(bias, "placements") else _gather(bias, dtype)


def _gather(weight: Any, dtype: torch.dtype | None) -> Tensor:
    from torch.distributed.tensor import Partial

    whole: Tensor = weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim)
    for node in _conversions(whole.grad_fn):
        node.gathered_from = weakref.ref(weight), _version(weight)
    whole = whole if dtype is None else whole.to(dtype)
    whole.gathered_over = weight.device_mesh  # type: ignore[attr-defined]  # for check_shards, also without gradient
    return whole


def _version(weight: Any) -> Any:
    """Return what changes with a DTensor: optimizers write to it, other code to the local part, or replaces that."""
    return weight._version, weight._local_tensor._version, weight._local_tensor.data_ptr()


def _managed_parameters() -> Iterator[tuple[Any, Any, Any]]:
    """Yield FSDP2's records of all parameters that it manages, with their groups and states."""
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError:
        return
    for reference in list(_module_state_mapping.values()):
        state = reference()
        for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
            for parameter in getattr(group, "fsdp_params", ()):
                yield parameter, group, state


def find_sharded(weight: Any) -> Any:
    """Return FSDP2's record of a sharded parameter, its group and state, or None if FSDP2 does not manage it."""
    return next((found for found in _managed_parameters() if found[0].sharded_param is weight), None)


def _check_reduced(name: str, tensor: Tensor) -> None:
    """Refuse a parameter that FSDP2 has made whole for a forward that has ended, without a path into that forward.

    FSDP2 learns from the gradients of what the forward returned that it has to reduce those of the parameters.
    """
    for parameter, group, _ in _managed_parameters():
        if getattr(parameter, "_unsharded_param", None) is not tensor:
            continue
        # Neither in a forward nor in its recomputation by checkpoints.
        if getattr(getattr(group, "_training_state", None), "name", "") == "IDLE":
            raise OpError(
                f"Head: {name} is a parameter of FSDP2 that requires grad, and hidden does not, outside the forward of "
                "the module that FSDP2 wraps; its gradient would never be reduced; expected the loss inside that "
                "forward, see LossModule, or torch.no_grad() for evaluation"
            )


# ---------------------------------------------------------------- DTensors


def check_shards(head: Head, hidden: Tensor, process_group: Any) -> Head:
    """Refuse weights that are not what they should be on this process, and those whose gradient would be wrong."""
    if process_group is None and not torch.is_grad_enabled():
        return head
    for name, tensor in zip(("weight", "bias", "proj_weight", "proj_bias"), head.tensors, strict=True):
        if process_group is not None and (mesh := getattr(tensor, "gathered_over", None)) is not None:
            from torch.distributed.tensor import Replicate

            if name in ("weight", "bias"):
                check_parts(name, mesh, [Replicate()] * mesh.ndim, process_group)
        if tensor is None or not tensor.requires_grad or not torch.is_grad_enabled():
            continue
        if not hidden.requires_grad and tensor.grad_fn is None and "torch.distributed.fsdp" in sys.modules:
            _check_reduced(name, tensor)
        for node in _conversions(tensor.grad_fn):
            placements, mesh = node.dtensor_spec.placements, node.dtensor_spec.mesh
            if process_group is not None and name in ("weight", "bias"):
                check_parts(name, mesh, placements, process_group)
            source, version = getattr(node, "gathered_from", (None, 0))
            if source is not None and (source() is None or _version(source()) != version):
                raise OpError(
                    f"Head: {name} was gathered from a parameter of FSDP2 that has changed since; expected its values "
                    "of now; pass the module itself, or call Head.of in every step"
                )
            if mesh.size() == 1 or node.grad_placements is not None:
                continue
            split = [p for p in placements if not p.is_replicate()]
            if split and process_group is not None:  # the gradient of a shard is whole
                continue
            got = (
                f"a shard ({placements}) of a DTensor" if split else "gathered by full_tensor() without grad_placements"
            )
            raise OpError(
                f"Head: {name} is {got} and requires grad, so its gradient would be wrong; expected the whole weight "
                "with the placements of its gradient: weight.full_tensor(grad_placements=[Partial('avg')]) if every "
                "process has its own data (FSDP, data parallel), [Replicate()] if all compute the same loss; a shard "
                "of the rows goes with process_group="
            )
    return head


def check_parts(name: str, mesh: Any, placements: Sequence[Any], process_group: Any) -> None:
    """Raise OpError unless the processes of `process_group` hold one part each of a tensor with these placements.

    Processes of the group that are not in the mesh are no concern of the DTensor: other rows may be split over them.
    """
    import torch.distributed as dist

    ranks = set(dist.get_process_group_ranks(process_group)) & set(mesh.mesh.flatten().tolist())
    parts = math.prod(mesh.size(dim) for dim, p in enumerate(placements) if not p.is_replicate())
    split = [dim for dim, p in enumerate(placements) if not p.is_replicate()]
    different = {tuple((mesh.mesh == rank).nonzero()[0][split].tolist()) for rank in ranks}
    if len(different) != len(ranks) or parts != len(ranks):
        raise OpError(
            f"Head: {name} is one of {parts} part(s) of a DTensor over {mesh} with {placements}, of which the "
            f"process_group of {process_group.size()} processes has {len(different)}, expected as many parts as "
            "processes, one each; for a whole head call without process_group=; for rows that are split over the "
            "group pass Head(weight.to_local())"
        )


def _conversions(node: Any, limit: int = 64) -> Sequence[Any]:
    """Return the conversions from DTensor among the first nodes of a graph."""
    found, pending = [], [node]
    seen: set[Any] = set()
    while pending and len(seen) < limit:
        node = pending.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "_ToTorchTensorBackward":
            found.append(node)
        else:
            pending += [following for following, _ in node.next_functions]
    return found
