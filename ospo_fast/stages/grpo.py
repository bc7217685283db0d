"""GRPO (arXiv 2402.03300) with the model's own score of its images as the reward.

A step generates a group of images of each of its prompts with the weights of now, scores them, and trains on all of
them: those above the mean of their group are raised, the others lowered. Each image trains once, by the policy that
generated it. Where `exact_logprobs` knows the model (float32 on a CPU), training has the bits of the generation and the
importance ratio is exactly 1. Elsewhere both round differently, and the ratio of each token, at most 2, corrects it.
The judge, and the reference of the divergence, is the model before training, whose weights LoRA leaves as they are.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ospo_fast.config import Config
from ospo_fast.errors import Failure, OpError, OspoError, attempt, some_failed
from ospo_fast.generation import ImageGenerator
from ospo_fast.generation.exact import exact_logprobs, why_no_exact_logprobs
from ospo_fast.generation.validation import is_number
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.layout import image_layout
from ospo_fast.ops import IGNORE_INDEX, token_logprobs, token_weights
from ospo_fast.ops._dispatch import describe
from ospo_fast.ops.token_weights import spread_weights
from ospo_fast.records import ItemPair, stable_hash
from ospo_fast.stages.object_tokens import find_objects
from ospo_fast.stages.prompt_files import image_prompt_ids
from ospo_fast.stages.score import Scorer
from ospo_fast.stages.teacher_forcing import hidden_states, teacher_forced
from ospo_fast.stages.train import Trainer, autocast
from ospo_fast.stages.train_settings import uses_masks
from ospo_fast.stages.trained_weights import LoraWeights
from ospo_fast.stages.training_pairs import category_of
from ospo_fast.work import count

if TYPE_CHECKING:
    from torch import nn

    from ospo_fast.ops import Head

logger = logging.getLogger(__name__)

EPSILON = 1e-4  # added to the standard deviation of a group, as in TRL
MAX_RATIO = 2.0  # of an importance ratio, whose estimate of the gradient has the variance of its largest value


@dataclass(frozen=True)
class Group:
    """A prompt to train on, and in a step its images."""

    pair_id: str  # of its item
    ids: Tensor  # (S,) of the prompt
    prompt: str
    questions: list[str]
    category: str
    columns: list[list[int]] | None = None  # of each object its tokens, for token weights
    dense: tuple[str, ...] = ()  # its dense prompts, with images.prompts=both
    dense_ids: tuple[Tensor, ...] = ()
    unusable: tuple[str, ...] = ()  # why other dense prompts cannot train
    rejected_ids: None = None
    codes: Tensor | None = None  # (G, T)
    logps: Tensor | None = None  # (G, T) fp32, under the distribution that generated the codes
    rewards: Tensor | None = None  # (G,), NaN for an image that failed

    @property
    def identity(self) -> str:
        """See `Example`: images and rewards depend on prompts and questions."""
        return f"{self.pair_id} {stable_hash(self.prompt, *self.questions, *self.dense):x}"

    @property
    def forms(self) -> list[Tensor]:
        """See `Example`."""
        return [self.ids, *self.dense_ids]


@dataclass(frozen=True, eq=False)
class GRPOLoss:
    """Result of `grpo_loss`: the loss, its terms, and detached metrics."""

    loss: Tensor  # policy + kl_weight · kl
    metrics: dict[str, Tensor]
    rewards: Tensor  # (P,): the mean of each group, NaN of one without a reward


@dataclass(frozen=True, eq=False)
class _Logps:
    """Log-probabilities of a step, as `grpo_loss` takes them."""

    logps: Tensor
    present: Tensor
    reference: Tensor | None
    weights: Tensor | None = None


def load_groups(
    items: Sequence[ItemPair], model: UnifiedModel, config: Config
) -> tuple[list[Group], dict[str, Failure]]:
    """Load the prompts of items, and collect by id those that fail: without a question, or too long for the model.

    A dense prompt that fails is left out alone. Raises OspoError if dense prompts are to train, and none can.
    """
    groups: list[Group] = []
    failures: dict[str, Failure] = {}
    scorer = Scorer(model, config)
    for item in items:
        group = _load_group(item, model, scorer, config)
        if isinstance(group, Failure):
            failures[item.pair_id] = group
        else:
            groups.append(group)
    if config.images.prompts == "both" and groups and not any(group.dense for group in groups):
        reasons = [reason for group in groups for reason in group.unusable]
        none = "no record has a dense prompt (long_prompt)"
        raise OspoError(
            f"train: images.prompts is both, and "
            f"{some_failed('dense prompts', reasons, len(reasons)) if reasons else none}. Run the stage perturb, and "
            "questions with --no-resume, to have others, or use images.prompts=plain."
        )
    return groups, failures


def _load_group(item: ItemPair, model: UnifiedModel, scorer: Scorer, config: Config) -> Group | Failure:
    record, columns = item.record, None
    ids = image_prompt_ids(model, record["prompt"])
    if isinstance(ids, Failure):
        return ids
    questions = attempt(scorer.load, record["prompt"], record.get("question") or [])
    if isinstance(questions, Failure):
        return Failure(record["question_reason"]) if record.get("question_reason") else questions
    if uses_masks(config):
        objects = find_objects(record, model, config.masks.match, config.masks.nouns)
        if isinstance(objects, Failure):
            return objects
        columns = objects.columns
    texts = list(filter(None, record.get("long_prompt") or [])) if config.images.prompts == "both" else []
    loaded = [(text, image_prompt_ids(model, text)) for text in texts]
    dense = [(text, own) for text, own in loaded if not isinstance(own, Failure)]
    return Group(
        item.pair_id,
        ids,
        record["prompt"],
        questions,
        category_of(record),
        columns,
        dense=tuple(text for text, _ in dense),
        dense_ids=tuple(own for _, own in dense),
        unusable=tuple(f"{item.pair_id}: {failed}" for _, failed in loaded if isinstance(failed, Failure)),
    )


def group_advantages(rewards: Tensor) -> Tensor:
    """Return (r − mean) / (std + 1e-4) of each group (P, G), in float32.

    The deviation has the divisor G − 1. Of rewards that are NaN, the advantage is 0, and those of the others are as
    without them. A group with fewer than two rewards has advantages of 0.
    """
    valid = rewards.isfinite()
    number = valid.sum(1, keepdim=True)
    means, deviations = _moments(rewards)
    centered = torch.where(valid, rewards.float() - means, 0)
    scale = (number / (number - 1).clamp(min=1)).sqrt()
    return torch.where(deviations > 0, centered / (deviations * scale + EPSILON), 0)


def _moments(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population deviation (P, 1) of each group (P, G), NaN of one without a reward.

    Of equal rewards the deviation is 0: their mean may be rounded, and its distance to them is no signal.
    """
    valid = rewards.isfinite()
    number, values = valid.sum(1, keepdim=True), torch.where(valid, rewards, 0).float()
    means = values.sum(1, keepdim=True) / number
    squares = torch.where(valid, values - means, 0).square().sum(1, keepdim=True) / number
    first = values.gather(1, valid.long().argmax(1, keepdim=True))
    equal = (~valid | (values == first)).all(1, keepdim=True) & (number > 0)
    return torch.where(equal, first, means), torch.where(equal, 0, squares.sqrt())


