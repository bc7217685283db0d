"""Train with TRL on the log-probabilities of ospo_fast: `with use_ospo_fast(trainer): trainer.train()`.

TRL's trainers (GRPO, RLOO, DPO, KTO, SFT) call `trl.kernels.ChunkedLogProbFunction` with the weight of the head.
`ChunkedLogProbs` has its contract. Given the head itself, it also covers sharded heads, and adapters on the head, which
TRL refuses: see `build_trainer`. `ospo_fast.integrations.trl_ospo` trains on pairs of images.
"""

from __future__ import annotations

import math
import sys
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast.errors import OpError, UsageError
from ospo_fast.integrations._deferred_logits import find_causal_lm
from ospo_fast.integrations._patch import Enabled, replaced, running_head
from ospo_fast.ops import Head, token_logprobs
from ospo_fast.ops._head_modules import ResolvedHead, resolve_head
from ospo_fast.packages import required_by

with required_by("ospo_fast.integrations.trl", "trl", "transformers", extra="trl"):
    from trl.trainer import utils as trl_utils

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_TRL_FUNCTION = "_ChunkedLogProbFunction"  # the name under which trl.trainer.utils calls it
_ADAPTER_CLASS = "BaseTunerLayer"  # the name under which TRL's trainers ask for adapters on the head
_CHUNK_ELEMENTS = 2**23  # logits in memory for the outputs without gradient: 32 MiB in fp32
_MARGIN = 1e-3  # nats, far above the rounding of log-probabilities and entropies
T = TypeVar("T")
Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def use_ospo_fast(target: Any) -> Enabled:
    """Let a TRL trainer compute its log-probabilities with `token_logprobs`.

        with use_ospo_fast(trainer):
            trainer.train()

    The head itself is used, not only its weight: adapters on the head get exact gradients (`add_fused_lm_head` alone
    drops them), and so do heads that FSDP2 shards by themselves.

    Args:
        target: a trainer that scores completions with a fused LM head (GRPO, RLOO, DPO, KTO, SFT), or a model that
            TRL's `add_fused_lm_head` has prepared, also with PEFT. Of a trainer: its model and its reference model.

    Returns:
        A handle. Its `undo()`, or the end of the `with` block, restores TRL's own function.

    Raises:
        UsageError: a TRL without that function, or a target without fused LM head.

    """
    if not hasattr(trl_utils, _TRL_FUNCTION):
        import trl

        raise UsageError(
            f"use_ospo_fast: trl {trl.__version__} has no trl.trainer.utils.{_TRL_FUNCTION}, expected trl 1.16 or a "
            "compatible one; install trl==1.16.0"
        )
    trained = target if isinstance(target, nn.Module) else getattr(target, "model", None)
    reference = None if isinstance(target, nn.Module) else getattr(target, "ref_model", None)
    models = []
    for model in (trained,) if reference is None else (trained, reference):
        if isinstance(model, nn.Module):
            models.append(find_causal_lm(model))
        if not isinstance(model, nn.Module) or not _has_fused_head(models[-1]):
            raise UsageError(
                f"use_ospo_fast: {type(target).__name__} has no fused LM head, expected a trainer of TRL that calls "
                "add_fused_lm_head (GRPO, RLOO, DPO, KTO, SFT) or a model prepared by it"
            )
    return Enabled(models, [(trl_utils, _TRL_FUNCTION, _dispatching)])


