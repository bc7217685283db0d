"""OSPO loss on hidden states: object-weighted SimPO, conditional preference and SFT, without logits in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from ospo_fast.errors import OpError, UsageError
from ospo_fast.loss_config import OSPOLossConfig
from ospo_fast.ops import IGNORE_INDEX, Head, preference_loss, sequence_logprobs, token_logprobs, token_weights
from ospo_fast.ops._dispatch import describe, result_dtype
from ospo_fast.ops._logprob_call import prepare
from ospo_fast.ops.cross_entropy import weighted_logprobs
from ospo_fast.ops.token_weights import spread_weights

__all__ = ["OSPOLoss", "OSPOLossConfig", "OSPOLossOutput"]


@dataclass(frozen=True, eq=False)
class OSPOLossOutput:
    """Result of `OSPOLoss`. The terms are unweighted means; `metrics` and the values of pairs are detached."""

    loss: Tensor  # simpo_weight·simpo + cond_weight·conditional + sft_weight·sft
    simpo: Tensor
    conditional: Tensor | None  # None without a conditional term
    sft: Tensor
    metrics: dict[str, Tensor]
    pair_accuracy: Tensor  # (B,): 1 where the chosen image has the higher reward, else 0
    pair_logps: Tensor  # (2, B): log-probabilities of the chosen and of the rejected images, as in `metrics`


# DDP and FSDP2 look for the tensors in what a forward returns.
register_dataclass(OSPOLossOutput)


class OSPOLoss(nn.Module):
    """Compute mean over pairs of (λ_simpo·SimPO + λ_cond·conditional) + λ_sft·SFT.

    SimPO compares the chosen with the rejected image. With `config.reference` it compares their log-probabilities minus
    those under a reference model, which with normalize="sum" and gamma_beta_ratio=0 is DPO. The conditional term (v2)
    compares the chosen image under its own prompt with the same image under the rejected prompt. SFT is the unweighted
    mean of −ℓ over all chosen image tokens.

    Args:
        config: the coefficients; None = preset "v3".
        chunk_rows: see `token_logprobs`.
        logits_dtype: see `token_logprobs`.
        check_finite: refuse log-probabilities, also those of the reference, and float masks that are not finite.
            Otherwise NaN or infinity in a mask, or in a hidden state that predicts an image token, makes the loss NaN.

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
        if self.config.group_size:
            raise UsageError(
                f"OSPOLoss: the config has group_size {self.config.group_size}, expected 0, because this loss is of "
                "pairs; train by GRPO with `ospo-fast run method=grpo`, or use ospo_fast.stages.grpo.grpo_loss"
            )
        if self.config.kl_weight:
            raise UsageError(
                f"OSPOLoss: the config has kl_weight {self.config.kl_weight:g}, expected 0, because the divergence is "
                "of groups; pairs have reference=True"
            )
        self.chunk_rows, self.logits_dtype, self.check_finite = chunk_rows, logits_dtype, check_finite
        self._grouping_checked = False

    def forward(
        self,
        hidden: Tensor,
        labels: Tensor,
        head: Head | nn.Module,
        *,
        object_masks: Tensor | Sequence[Tensor] | None = None,
        reference_logps: Tensor | None = None,
    ) -> OSPOLossOutput:
        """Compute the loss of B pairs, given as groups of B rows: chosen, rejected and, if cond_weight > 0, swapped.

        Args:
            hidden: (G·B, S, D) float.
            labels: (G·B, S) int64, unshifted: the token AT each position, -100 for text and padding. labels[:, 1:] are
                predicted from hidden[:, :-1] here. A row without image tokens has log-probability 0.
            head: see `token_logprobs`.
            object_masks: (2·B, H, W) of the chosen, then the rejected images, on the grid of their tokens. Swapped rows
                use those of the chosen. A sequence of them for images of several grids, in the order of their tokens.
                None: every token has weight 1.
            reference_logps: (2·B,) float, for `config.reference`: sequence log-probabilities of the chosen, then the
                rejected images under the reference model, such as `pair_logps.flatten()` of its loss.

        Returns:
            The loss, its terms, and metrics: loss, simpo, sft, accuracy, margin, chosen_rewards, rejected_rewards,
            chosen_logps, rejected_logps, and with the conditional term conditional and swapped_logps. With a reference,
            accuracy, margin and rewards are of the log-probabilities minus those of the reference.

        Raises:
            OpError: wrong shapes or devices, too few groups, masks of another grid, masks or reference_logps that are
                (`check_finite`) not finite, at the first call swapped rows that would be read as pairs (cond_weight 0,
                no masks), and the errors of `token_logprobs`.

        """
        config = self.config
        given = () if object_masks is None else object_masks
        grids = [given] if isinstance(given, Tensor) else list(given)
        if object_masks is not None and not (grids and all(isinstance(masks, Tensor) for masks in grids)):
            raise OpError(
                f"OSPOLoss: object_masks is {type(object_masks).__name__} of "
                f"{[type(masks).__name__ for masks in grids]}, expected a tensor, or one for each grid of an image"
            )
        pairs = self._count_pairs(hidden, labels, grids)
        if not self._grouping_checked and not torch.compiler.is_compiling():
            self._check_grouping(labels, pairs)
        rows = pairs * (3 if config.cond_weight > 0 else 2)
        # Shift the labels, not the hidden states: these stay contiguous and are not copied.
        targets = F.pad(labels[:rows, 1:], (0, 1), value=IGNORE_INDEX)
        present = targets != IGNORE_INDEX
        # Before the GEMMs: on a GPU the checks of the weights synchronize with all work launched until then.
        weights = None
        if grids and config.mask_alpha > 0:
            weights = self._weights(grids, pairs, present)
        logps, sft = self._logps(hidden[:rows], head, targets, present[:pairs])
        sequences = sequence_logprobs(logps, present, weights, normalize=config.normalize)
        chosen, rejected, *swapped = sequences.view(-1, pairs).unbind()
        reference = self._reference(reference_logps, chosen)
        terms = preference_loss(
            chosen - reference[0],
            rejected - reference[1],
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
        logps = torch.stack([chosen, rejected]).detach()
        return OSPOLossOutput(loss, simpo, conditional, sft, metrics, terms.accuracy.detach(), logps)

    def _reference(self, given: Tensor | None, chosen: Tensor) -> Tensor:
        """Return the log-probabilities (2, B) under the reference model; zeros without one."""
        if not self.config.reference:
            if given is not None:
                raise OpError("OSPOLoss: got reference_logps with reference=False in the config; set reference=True")
            return chosen.new_zeros(2, 1)
        expected = (2 * len(chosen),)
        if not isinstance(given, Tensor) or given.shape != expected or not given.is_floating_point():
            kind = describe(given) if isinstance(given, Tensor) else "None" if given is None else type(given).__name__
            raise OpError(
                f"OSPOLoss: reference_logps is {kind}, expected float "
                f"{expected}: those of the chosen, then of the rejected images (reference=True in the config)"
            )
        if self.check_finite and not given.isfinite().all():
            raise OpError(
                "OSPOLoss: reference_logps holds NaN or infinity; expected finite values: leave out pairs whose images "
                "the reference model cannot score"
            )
        return given.detach().to(chosen).view(2, -1)

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

    def _weights(self, grids: Sequence[Tensor], pairs: int, present: Tensor) -> Tensor:
        """Weights (rows, S) of the tokens that are `present`; swapped rows have those of the chosen images."""
        config = self.config
        options: dict[str, Any] = {"gamma": config.mask_gamma, "blur_size": config.mask_blur}
        found = [token_weights(masks, alpha=config.mask_alpha, **options) for masks in grids]
        weights = found[0] if len(found) == 1 else torch.cat(found, 1)
        weights = torch.cat([weights, weights[:pairs]])[: len(present)]
        finite = None
        if self.check_finite and any(masks.is_floating_point() for masks in grids):
            finite = torch.stack([masks.isfinite().flatten(1).all(1) for masks in grids]).all(0)
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

    def _count_pairs(self, hidden: Tensor, labels: Tensor, grids: Sequence[Tensor]) -> int:
        """Check the shapes; return B."""
        if hidden.dim() != 3:
            raise OpError(f"OSPOLoss: hidden has shape {tuple(hidden.shape)}, expected (G·B, S, D)")
        if labels.shape != hidden.shape[:2]:
            raise OpError(
                f"OSPOLoss: labels have shape {tuple(labels.shape)}, expected {tuple(hidden.shape[:2])} as hidden"
            )
        for name, tensor in (("labels", labels), *(("object_masks", masks) for masks in grids)):
            if tensor.device != hidden.device:
                raise OpError(
                    f"OSPOLoss: {name} are on {tensor.device}, hidden is on {hidden.device}; "
                    f"use {name}.to(hidden.device)"
                )
        rows, groups, needed, remedy = hidden.shape[0], 2, "chosen, rejected", ""
        if self.config.cond_weight > 0:
            groups, needed = 3, "chosen, rejected, swapped (for cond_weight > 0)"
            remedy = "; add the swapped rows or set cond_weight=0"
        if not grids:
            if rows == 0 or rows % groups:
                expected = f"a positive multiple of {groups}: the groups {needed}{remedy}"
                raise OpError(f"OSPOLoss: hidden has {rows} rows, expected {expected}")
            return rows // groups
        for masks in grids:
            if masks.dim() != 3 or masks.shape[0] % 2 or len(masks) != len(grids[0]):
                raise OpError(
                    f"OSPOLoss: object_masks have shape {tuple(masks.shape)}, expected (2·B, H, W): "
                    "the chosen's, then the rejected's"
                )
        pairs = len(grids[0]) // 2
        if rows not in (groups * pairs, 3 * pairs):
            expected = f"{groups * pairs}: the groups {needed}{remedy}"
            raise OpError(f"OSPOLoss: hidden has {rows} rows for object_masks of {pairs} pairs, expected {expected}")
        return pairs
