"""The OSPO loss on hidden states: object-weighted SimPO, conditional preference and SFT, without logits in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast.errors import OpError, UsageError
from ospo_fast.ops import Head, preference_loss, sequence_logprobs, token_logprobs, token_weights
from ospo_fast.ops.token_weights import spread_weights

IGNORE = -100


@dataclass(frozen=True)
class OSPOLossConfig:
    """Numbers of the loss; `preset` gives the published ones. The default is "v3" (CVPR 2026).

    beta, gamma_beta_ratio: β and ρ of the preference between images; *_cond: of that between prompts, None = the same.
    simpo_weight, cond_weight, sft_weight: λ of the three terms. label_smoothing: 0 to 0.5.
    mask_alpha, mask_gamma: token weights 1 + alpha·m̃^gamma; alpha 0 leaves the masks out.
    normalize: "weights" divides by Σw (official code), "length" by |y| (paper). mask_blur: taps of the masks' blur, odd
    (5: official code, 1: none, as in the paper).
    Raises UsageError: a field of the wrong type or out of range.
    """

    beta: float = 5.0
    gamma_beta_ratio: float = 0.5
    beta_cond: float | None = None
    gamma_beta_ratio_cond: float | None = None
    simpo_weight: float = 1.0
    cond_weight: float = 0.0
    sft_weight: float = 2.0
    label_smoothing: float = 0.0
    mask_alpha: float = 1.0
    mask_gamma: float = 1.0
    normalize: Literal["weights", "length"] = "weights"
    mask_blur: int = 5

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "normalize":
                if value not in ("weights", "length"):
                    raise UsageError(f"OSPOLossConfig: normalize is {value!r}, expected 'weights' or 'length'")
                continue
            if value is None and field.name.endswith("_cond"):
                continue
            if field.name == "mask_blur":
                if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % 2 == 0:
                    raise UsageError(f"OSPOLossConfig: mask_blur is {value!r}, expected an odd number (1: no blur)")
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UsageError(f"OSPOLossConfig: {field.name} is {value!r}, expected a finite number")
            if field.name in ("beta", "beta_cond") and value <= 0:
                raise UsageError(f"OSPOLossConfig: {field.name} is {value}, expected a positive number")
            if field.name.endswith(("_weight", "_alpha", "_gamma")) and value < 0:
                raise UsageError(f"OSPOLossConfig: {field.name} is {value}, expected a number >= 0")
        if not 0 <= self.label_smoothing <= 0.5:
            raise UsageError(f"OSPOLossConfig: label_smoothing is {self.label_smoothing}, expected 0 to 0.5")

    @classmethod
    def preset(cls, name: str) -> OSPOLossConfig:
        """The numbers of a published version, "v1", "v2" or "v3", or "full": v3 with v2's conditional term."""
        if name not in _PRESETS:
            raise UsageError(f"OSPOLossConfig: preset {name!r} is unknown, expected one of {', '.join(_PRESETS)}")
        return cls(**_PRESETS[name])


_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
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
)


@dataclass(frozen=True, eq=False)
class OSPOLossOutput:
    """What `OSPOLoss` returns: the loss and its terms, unweighted means; `metrics` are detached and for logs."""

    loss: Tensor  # simpo_weight·simpo + cond_weight·conditional + sft_weight·sft
    simpo: Tensor
    conditional: Tensor | None  # None without a conditional term
    sft: Tensor
    metrics: dict[str, Tensor]


