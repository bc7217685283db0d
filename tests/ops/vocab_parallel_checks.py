"""Checks of heads whose codes are split over two processes, against one process with the whole head."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ospo_fast import Head, token_logprobs
from ospo_fast.errors import OpError

WIDTH, INNER, ROWS = 6, 8, 14
CODES = (24, 23)  # equal parts; 12 and 11, as torch.chunk splits


def parallel(*arguments: Any, **options: Any) -> Any:
    return token_logprobs(*arguments, process_group=dist.group.WORLD, **options)


def whole_head(kind: str, codes: int, dtype: torch.dtype = torch.float64) -> Head:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).mul(shape[-1] ** -0.5).to(dtype)

    if kind == "linear without bias":
        return Head(normal(codes, WIDTH))
    if kind == "linear":
        return Head(normal(codes, WIDTH), normal(codes))
    return Head(normal(codes, INNER), normal(codes), normal(INNER, WIDTH), normal(INNER))


def copied(head: Head, train: bool) -> Head:
    return Head(*(None if t is None else t.detach().clone().requires_grad_(train) for t in head.tensors))


def part(tensor: Tensor, rank: int) -> Tensor:
    return tensor.chunk(2)[rank]


def slice_of(head: Head, rank: int, train: bool) -> Head:
    weight, bias, *projection = head.tensors
    return copied(Head(part(weight, rank), None if bias is None else part(bias, rank), *projection), train)


def eager(
    hidden: Tensor, head: Any, labels: Tensor, *, temperature: float = 1, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    scores = head(hidden)
    scores = scores.float() if scores.dtype == torch.bfloat16 else scores
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    every = F.log_softmax(scores / temperature, -1)
    active = labels != -100
    logps = every.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(every.exp() * every.clamp(min=-1e4)).sum(-1)  # masked codes have probability 0
    return torch.where(active, logps, 0), torch.where(active, entropy, 0)


def some_labels(codes: int, *shape: int) -> Tensor:
    return torch.randint(codes, shape).masked_fill(torch.rand(shape) < 0.3, -100)


def inputs(codes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(2, ROWS // 2, WIDTH, dtype=torch.float64).to(dtype), some_labels(codes, 2, ROWS // 2)


def loss_of(found: Any, entropy: bool) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    values = found if isinstance(found, tuple) else (found,)
    return sum(
        (torch.randn(value.shape, generator=generator).to(value.dtype) * value).sum()
        for value in values[: 2 if entropy else 1]
    )


def run(function: Any, hidden: Tensor, head: Head, labels: Tensor, entropy: bool) -> list[Tensor]:
    """Values, then gradients of hidden and of the head's tensors that require grad."""
    x = hidden.clone().requires_grad_()
    found = function(x, head, labels)
    weights = [t for t in head.tensors if t is not None and t.requires_grad]
    grads = torch.autograd.grad(loss_of(found, entropy), [x, *weights])
    values = found[: 2 if entropy else 1] if isinstance(found, tuple) else (found,)
    return [*(v.detach() for v in values), *grads]


def expected(results: list[Tensor], head: Head, rank: int, entropy: bool) -> list[Tensor]:
    """What this process gets of the results of the whole head: its rows of the last layer's gradients."""
    first = 3 if entropy else 2
    split = 1 if head.bias is None else 2
    return [part(r, rank) if first <= i < first + split else r for i, r in enumerate(results)]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "softcap": 1.5},
    {"entropy": True, "temperature": 1.3, "softcap": 2.0},
    {"entropy": True, "chunk_rows": 4, "keep_logits": True},
    {"keep_logits": False, "chunk_rows": 3},
    {"keep_logits": True},
]


def check_values_and_gradients_are_those_of_the_whole_head(rank: int) -> None:
    for codes in CODES:
        for kind in ("linear", "linear without bias", "mlp"):
            head, (hidden, labels) = whole_head(kind, codes), inputs(codes)
            for options in OPTIONS:
                for train in (False, True):
                    options = dict(options)
                    entropy = options.pop("entropy", False)
                    scores = {k: v for k, v in options.items() if k in ("temperature", "softcap")}
                    best = run(partial(eager, **scores), hidden, copied(head, train), labels, entropy)
                    function = partial(parallel, return_entropy=entropy, **options)
                    mine = run(function, hidden, slice_of(head, rank, train), labels, entropy)
                    torch.testing.assert_close(mine, expected(best, head, rank, entropy))