def grpo_loss(
    logps: Tensor,
    present: Tensor,
    rewards: Tensor,
    *,
    old: Tensor | None = None,
    weights: Tensor | None = None,
    reference: Tensor | None = None,
    kl_weight: float = 0.0,
) -> GRPOLoss:
    """Compute mean over images of Σ_t w_t·(−A·r_t + kl_weight·KL_t) / Σ_t w_t.

    With A of `group_advantages`, and the estimate KL_t = exp(ref_t − ℓ_t) − (ref_t − ℓ_t) − 1 of the divergence from
    the reference. The importance ratio r_t has the value min(exp(ℓ_t − old_t), 2), and the gradient r_t·∇ℓ_t.

    Args:
        logps: (P·G, S) float, ℓ of the tokens of G images of each of P prompts.
        present: (P·G, S) bool, the tokens that count.
        rewards: (P, G) float, NaN for images without one, which add 0.
        old: (P·G, S), log-probabilities under the distribution that generated the tokens; None: `logps`.
        weights: (P·G, S) of the tokens, 0 or more; the loss is NaN with others. None: 1.
        reference: (P·G, S), log-probabilities under the reference model; None: no divergence.
        kl_weight: of the divergence.

    Returns:
        The loss, and metrics: loss, policy, kl, reward, reward_std (the mean deviation in a group), no_signal, the
        share of groups whose rewards are all the same (these three of the groups that have a reward), and
        off_policy, the mean of |ℓ_t − old_t|. Loss and metrics are NaN where no image has a reward, so that the step is
        skipped and counted.

    Raises:
        OpError: rewards that are not (P, G) for P·G rows, other tensors of another shape than logps, or a wrong dtype.

    """
    others = {"present": present, "old": old, "weights": weights, "reference": reference}
    for name, tensor in {"logps": logps, "rewards": rewards, **others}.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("logps", "present", "rewards")):
            raise OpError(f"grpo_loss: {name} is {type(tensor).__name__}, expected a tensor")
    if logps.dim() != 2 or not logps.is_floating_point():
        raise OpError(f"grpo_loss: logps is {describe(logps)}, expected float (images, tokens)")
    if rewards.dim() != 2 or rewards.numel() != len(logps):
        raise OpError(f"grpo_loss: rewards is {describe(rewards)}, expected (P, G) with P·G = {len(logps)} images")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != logps.shape:
            raise OpError(f"grpo_loss: {name} is {describe(tensor)}, expected the shape {tuple(logps.shape)} of logps")
    if not is_number(kl_weight) or not 0 <= kl_weight < math.inf:
        raise OpError(f"grpo_loss: kl_weight is {kl_weight!r}, expected a number >= 0")
    if present.dtype != torch.bool:
        raise OpError(f"grpo_loss: present is {describe(present)}, expected bool")
    advantages = group_advantages(rewards).to(logps).view(-1, 1)
    counted = present & rewards.isfinite().view(-1, 1)
    logps = torch.where(counted, logps, 0)  # those of failed images are NaN
    w = counted.to(logps.dtype)
    if weights is not None:
        w = torch.where(counted, torch.where(weights >= 0, weights.to(logps.dtype), torch.nan), 0)
    total = w.sum(1, keepdim=True)
    w = w / torch.where(total > 0, total, 1) / len(logps)
    gap = torch.zeros_like(logps) if old is None else torch.where(counted, logps.detach() - old.to(logps), 0)
    policy = -(w * advantages * gap.exp().clamp(max=MAX_RATIO) * torch.exp(logps - logps.detach())).sum()
    kl = logps.new_zeros(())
    if reference is not None:
        above = torch.where(counted, reference.detach() - logps, 0)
        kl = (w * (torch.expm1(above) - above)).sum()
    whole = policy + kl_weight * kl if kl_weight else policy  # the divergence may be infinite
    loss = torch.where(rewards.isfinite().any(), whole, torch.nan)
    means, deviations = _moments(rewards)
    metrics = {
        "loss": loss,
        "policy": policy,
        "kl": kl,
        "reward": means.nanmean(),
        "reward_std": deviations.nanmean(),
        "no_signal": torch.where(deviations.isnan(), torch.nan, (deviations == 0).float()).nanmean(),
        "off_policy": gap.abs().sum() / counted.sum(),
    }
    return GRPOLoss(loss, {name: value.detach() for name, value in metrics.items()}, means[:, 0])