class OSPOLoss(nn.Module):
    """loss = mean over pairs of (λ_simpo·SimPO + λ_cond·conditional) + λ_sft·SFT.

    SimPO compares the chosen with the rejected image, the conditional term (v2) the chosen image under its own with
    the same under the rejected prompt, SFT is the unweighted mean of −ℓ over all chosen image tokens.

    chunk_rows, logits_dtype: of `token_logprobs`. check_finite: refuse log-probabilities and float masks that are not
    finite; without it NaN or infinity, in a hidden state that is read or in a mask, makes the loss NaN.
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
        """Loss of B pairs, as G groups of B rows one after another: chosen, rejected and, if cond_weight > 0, swapped.

        hidden (G·B, S, D) float, labels (G·B, S) int64, unshifted: the token AT each position, -100 for text and
        padding (labels[:, 1:] are predicted from hidden[:, :-1] here); head: as in `token_logprobs`.
        object_masks (2·B, H, W): of the chosen and of the rejected images, on the grid of their tokens; swapped rows
        use the chosen's. None: every token weighs 1. A row without image tokens has log-probability 0.
        metrics: loss, simpo, sft, accuracy, margin, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps
        and, with the conditional term, conditional, swapped_logps.
        Raises OpError: shapes or devices that do not fit, too few groups, masks of another grid or, if asked for, that
        are not finite, at the first call also swapped rows that would be taken for pairs (cond_weight 0, no masks), and
        what `token_logprobs` raises.
        """
        config = self.config
        pairs = self._pairs(hidden, labels, object_masks)
        if not self._grouping_checked and not torch.compiler.is_compiling():
            self._check_grouping(labels, pairs)
        rows = pairs * (3 if config.cond_weight > 0 else 2)
        # The labels are shifted, not the hidden states: these stay contiguous, and no copy is made.
        targets = F.pad(labels[:rows, 1:], (0, 1), value=IGNORE)
        present = targets != IGNORE
        # Before the chain of GEMMs: on a GPU their checks wait for what was launched until then.
        weights = None
        if object_masks is not None and config.mask_alpha > 0:
            weights = self._weights(object_masks, pairs, present)
        logps = self._logps(hidden[:rows], head, targets, pairs)
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
        sft = -logps[:pairs].sum() / present[:pairs].sum().clamp(min=1)
        loss = config.simpo_weight * simpo + config.sft_weight * sft
        conditional = None
        if terms.conditional is not None:
            conditional = terms.conditional.mean()
            loss = loss + config.cond_weight * conditional
        metrics = {
            "loss": loss,
            "simpo": simpo,
            "sft": sft,
            "accuracy": terms.accuracy.mean(),
            "margin": terms.margin.mean(),
            "chosen_rewards": terms.chosen_rewards.mean(),
            "rejected_rewards": terms.rejected_rewards.mean(),
            "chosen_logps": chosen.mean(),
            "rejected_logps": rejected.mean(),
        }
        if conditional is not None:
            metrics |= {"conditional": conditional, "swapped_logps": swapped[0].mean()}
        return OSPOLossOutput(loss, simpo, conditional, sft, {name: value.detach() for name, value in metrics.items()})

    def _logps(self, hidden: Tensor, head: Head | nn.Module, targets: Tensor, pairs: int) -> Tensor:
        """Log-probabilities (rows, S) of the targets."""
        run = partial(
            token_logprobs,
            ignore_index=IGNORE,
            chunk_rows=self.chunk_rows,
            logits_dtype=self.logits_dtype,
            check_finite=self.check_finite,
        )
        if self.config.simpo_weight > 0 or not torch.is_grad_enabled():
            return run(hidden, head, targets)
        # Nothing but metrics comes from the rejected: no gradient is computed for them.
        parts = [slice(0, pairs), slice(pairs, 2 * pairs), slice(2 * pairs, None)]
        with torch.no_grad():
            rejected = run(hidden[parts[1]], head, targets[parts[1]])
        trained = targets.clone()
        trained[parts[1]] = IGNORE
        logps = run(hidden, head, trained)
        return torch.cat([logps[parts[0]], rejected, logps[parts[2]]])

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
        """Refuse swapped rows that would be taken for pairs; looked for once, because looking waits for a GPU."""
        self._grouping_checked = True
        third, left = divmod(labels.shape[0], 3)
        if left:
            return
        chosen, last = (part[part != IGNORE] for part in (labels[:third], labels[2 * third :]))
        same = chosen.numel() > 0 and torch.equal(chosen, last)
        if same and pairs != third:
            raise OpError(
                f"OSPOLoss: the last {third} of {labels.shape[0]} rows hold the codes of the first {third}, as swapped "
                "rows do, but cond_weight is 0; leave the swapped rows out or set cond_weight above 0"
            )

    def _pairs(self, hidden: Tensor, labels: Tensor, object_masks: Tensor | None) -> int:
        """B, the number of pairs, after a check of the shapes."""
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
                    f"give {name}.to(hidden.device)"
                )
        rows, groups = hidden.shape[0], 3 if self.config.cond_weight > 0 else 2
        needed = "chosen, rejected, swapped (for cond_weight > 0)" if groups == 3 else "chosen, rejected"
        if object_masks is not None:
            if object_masks.dim() != 3 or object_masks.shape[0] % 2:
                raise OpError(
                    f"OSPOLoss: object_masks have shape {tuple(object_masks.shape)}, expected (2·B, H, W): "
                    "the chosen's, then the rejected's"
                )
            pairs = object_masks.shape[0] // 2
            if rows not in (groups * pairs, 3 * pairs):
                raise OpError(
                    f"OSPOLoss: hidden has {rows} rows for object_masks of {pairs} pairs, expected "
                    f"{groups * pairs}: the groups {needed}"
                    + ("; add the swapped rows or set cond_weight=0" if groups == 3 else "")
                )
            return pairs
        if rows == 0 or rows % groups:
            raise OpError(
                f"OSPOLoss: hidden has {rows} rows, expected a positive multiple of {groups}: the groups {needed}"
                + ("; add the swapped rows or set cond_weight=0" if groups == 3 else "")
            )
        return rows // groups
