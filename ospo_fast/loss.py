"""OSPO loss on hidden states: object-weighted SimPO, conditional preference and SFT, without logits in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from ospo_fast.errors import OpError, UsageError
from ospo_fast.ops import IGNORE_INDEX, Head, preference_loss, sequence_logprobs, token_logprobs, token_weights
from ospo_fast.ops._dispatch import result_dtype
from ospo_fast.ops._logprob_call import prepare
from ospo_fast.ops.cross_entropy import weighted_logprobs
from ospo_fast.ops.token_weights import MAX_TAPS, spread_weights


@dataclass(frozen=True)
class OSPOLossConfig:
    """Coefficients of the loss; `preset` gives the published ones. The default is "v3" (CVPR 2026).

    Raises UsageError for a field of the wrong type or out of range.
    """

    beta: float = 5.0  # β of the preference between images
    gamma_beta_ratio: float = 0.5  # its margin, γ/β
    beta_cond: float | None = None  # of the preference between prompts; None: as between images
    gamma_beta_ratio_cond: float | None = None
    simpo_weight: float = 1.0  # λ of the preference between images
    cond_weight: float = 0.0  # λ of the preference between prompts
    sft_weight: float = 2.0  # λ of the SFT term
    label_smoothing: float = 0.0  # 0 to 0.5
    mask_alpha: float = 1.0  # token weights are 1 + alpha·m̃^gamma; 0 ignores the masks
    mask_gamma: float = 1.0
    normalize: Literal["weights", "length"] = "weights"  # divide by Σw (official code) or by |y| (paper)
    mask_blur: int = 5  # taps of the blur of the masks, odd: 5 in the official code, 1 (no blur) in the paper

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if expected := _unmet(name, value):
                raise UsageError(f"OSPOLossConfig: {name} is {value!r}, expected {expected}")

    @classmethod
    def preset(cls, name: str) -> OSPOLossConfig:
        """Return the coefficients of version "v1", "v2" or "v3", or of "full": v3 with v2's conditional term."""
        if name not in _PRESETS:
            raise UsageError(f"OSPOLossConfig: preset {name!r} is unknown, expected one of {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name])


_MAX = 1e6  # of a coefficient: products with log-probabilities and with each other are numbers of float32


def _unmet(name: str, value: Any) -> str:
    """What a field of `OSPOLossConfig` must be, if this value is not; else empty."""
    if name == "normalize":
        return "" if value in ("weights", "length") else "'weights' or 'length'"
    if name == "mask_blur":
        odd = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_TAPS and value % 2 == 1
        return "" if odd else f"an odd number (1: no blur), at most {MAX_TAPS}"
    if value is None and name.endswith("_cond"):
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "a finite number"
    if abs(value) > _MAX:
        return f"a number of at most {_MAX:g} in size"
    if name in ("beta", "beta_cond") and value <= 0:
        return "a positive number"
    if name.endswith(("_weight", "_alpha", "_gamma")) and value < 0:
        return "a number >= 0"
    if name == "label_smoothing" and not 0 <= value <= 0.5:
        return "0 to 0.5"
    return ""


_PRESETS: dict[str, dict[str, Any]] = {
    "v1": {"mask_alpha": 0.0},
    "v2": {
        "beta": 3.0,
        "beta_cond": 5.0,
        "gamma_beta_ratio_cond": 0.5,
        "simpo_weight": 0.8,
        "cond_weight": 0.5,
        "sft_weight": 1.5,
        "mask_alpha": 0.0,
    },
    "v3": {},
    "full": {"beta_cond": 5.0, "gamma_beta_ratio_cond": 0.5, "cond_weight": 0.5},
}


@dataclass(frozen=True, eq=False)
class OSPOLossOutput:
    """Result of `OSPOLoss`. The terms are unweighted means; `metrics` are detached."""

    loss: Tensor  # simpo_weight·simpo + cond_weight·conditional + sft_weight·sft
    simpo: Tensor
    conditional: Tensor | None  # None without a conditional term
    sft: Tensor
    metrics: dict[str, Tensor]


# DDP and FSDP2 look for the tensors in what a forward returns.
register_dataclass(OSPOLossOutput)


class OSPOLoss(nn.Module):
    """Compute mean over pairs of (λ_simpo·SimPO + λ_cond·conditional) + λ_sft·SFT.

    SimPO compares the chosen with the rejected image. The conditional term (v2) compares the chosen image under its own
    prompt with the same image under the rejected prompt. SFT is the unweighted mean of −ℓ over all chosen image tokens.

    Args:
        config: the coefficients; None = preset "v3".
        chunk_rows: see `token_logprobs`.
        logits_dtype: see `token_logprobs`.
        check_finite: refuse log-probabilities and float masks that are not finite. Otherwise NaN or infinity in a mask,
            or in a hidden state that predicts an image token, makes the loss NaN.

    """

    def __init__(
        self,
        config: OSPOLossConfig | None = None,
        *,
        chunk_rows: int | None = None,
        logits_dtype: torch.dtype | str | None = None,
        check_finite: bool = False,
    ) -> None:
        super().__init__()
        self.config = config or OSPOLossConfig()
        self.chunk_rows, self.logits_dtype, self.check_finite = chunk_rows, logits_dtype, check_finite
        self._grouping_checked = False

    def forward(
        self, hidden: Tensor, labels: Tensor, head: Head | nn.Module, *, object_masks: Tensor | None = None
    ) -> OSPOLossOutput:
        """Compute the loss of B pairs, given as groups of B rows: chosen, rejected and, if cond_weight > 0, swapped.

        Args:
            hidden: (G·B, S, D) float.
            labels: (G·B, S) int64, unshifted: the token AT each position, -100 for text and padding. labels[:, 1:] are
                predicted from hidden[:, :-1] here. A row without image tokens has log-probability 0.
            head: see `token_logprobs`.
            object_masks: (2·B, H, W) of the chosen, then the rejected images, on the grid of their tokens. Swapped rows
                use those of the chosen. None: every token has weight 1.

        Returns:
            The loss, its terms, and metrics: loss, simpo, sft, accuracy, margin, chosen_rewards, rejected_rewards,
            chosen_logps, rejected_logps, and with the conditional term conditional and swapped_logps.

        Raises:
            OpError: wrong shapes or devices, too few groups, masks of another grid or (`check_finite`) not finite, at
                the first call swapped rows that would be read as pairs (cond_weight 0, no masks), and the errors of
                `token_logprobs`.

        """
        config = self.config
        pairs = self._count_pairs(hidden, labels, object_masks)
        if not self._grouping_checked and not torch.compiler.is_compiling():
            self._check_grouping(labels, pairs)
        rows = pairs * (3 if config.cond_weight > 0 else 2)
        # Shift the labels, not the hidden states: these stay contiguous and are not copied.
        targets = F.pad(labels[:rows, 1:], (0, 1), value=IGNORE_INDEX)
        present = targets != IGNORE_INDEX
        # Before the GEMMs: on a GPU the checks of the weights synchronize with all work launched until then.
        weights = None
        if object_masks is not None and config.mask_alpha > 0:
            weights = self._weights(object_masks, pairs, present)
        logps, sft = self._logps(hidden[:rows], head, targets, present[:pairs])
        sequences = sequence_logprobs(logps, present, weights, normalize=config.normalize)
        chosen, rejected, *swapped = sequences.view(-1, pairs).unbind()
        terms = preference_loss(
            chosen,
            rejected,
            *swapped,
            beta=config.beta,
            gamma_beta_ratio=config.gamma_beta_ratio,
            beta_cond=config.beta_cond,
            gamma_beta_ratio_cond=config.gamma_beta_ratio_cond,
            label_smoothing=config.label_smoothing,
        )
        simpo = terms.simpo.mean()
        loss = config.simpo_weight * simpo + config.sft_weight * sft
        metrics = {
            "simpo": simpo,
            "sft": sft,
            "accuracy": terms.accuracy.mean(),
            "margin": terms.margin.mean(),
            "chosen_rewards": terms.chosen_rewards.mean(),
            "rejected_rewards": terms.rejected_rewards.mean(),
            "chosen_logps": chosen.mean(),
            "rejected_logps": rejected.mean(),
        }
        conditional = None
        if terms.conditional is not None:
            conditional = terms.conditional.mean()
            loss = loss + config.cond_weight * conditional
            metrics |= {"conditional": conditional, "swapped_logps": swapped[0].mean()}
        metrics = {name: value.detach() for name, value in {"loss": loss, **metrics}.items()}
        return OSPOLossOutput(loss, simpo, conditional, sft, metrics)

    def _logps(self, hidden: Tensor, head: Head | nn.Module, targets: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (rows, S) of the targets, and the SFT term over the chosen rows, which are `present`."""
        options: dict[str, Any] = {
            "chunk_rows": self.chunk_rows,
            "logits_dtype": self.logits_dtype,
            "check_finite": self.check_finite,
        }
        pairs, count = len(present), present.sum().clamp(min=1)
        run = partial(token_logprobs, **options)
        if self.config.simpo_weight > 0 or not torch.is_grad_enabled():
            logps = run(hidden, head, targets)
            return logps, -logps[:pairs].sum() / count
        # Without a SimPO term, rejected rows are read by metrics only: compute no gradient for them.
        rejected = slice(pairs, 2 * pairs)
        with torch.no_grad():
            rejected_logps = run(hidden[rejected], head, targets[rejected])
        if self.config.cond_weight > 0:
            targets = targets.clone()
            targets[rejected] = IGNORE_INDEX
            logps = run(hidden, head, targets)
            return torch.cat([logps[:pairs], rejected_logps, logps[2 * pairs :]]), -logps[:pairs].sum() / count
        # SFT alone is linear in the log-probabilities: a trained head needs no logits in the backward.
        call = prepare(
            "OSPOLoss", hidden[:pairs], head, targets[:pairs], ignore_index=IGNORE_INDEX, backend="auto",
            temperature=1.0, softcap=None, process_group=None, **options,
        )  # fmt: skip
        total, chosen_logps = weighted_logprobs(call, (present.to(result_dtype(call.x)) / count).flatten())
        return torch.cat([chosen_logps.view(targets[:pairs].shape), rejected_logps]), -total

    def _weights(self, object_masks: Tensor, pairs: int, present: Tensor) -> Tensor:
        """Weights (rows, S) of the tokens that are `present`; swapped rows have those of the chosen images."""
        config = self.config
        weights = token_weights(
            object_masks, alpha=config.mask_alpha, gamma=config.mask_gamma, blur_size=config.mask_blur
        )
        weights = torch.cat([weights, weights[:pairs]])[: len(present)]
        finite = None
        if self.check_finite and object_masks.is_floating_point():
            finite = object_masks.isfinite().flatten(1).all(1)
            finite = torch.cat([finite, finite[:pairs]])[: len(present)]
        return spread_weights(weights, present, finite)

    def _check_grouping(self, labels: Tensor, pairs: int) -> None:
        """Raise OpError for swapped rows that would be read as pairs, at the first call only: it synchronizes."""
        self._grouping_checked = True
        third, remainder = divmod(labels.shape[0], 3)
        if remainder or pairs == third:
            return
        chosen, last = (part[part != IGNORE_INDEX] for part in (labels[:third], labels[2 * third :]))
        if chosen.numel() > 0 and torch.equal(chosen, last):
            raise OpError(
                f"OSPOLoss: the last {third} of {labels.shape[0]} rows hold the codes of the first {third}, as swapped "
                "rows do, but cond_weight is 0; remove the swapped rows or set cond_weight above 0"
            )

    def _count_pairs(self, hidden: Tensor, labels: Tensor, object_masks: Tensor | None) -> int:
        """Check the shapes; return B."""
        if hidden.dim() != 3:
            raise OpError(f"OSPOLoss: hidden has shape {tuple(hidden.shape)}, expected (G·B, S, D)")
        if labels.shape != hidden.shape[:2]:
            raise OpError(
                f"OSPOLoss: labels have shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:2])} as hidden"
            )
        for name, tensor in (("labels", labels), ("object_masks", object_masks)):
            if tensor is not None and tensor.device != hidden.device:
                raise OpError(
                    f"OSPOLoss: {name} are on {tensor.device}, hidden is on {hidden.device}; "
                    f"use {name}.to(hidden.device)"
                )
        rows, groups, needed, remedy = hidden.shape[0], 2, "chosen, rejected", ""
        if self.config.cond_weight > 0:
            groups, needed = 3, "chosen, rejected, swapped (for cond_weight > 0)"
            remedy = "; add the swapped rows or set cond_weight=0"
        if object_masks is None:
            if rows == 0 or rows % groups:
                expected = f"a positive multiple of {groups}: the groups {needed}{remedy}"
                raise OpError(f"OSPOLoss: hidden has {rows} rows, expected {expected}")
            return rows // groups
        if object_masks.dim() != 3 or object_masks.shape[0] % 2:
            raise OpError(
                f"OSPOLoss: object_masks have shape {tuple(object_masks.shape)}, expected (2·B, H, W): "
                "the chosen's, then the rejected's"
            )
        pairs = object_masks.shape[0] // 2
        if rows not in (groups * pairs, 3 * pairs):
            expected = f"{groups * pairs}: the groups {needed}{remedy}"
            raise OpError(f"OSPOLoss: hidden has {rows} rows for object_masks of {pairs} pairs, expected {expected}")
        return pairs