def build_trainer(trainer_class: type[T], *args: Any, **kwargs: Any) -> T:
    """Build a TRL trainer that always computes its log-probabilities with `token_logprobs`.

    It may train LoRA adapters on the head. TRL's trainers refuse these, because they read the weight of the head only.

        trainer = build_trainer(DPOTrainer, model, peft_config=LoraConfig(target_modules=["q_proj", "lm_head"]))

    Args:
        trainer_class: one of TRL's trainers with a fused LM head, or a subclass.
        *args: of the trainer.
        **kwargs: of the trainer.

    Returns:
        The trainer.

    Raises:
        UsageError: see `use_ospo_fast`.

    """
    with ExitStack() as stack:
        for base in trainer_class.__mro__:
            module = sys.modules[base.__module__]
            if base.__module__.startswith("trl.") and hasattr(module, _ADAPTER_CLASS):
                # Their check asks whether the head is an instance of this class.
                stack.enter_context(replaced(module, _ADAPTER_CLASS, _NoAdapter))
        trainer: Any = trainer_class(*args, **kwargs)
    head = find_causal_lm(trainer.model).get_output_embeddings()
    if hasattr(head, "base_layer") and _is_cast_by_trl(head):
        raise UsageError(
            "build_trainer: cast_lm_head_to_fp32 is True and the head has an adapter, expected one of them; set "
            "cast_lm_head_to_fp32=False, or remove the head from the adapter's target_modules"
        )
    use_ospo_fast(trainer)
    return trainer  # type: ignore[no-any-return]


class _NoAdapter: ...


def _dispatching(theirs: Any) -> Any:
    """Return a replacement of TRL's function that computes with the head of the running model."""

    def apply(*args: Any, **kwargs: Any) -> Outputs:
        head = running_head()
        if head is None:
            outputs: Outputs = theirs.apply(*args, **kwargs)
            return outputs
        return ChunkedLogProbs(None if _is_cast_by_trl(head) else head).apply(*args, **kwargs)

    return SimpleNamespace(apply=apply)


def _is_cast_by_trl(head: nn.Module) -> bool:
    """Whether TRL's `cast_lm_head_to_fp32` has set the head's forward. It gives hidden states and weight in fp32."""
    return getattr(vars(head).get("forward"), "__name__", "") == "cast_forward_to_fp32"