class GroupTrainer(Trainer):
    """Training by GRPO; see `Trainer`, whose examples are prompts here."""

    weights: LoraWeights

    of_category: ClassVar[tuple[str, ...]] = ("reward",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.generator = ImageGenerator(self.model, batch_size=self.config.images.batch_size)
        self.scorer = Scorer(self.model, self.config)
        for group in self.examples:
            self.scorer.load(group.prompt, group.questions)
        self.not_exact = self._why_not_exact()
        if self.not_exact and self.ranks.rank == 0:
            logger.info("train: log-probabilities are not exactly those of the generation: %s", self.not_exact)
        if self.config.images.prompts == "both" and self.ranks.rank == 0:
            self._tell_of_forms()

    def _why_not_exact(self) -> str | None:
        """Return why the log-probabilities of training are not those of `exact_logprobs`, None if they are."""
        if self.extractor is not None:
            return "token weights need the attention of the model's own modules"
        if self.settings.autocast is not None:
            return f"train.autocast is {self.settings.autocast}"
        return why_no_exact_logprobs(self.model)

    def _tell_of_forms(self) -> None:
        """Log which dense prompts do not train, and how many prompts have none."""
        if unusable := [reason for group in self.examples for reason in group.unusable]:
            total = len(unusable) + sum(len(group.dense) for group in self.examples)
            logger.warning("train: %s", some_failed("dense prompts", unusable, total))
        if plain := sum(not group.dense for group in self.examples):
            logger.info("train: %d of %d prompts have no dense one and train as they are", plain, len(self.examples))

    @property
    def sequences_of_example(self) -> int:
        """See `Trainer`."""
        return self.loss_config.group_size * (2 if self.settings.guidance_scale != 1 else 1)

    def _find_packing(self) -> bool:
        return False

    def prepare(self, examples: list[Any], positions: Sequence[int]) -> list[Any]:
        """Return the prompts with images of the policy of now, and their rewards."""
        settings, size = self.settings, self.loss_config.group_size
        # By the position in the step, because a step can have a prompt twice.
        seeds = [
            stable_hash(self.config.seed, "rollout", self.step, position, n)
            for position in positions
            for n in range(size)
        ]
        examples = [self._in_form(group, position) for group, position in zip(examples, positions, strict=True)]
        self.weights.publish()
        codes, logps = self.generator.generate(
            [group.ids for group in examples],
            seeds=seeds,
            num_images=size,
            guidance_scale=settings.guidance_scale,
            temperature=self.config.images.temperature,
            output="codes",
            on_error="skip",
            progress=False,
            return_logps=True,
        )
        made = (codes >= 0).all(1).tolist()
        kept = [n for n, whole in enumerate(made) if whole]
        images = self.model.decode_codes(codes[kept])
        rewards = torch.full((len(codes),), torch.nan)
        owners = [examples[n // size] for n in kept]
        prompts, questions = [group.prompt for group in owners], [group.questions for group in owners]
        with self.weights.before_training():  # the judge stays the same
            scores = self.scorer.score(images, prompts, questions)
        rewards[kept] = torch.tensor(scores, dtype=torch.float32)
        self.weights.train()
        return [
            dataclasses.replace(group, codes=own.clamp(min=0), logps=old, rewards=scores)
            for group, own, old, scores in zip(
                examples, codes.split(size), logps.split(size), rewards.split(size), strict=True
            )
        ]

    def _in_form(self, group: Group, position: int) -> Group:
        """Return a prompt in the form of its images: with images.prompts=both, dense in half of the cases."""
        choice = stable_hash(self.config.seed, "form", self.step, position)
        if not group.dense_ids or choice % 2 == 0:
            return group
        return dataclasses.replace(group, ids=group.dense_ids[choice // 2 % len(group.dense_ids)])

    def _compute_loss(self, examples: list[Any]) -> GRPOLoss:
        config = self.loss_config
        # The exact pass keeps all activations.
        exact = self.not_exact is None and not self.checkpointing
        given = self._exact_logps(examples) if exact else self._own_logps(examples)
        old = torch.cat([group.logps for group in examples]).to(given.logps)
        rewards = torch.stack([group.rewards for group in examples]).to(given.logps.device)
        return grpo_loss(
            given.logps,
            given.present,
            rewards,
            old=old if exact else spread_weights(old, given.present),
            weights=given.weights,
            reference=given.reference,
            kl_weight=config.kl_weight,
        )

    def _exact_logps(self, examples: list[Any]) -> _Logps:
        """Return the log-probabilities of the codes with the bits of the generation."""
        prompts = [group.ids for group in examples for _ in range(self.loss_config.group_size)]
        codes = torch.cat([group.codes for group in examples])

        def logps() -> Tensor:
            scale, temperature = self.settings.guidance_scale, self.config.images.temperature
            return exact_logprobs(self.model, prompts, codes, guidance_scale=scale, temperature=temperature)

        reference = None
        if self.loss_config.kl_weight > 0:
            with torch.no_grad(), self.weights.before_training():
                reference = logps()
        return _Logps(logps(), torch.ones_like(codes, dtype=torch.bool), reference)

    def _own_logps(self, examples: list[Any]) -> _Logps:
        """Return the log-probabilities of the tokens by the model's own modules."""
        settings, config = self.settings, self.loss_config
        size = config.group_size
        codes = torch.cat([group.codes for group in examples])
        with torch.no_grad():
            batch = teacher_forced(self.model, [group.ids for group in examples for _ in range(size)], codes)
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        present = targets != IGNORE_INDEX
        columns = [group.columns for group in examples for _ in range(size)]
        images, temperature = range(len(codes)), self.config.images.temperature

        def logps(hidden: Tensor) -> Tensor:
            head: Head | nn.Module
            hidden, head = self._guided(hidden, codes, images, batch)
            return token_logprobs(hidden, head, targets, temperature=temperature)

        with autocast(self.model, settings):
            reference = None
            if config.kl_weight > 0:
                with torch.no_grad(), self.weights.before_training():
                    reference = logps(hidden_states(self.model, batch.embeds, positions=batch.positions))
            hidden, masks = self._forward(batch, columns)
            own = logps(hidden)
        weights = None
        if masks is not None:
            options: dict[str, Any] = {"gamma": config.mask_gamma, "blur_size": config.mask_blur}
            grids = [token_weights(grid, alpha=config.mask_alpha, **options) for grid in _grids(self.model, masks)]
            weights = spread_weights(torch.cat(grids, 1), present)
        count(codes=len(codes) * image_layout(self.model).codes, backward=torch.is_grad_enabled())
        return _Logps(own, present, reference, weights)

    def _pair_metrics(self, examples: Sequence[Any], output: Any) -> Iterator[tuple[str, str, float]]:
        for group, reward in zip(examples, output.rewards.tolist(), strict=True):
            yield "reward", group.category, reward


def _grids(model: UnifiedModel, masks: Tensor) -> list[Tensor]:
    found = image_layout(model).masks(masks)
    return [found] if isinstance(found, Tensor) else list(found)