def check_float32_and_bfloat16_are_no_worse_than_eager(rank: int) -> None:
    """Of both backends, with entropies."""
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("linear", "mlp"):
            for backend in ("cpp", "torch"):
                results: list[list[Tensor]] = []
                for seed in range(4):
                    torch.manual_seed(seed)
                    head, (hidden, labels) = whole_head(kind, 23, dtype), inputs(23, dtype)
                    usual = run(eager, hidden, copied(head, True), labels, True)
                    best = run(eager, hidden.double(), copied(head.to(torch.float64), True), labels, True)
                    function = partial(parallel, return_entropy=True, backend=backend, chunk_rows=5)
                    mine = run(function, hidden, slice_of(head, rank, True), labels, True)
                    results.append([mine, expected(usual, head, rank, True), expected(best, head, rank, True)])
                for i, name in enumerate(
                    ("logps", "entropies", "hidden", *("weight", "bias", "projection", "its bias"))
                ):
                    if i < len(results[0][0]):
                        ours, eager_, exact = (torch.stack([r[j][i] for r in results]) for j in range(3))
                        assert ours.dtype == (torch.float32 if i < 2 else dtype), name
                        bound = 2 * (eager_.double() - exact).abs().max()
                        bound += 4 * torch.finfo(ours.dtype).eps * exact.abs().max()
                        error = (ours.double() - exact).abs().max()
                        assert error <= bound, f"{dtype} {kind} {backend} {name}: {error:.3e} > {bound:.3e}"


def check_both_processes_get_the_same_bits(rank: int) -> None:
    head, (hidden, labels) = whole_head("mlp", 23, torch.float32), inputs(23, torch.float32)
    function = partial(parallel, return_entropy=True)
    mine = run(function, hidden, slice_of(head, rank, True), labels, True)
    for i in (0, 1, 2, 5, 6):  # what is not split
        both = [torch.empty_like(mine[i]) for _ in range(2)]
        dist.all_gather(both, mine[i].contiguous())
        assert torch.equal(*both)