def _has_fused_head(causal_lm: nn.Module) -> bool:
    """Whether `add_fused_lm_head` has replaced the forward, which other functions may wrap."""
    function: Any = vars(causal_lm).get("forward")
    while function is not None:
        if "fused_lm_head" in getattr(getattr(function, "__code__", None), "co_varnames", ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


class ChunkedLogProbs:
    """`trl.kernels.ChunkedLogProbFunction` by `token_logprobs`.

    Args:
        head: computes the logits in place of the weight and bias that `apply` gets. None: these two.

    """

    def __init__(self, head: Head | nn.Module | None = None) -> None:
        self._head = head

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int = 0,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> Outputs:
        """Compute log softmax(s)[targets] for s = softcap·tanh(logit_scale·z/softcap)/temperature, z = hidden·weightᵀ.

        Args:
            hidden: (N, D) float.
            weight: (V, D) float.
            bias: (V,) or None.
            targets: (N,) int64.
            temperature: divisor of the scores, > 0.
            chunk_size: ignored. `token_logprobs` chunks the rows, not the vocabulary.
            final_logit_softcapping: soft cap, > 0, or None.
            logit_scale: factor of the logits before the soft cap.
            outputs: those to compute besides log-probabilities: "entropy", "log_sum_sq_probs", "mean_logits",
                "is_top1".

        Returns:
            logprobs (N,), entropy (N,), log Σp² (N,), mean of the scores (N,) and whether the target is the first
            maximum (N,). The first two are differentiable. None where not asked for.

        Raises:
            OpError: see `token_logprobs`; a logit_scale ≤ 0 of a head that is not linear.

        """
        head = self._head
        if head is None:
            dtype = weight.dtype if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
            head = Head(weight.to(dtype), None if bias is None else bias.to(dtype))
        if logit_scale <= 0:  # scores are odd in z: move the sign into z, a scale of 0 too
            sign = -1.0 if logit_scale < 0 else 0.0
            hidden, head = hidden * sign, _scaled_bias(head, sign)
        scale = abs(logit_scale) or 1.0
        softcap = None if final_logit_softcapping is None else final_logit_softcapping / scale
        temperature = temperature / scale
        entropy = None
        if "entropy" in outputs:
            logps, entropy = token_logprobs(
                hidden, head, targets, temperature=temperature, softcap=softcap, return_entropy=True
            )
        else:
            logps = token_logprobs(hidden, head, targets, temperature=temperature, softcap=softcap)
        if unknown := sorted(set(outputs) - {"log_probs", *OPTIONAL_OUTPUTS}):
            raise OpError(f"ChunkedLogProbs: outputs has {unknown}, expected some of {', '.join(OPTIONAL_OUTPUTS)}")
        wanted = set(outputs) & {"log_sum_sq_probs", "mean_logits", "is_top1"}
        found: dict[str, Tensor] = {}
        if wanted:
            with torch.no_grad():
                found = _statistics(hidden, head, targets, temperature, softcap, wanted, logps, entropy)
        return logps, entropy, found.get("log_sum_sq_probs"), found.get("mean_logits"), found.get("is_top1")


def _scaled_bias(head: Head | nn.Module, factor: float) -> Head:
    """Return a linear head with its bias multiplied."""
    linear = Head.of(head) if isinstance(head, Head) or type(head) is nn.Linear else None
    if linear is None or linear.proj_weight is not None:
        raise OpError(
            f"use_ospo_fast: logit_scale is <= 0 and the head is {type(head).__name__}, expected nn.Linear or a "
            "positive scale; merge the adapters of the head"
        )
    return Head(linear.weight, None if linear.bias is None else linear.bias * factor)


def _statistics(
    hidden: Tensor,  # (N, D)
    head: Head | nn.Module,
    targets: Tensor,  # (N,)
    temperature: float,
    softcap: float | None,
    wanted: set[str],
    logps: Tensor,  # (N,)
    entropy: Tensor | None,
) -> dict[str, Tensor]:
    """Compute what has no gradient, with the logits of a chunk of rows in memory, for as few rows as possible."""
    found: dict[str, Tensor] = {}
    # Resolved once: FSDP2 may gather the head here, which all processes have to do equally often.
    resolved = resolve_head("use_ospo_fast", head, hidden)
    linear = resolved.head
    if "mean_logits" in wanted and softcap is None and linear.proj_weight is None and resolved.lora_weight is None:
        # The mean of linear functions is linear: no logits are needed.
        mean = F.linear(resolved.hidden.float(), linear.weight.float().mean(0, keepdim=True)).squeeze(-1)
        if linear.bias is not None:
            mean = mean + linear.bias.float().mean()
        found["mean_logits"] = mean / temperature
        wanted = wanted - {"mean_logits"}
    if wanted == {"is_top1"}:
        # A probability above 1/2 is the maximum. One below exp(−entropy) is not, because the maximum is at least that.
        certain = logps > math.log(0.5) + _MARGIN
        ruled_out = logps < -entropy - _MARGIN if entropy is not None else torch.zeros_like(certain)
        rows = (~(certain | ruled_out)).nonzero().squeeze(1)
        top1 = certain.clone()
        top1[rows] = _from_logits(resolved, rows, targets, temperature, softcap, wanted)["is_top1"]
        found["is_top1"] = top1
    elif wanted:
        rows = torch.arange(len(targets), device=targets.device)
        found |= _from_logits(resolved, rows, targets, temperature, softcap, wanted)
    return found


def _from_logits(
    resolved: ResolvedHead,
    rows: Tensor,  # those to compute
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    wanted: set[str],
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
    for chunk in rows.split(max(1, _CHUNK_ELEMENTS // resolved.head.num_codes)):
        scores = resolved.head(resolved.hidden[chunk])
        if resolved.lora_inputs is not None and resolved.lora_weight is not None:
            scores = scores + F.linear(resolved.lora_inputs[chunk], resolved.lora_weight)
        scores = scores.float()
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores / temperature
        if "log_sum_sq_probs" in parts:
            parts["log_sum_sq_probs"].append(torch.logsumexp(2 * scores, -1) - 2 * torch.logsumexp(scores, -1))
        if "mean_logits" in parts:
            parts["mean_logits"].append(scores.mean(-1))
        if "is_top1" in parts:
            parts["is_top1"].append(scores.argmax(-1) == targets[chunk])
    return {name: torch.cat(values) for name, values in parts.items()}