def check_autocast(rank: int) -> None:
    head, (hidden, labels) = whole_head("mlp", 23, torch.float32), inputs(23, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mine = run(parallel, hidden, slice_of(head, rank, True), labels, False)
    half = run(parallel, hidden.bfloat16(), slice_of(head.to(torch.bfloat16), rank, True), labels, False)
    assert all(t.dtype == torch.float32 for t in mine)
    torch.testing.assert_close(mine, [t.float() for t in half])


def check_no_grad_keeps_no_logits(rank: int) -> None:
    codes = 4096
    head, (hidden, labels) = whole_head("linear", codes, torch.float32), inputs(codes, torch.float32)
    shard = slice_of(head, rank, True)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        mine = parallel(hidden, shard, labels, chunk_rows=2, return_entropy=True)
    assert not mine[0].requires_grad
    torch.testing.assert_close(mine, eager(hidden, head, labels))
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 0 < max(sizes) <= 2 * 2048 * 4


def check_rows_are_independent(rank: int) -> None:
    """NaN in a hidden state reaches its own results only, and not the weights if its gradient is 0."""
    head, (hidden, labels) = whole_head("mlp", 23), inputs(23)
    labels[0, :3] = torch.tensor([3, -100, 20])
    hidden[0, 1:3] = torch.nan
    shard, x = slice_of(head, rank, True), hidden.clone().requires_grad_()
    logps, entropy = parallel(x, shard, labels, return_entropy=True)
    assert logps[0, 1] == 0
    assert logps[0, 2].isnan()
    clean = logps.isfinite()
    assert clean.sum() == ROWS - 1
    (torch.where(clean, logps, 0) + torch.where(clean, entropy, 0)).sum().backward()
    for grad in (x.grad, *(t.grad for t in shard.tensors)):
        assert grad.isfinite().all()
    best = run(eager, hidden.nan_to_num(0), copied(head, True), labels.masked_fill(~clean, -100), True)
    torch.testing.assert_close(torch.where(clean, logps, 0), best[0])


def check_masked_codes(rank: int) -> None:
    """All codes of the second process have the bias −inf, as padding of the vocabulary may have."""
    for codes in CODES:
        head, (hidden, labels) = whole_head("linear", codes), inputs(codes)
        head.bias[len(part(head.bias, 0)) :] = -torch.inf
        labels = labels % len(part(head.bias, 0)) * (labels >= 0) + labels.clamp(max=0) * (labels < 0)
        shard = slice_of(head, rank, True)
        for entropy in (False, True):
            best = run(eager, hidden, copied(head, True), labels, entropy)
            mine = run(partial(parallel, return_entropy=entropy), hidden, shard, labels, entropy)
            assert all(t.isfinite().all() for t in mine)
            torch.testing.assert_close(mine, expected(best, head, rank, entropy))


def check_scores_of_one_process_that_exceed_those_of_the_other(rank: int) -> None:
    """By more than what exp can represent."""
    for shift in (2000, -2000):
        head, (hidden, labels) = whole_head("linear", 24), inputs(24)
        head.bias[12:] += shift
        best = run(eager, hidden, copied(head, True), labels, True)
        mine = run(partial(parallel, return_entropy=True), hidden, slice_of(head, rank, True), labels, True)
        torch.testing.assert_close(mine, expected(best, head, rank, True))


@contextmanager
def collectives() -> Iterator[list[tuple[str, int]]]:
    """Name and number of elements of each collective."""
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "broadcast", "reduce")}

    def spied(name: str, original: Any) -> Any:
        def call(tensor: Any, *arguments: Any, **options: Any) -> Any:
            parts = tensor if isinstance(tensor, list) else [tensor]
            calls.append((name, sum(t.numel() for t in parts)))
            return original(tensor, *arguments, **options)

        return call

    for name, original in originals.items():
        setattr(dist, name, spied(name, original))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def check_only_rows_are_exchanged(rank: int) -> None:
    """Two all-reduces of (rows,) numbers in the forward, and one of each gradient that is not split in the backward."""
    codes = 4096
    head, (hidden, labels) = whole_head("mlp", codes, torch.float32), inputs(codes, torch.float32)
    count = int((labels != -100).sum())
    gradients = {False: [hidden.numel()], True: [hidden.numel(), INNER * WIDTH, INNER]}
    for train in (False, True):
        for entropy in (False, True):
            x = hidden.clone().requires_grad_()
            with collectives() as calls:
                found = parallel(x, slice_of(head, rank, train), labels, return_entropy=entropy, chunk_rows=3)
            assert [size for name, size in calls if name == "all_reduce"] == [count, 3 * count]
            assert sum(size for name, size in calls if name != "all_reduce") <= 2 * 10  # what must agree
            with collectives() as calls:
                loss_of(found, entropy).backward()
            assert calls == [("all_reduce", size) for size in gradients[train]]


def lora_head(codes: int, adapters: int, dropout: float = 0.0) -> Any:
    import peft

    base = nn.ModuleDict({"head": nn.Linear(WIDTH, codes)})
    config = partial(peft.LoraConfig, target_modules=["head"], init_lora_weights=False, lora_dropout=dropout)
    model = peft.get_peft_model(base, config(r=2, lora_alpha=3), adapter_name="0", autocast_adapter_dtype=False)
    if adapters == 2:
        model.add_adapter("1", config(r=3, lora_alpha=7), autocast_adapter_dtype=False)
    model.base_model.set_adapter([str(i) for i in range(adapters)])
    return model.base_model.model["head"].requires_grad_().double()


def split_lora(whole: Any, rank: int, adapters: int, dropout: float = 0.0) -> Any:
    """A head on the codes of this process: the whole A, and its rows of B and of the base."""
    with torch.random.fork_rng():  # the parts differ in size
        head = lora_head(len(part(whole.base_layer.weight, rank)), adapters, dropout)
    for name, parameter in head.named_parameters():
        value = whole.get_parameter(name).detach()
        parameter.data = (value if "lora_A" in name else part(value, rank)).clone()
    return head


def check_lora(rank: int) -> None:
    for codes in CODES:
        for adapters in (1, 2):
            whole, (hidden, labels) = lora_head(codes, adapters), inputs(codes)
            head = split_lora(whole, rank, adapters)
            for entropy in (False, True):
                x, y = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
                best = eager(x, whole, labels)
                mine = parallel(y, head, labels, return_entropy=entropy, temperature=1.0)
                whole.zero_grad()
                head.zero_grad()
                loss_of(best, entropy).backward()
                loss_of(mine, entropy).backward()
                torch.testing.assert_close(mine[0] if entropy else mine, best[0])
                torch.testing.assert_close(y.grad, x.grad)
                for name, parameter in head.named_parameters():
                    grad = whole.get_parameter(name).grad
                    torch.testing.assert_close(parameter.grad, grad if "lora_A" in name else part(grad, rank))


def check_lora_that_differs_is_refused(rank: int) -> None:
    """A with another initialization, or dropout with another seed: lora_inputs would not be the same."""
    hidden, labels = inputs(24)
    whole = lora_head(24, 1, 0.5)
    head = split_lora(whole, rank, 1, 0.5)
    torch.manual_seed(7)
    parallel(hidden, head, labels)
    torch.manual_seed(7 + rank)
    with pytest.raises(OpError, match=r"LoRA's A \(or its dropout\) differs on the processes.*same seed"):
        parallel(hidden, head, labels)
    head.eval()
    parallel(hidden, head, labels)
    head.lora_A["0"].weight.data += rank
    with pytest.raises(OpError, match=r"LoRA's A \(or its dropout\) differs.*broadcast it"):
        parallel(hidden, head, labels)


def check_processes_that_disagree_are_refused(rank: int) -> None:
    """In all of them, and before they could wait for each other."""
    hidden, labels = inputs(24)
    head = slice_of(whole_head("mlp", 24), rank, True)
    best = parallel(hidden, head, labels)
    data = "same hidden states and labels on all of them; process_group is that of tensor parallelism, not of the data"
    with pytest.raises(OpError, match=r"heads have \[12, 14\] codes, expected equal numbers.*torch.chunk"):
        parallel(hidden, slice_of(whole_head("linear", 24 + 4 * rank), rank, True), labels)
    with pytest.raises(OpError, match=rf"have \[14, 7\] as their number of rows.*{data}"):
        parallel(hidden[: 2 - rank], head, labels[: 2 - rank])
    for other in (
        labels + rank * (labels >= 0),
        labels.flip(0) if rank else labels,
        labels.flip(1) if rank else labels,
    ):
        with pytest.raises(OpError, match=rf"as their checksum of the labels.*{data}"):
            parallel(hidden, head, other % 24 * (other >= 0) + other.clamp(max=0))
    with pytest.raises(OpError, match=r"hidden differs on the processes of process_group"):
        parallel(hidden + rank * torch.randn_like(hidden), head, labels)
    with pytest.raises(OpError, match=r"have \[1.0, 2.0\] as their temperature, expected the same"):
        parallel(hidden, head, labels, temperature=1.0 + rank)
    with pytest.raises(OpError, match=r"have \[0.0, 5.0\] as their softcap \(0: None\), expected the same"):
        parallel(hidden, head, labels, softcap=5.0 if rank else None)
    with pytest.raises(OpError, match=r"as their inputs that require grad"):
        parallel(hidden.clone().requires_grad_(rank == 0), head, labels)
    with pytest.raises(OpError, match=r"as their inputs that require grad"), torch.set_grad_enabled(rank == 0):
        parallel(hidden.clone().requires_grad_(), head, labels)
    with pytest.raises(
        OpError, match=r"process_group is DeviceMesh, expected a .*ProcessGroup.*use mesh.get_group\(\)"
    ):
        token_logprobs(hidden, head, labels, process_group=init_device_mesh("cpu", (2,)))
    torch.testing.assert_close(parallel(hidden, head, labels), best)  # the processes are in step


def check_heads_of_which_the_group_does_not_have_one_part_each_are_refused(rank: int) -> None:
    hidden, labels = inputs(24)
    labels = labels.clamp(max=5)
    mesh = init_device_mesh("cpu", (2,))
    for train in (False, True):
        layer = nn.Linear(WIDTH, 24, bias=False).double().requires_grad_(train)
        fully_shard(layer, mesh=mesh)
        for grad in (False, True):
            with (
                pytest.raises(OpError, match=r"weight is one of 1 part\(s\).* of which .* of 2 processes has 1, exp"),
                torch.set_grad_enabled(grad),
            ):
                parallel(hidden, layer, labels)  # FSDP2 gathers it whole
    weight = distribute_tensor(torch.randn(24, WIDTH).double(), mesh, [Shard(0)]).requires_grad_()
    whole = Head(weight.full_tensor(grad_placements=[Replicate()]))
    with pytest.raises(OpError, match=r"for a whole head call without process_group="):
        parallel(hidden, whole, labels)
    # Rows that are split over both dimensions of a mesh, with the group of one of them.
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "tensor"))
    weight = distribute_tensor(torch.randn(24, WIDTH).double(), mesh, [Shard(0), Shard(0)]).requires_grad_()
    with pytest.raises(OpError, match=r"weight is one of 2 part\(s\).*process_group of 1 processes has 1, expected"):
        token_logprobs(hidden, Head(weight.to_local()), labels, process_group=mesh["tensor"].get_group())
    # Rows that are split by hand over one group, and by FSDP2 over another.
    head = whole_head("linear without bias", 24)
    part_of_rank = nn.Linear(WIDTH, 12, bias=False).double()
    part_of_rank.weight = nn.Parameter(part(head.weight, rank).clone())
    fully_shard(part_of_rank, mesh=DeviceMesh.from_group(dist.new_group([rank], use_local_synchronization=True), "cpu"))
    torch.testing.assert_close(parallel(hidden, part_of_rank, labels), eager(hidden, head, labels)[0])


def check_wrong_labels_are_refused_in_all_processes(rank: int) -> None:
    hidden, labels = inputs(24)
    labels[0, 0] = 24
    with pytest.raises(OpError, match=r"labels\[0\] \(flattened\) is 24, expected 0 <= label < 24"):
        parallel(hidden, slice_of(whole_head("linear", 24), rank, True), labels)


def check_results_that_are_not_finite_are_refused_in_all_processes(rank: int) -> None:
    hidden, labels = inputs(24)
    labels[0, 0] = 3
    hidden[0, 0] = torch.inf
    with pytest.raises(OpError, match="not finite"):
        parallel(hidden, slice_of(whole_head("linear", 24), rank, True), labels, check_finite=True)


def check_all_rows_ignored(rank: int) -> None:
    hidden, labels = inputs(24)
    for x, y in ((hidden, labels.fill_(-100)), (hidden[:0], labels[:0])):
        shard, x = slice_of(whole_head("mlp", 24), rank, True), x.clone().requires_grad_()
        logps, entropy = parallel(x, shard, y, return_entropy=True)
        assert torch.equal(logps, torch.zeros_like(logps))
        (logps + entropy).sum().backward()
        assert all((t.grad == 0).all() for t in (x, *shard.tensors))


def check_each_process_in_a_group_of_its_own(rank: int) -> None:
    groups = [dist.new_group([i]) for i in range(2)]
    head, (hidden, labels) = whole_head("mlp", 24), inputs(24)
    hidden = hidden + rank  # data parallel: others on each process
    best = run(eager, hidden, copied(head, True), labels, True)
    function = partial(token_logprobs, return_entropy=True, process_group=groups[rank])
    torch.testing.assert_close(run(function, hidden, copied(head, True), labels, True), best)


def check_a_shard_of_a_dtensor(rank: int) -> None:
    """With process_group its gradient is that of the DTensor; without one the shard would be taken for the head."""
    mesh = init_device_mesh("cpu", (2,))
    for codes in CODES:
        head, (hidden, labels) = whole_head("linear without bias", codes), inputs(codes)
        weight = distribute_tensor(head.weight.clone(), mesh, [Shard(0)]).requires_grad_()
        logps = parallel(hidden, Head(weight.to_local()), labels)
        loss_of(logps, False).backward()
        best = run(eager, hidden, copied(head, True), labels, False)
        torch.testing.assert_close([logps.detach(), weight.grad.full_tensor()], [best[0], best[2]])
        labels = labels.clamp(max=5)
        message = r"weight is a shard \(.*Shard\(dim=0\).*\) of a DTensor and requires grad.*process_group="
        with pytest.raises(OpError, match=message):
            token_logprobs(hidden, Head(weight.to_local()), labels)
        with pytest.raises(OpError, match=r"weight is a DTensor with placements .*to_local\(\) with process_group="):
            parallel(hidden, Head(weight), labels)
