"""Stage 5, last part: training of the language model on preference pairs with the OSPO loss."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast.config import Config, TrainConfig
from ospo_fast.errors import Failure, OspoError, attempt, some_failed
from ospo_fast.files import no_link, read_bytes, reading, regular
from ospo_fast.loss import OSPOLoss, OSPOLossOutput
from ospo_fast.models.base import UnifiedModel
from ospo_fast.models.layout import image_layout
from ospo_fast.models.quantized import is_quantized
from ospo_fast.records import (
    ItemPair,
    Record,
    append_line,
    chunked,
    os_errors,
    parse_json,
    stable_hash,
    write_atomic,
    write_folder,
    write_json,
)
from ospo_fast.stages import StageContext
from ospo_fast.stages.checkpoints import REMEDY, check_progress, checkpoint_path, checkpoint_paths, delete_others
from ospo_fast.stages.extension import Extension, extended_factor, read_extensions
from ospo_fast.stages.image_files import pair_codes
from ospo_fast.stages.masks import MaskExtractor, build_extractor, load_unions
from ospo_fast.stages.model_card import base_folder, model_card, public_name
from ospo_fast.stages.object_tokens import find_objects
from ospo_fast.stages.packing import (
    Packed,
    pack,
    packed_attention,
    packed_hidden_states,
    packing_matches,
    packing_runs,
)
from ospo_fast.stages.parallel import Ranks, own_passes
from ospo_fast.stages.prompt_files import image_prompt_ids
from ospo_fast.stages.run_files import made_here
from ospo_fast.stages.samples import sample
from ospo_fast.stages.teacher_forcing import Batch, hidden_states, teacher_forced
from ospo_fast.stages.train_memory import needs_checkpointing
from ospo_fast.stages.train_settings import (
    VALIDATION,
    input_stage,
    loss_config,
    mask_settings,
    reward_settings,
    trains_groups,
    uses_masks,
)
from ospo_fast.stages.trained_weights import FullWeights, LoraWeights
from ospo_fast.stages.training_pairs import (
    category_of,
    held_out_ids,
    select_training_pairs,
    select_training_prompts,
)
from ospo_fast.work import Work, count, counting, device_name, step_rates, work_of

if TYPE_CHECKING:
    from ospo_fast.ops import Head
    from ospo_fast.stages.tracking import Tracker

logger = logging.getLogger(__name__)

# What a checkpoint holds of a Trainer, apart from weights, optimizer and random numbers.
_PROGRESS = ("step", "best", "stale", "stopped", "skipped_steps", "skipped_pairs")

Evaluation = Callable[["UnifiedModel", int], dict[str, float]]  # (model, step) → metrics


@dataclass(frozen=True)
class Example:
    """A pair to train on."""

    pair_id: str
    ids: Tensor  # (S,) of the prompt
    rejected_ids: Tensor | None  # (S',) of the rejected prompt, for the conditional term
    codes: Tensor  # (2, T): chosen, rejected
    masks: Tensor | None  # (2, H, W) stored masks
    columns: list[list[int]] | None = None  # of each object its tokens, for masks of the policy itself
    category: str = ""  # of its prompt
    reference: Tensor | None = None  # (2,) log-probabilities of both images before training

    @property
    def identity(self) -> str:
        """What must be the same where training is resumed."""
        return self.pair_id

    @property
    def forms(self) -> list[Tensor]:
        """The ids of each prompt that can be in a sequence."""
        return [self.ids] if self.rejected_ids is None else [self.ids, self.rejected_ids]


def load_examples(
    pairs: Sequence[ItemPair], model: UnifiedModel, config: Config, out: Path | None
) -> tuple[list[Example], dict[str, Failure]]:
    """Load the pairs, and collect by id those that fail: a prompt too long for the model, a file that cannot be read.

    Raises:
        OspoError: a pair lacks the rejected prompt that the loss needs.

    """
    examples: list[Example] = []
    failures: dict[str, Failure] = {}
    for part in chunked(pairs, 32):
        for item, codes in zip(
            part, pair_codes(model, [item.pair for item in part], out, config.read_from), strict=True
        ):
            example = _load_example(item, codes, model, config, out)
            if isinstance(example, Failure):
                failures[item.pair_id] = example
            else:
                examples.append(example)
    return examples, failures


def _load_example(
    item: ItemPair, codes: Tensor | Failure, model: UnifiedModel, config: Config, out: Path | None
) -> Example | Failure:
    loaded: dict[str, Any] = {"ids": image_prompt_ids(model, item.record["prompt"]), "rejected_ids": None}
    if loss_config(config).cond_weight > 0:
        if not item.pair.get("rejected_prompt"):
            raise OspoError(
                f"Item {item.pair_id} has no rejected_prompt, which the conditional term needs; use records of the "
                "stage perturb, or set train.loss.cond_weight=0. Of official pairs, put the negative_prompt.json that "
                "their images are of into the run folder, and run `ospo-fast select --no-resume`."
            )
        loaded["rejected_ids"] = image_prompt_ids(model, item.pair["rejected_prompt"])
    loaded |= {"codes": codes, "masks": None}
    if uses_masks(config) and config.train.masks == "online":
        objects = find_objects(item.record, model, config.masks.match, config.masks.nouns)
        loaded["columns"] = objects if isinstance(objects, Failure) else objects.columns
    elif uses_masks(config):
        loaded["masks"] = attempt(load_unions, item.pair, out, config.read_from, grid=model.grid)
    if loss_config(config).reference:
        loaded["reference"] = torch.zeros(2)  # until `Trainer.add_references`
    failed = next((value for value in loaded.values() if isinstance(value, Failure)), None)
    return Example(item.pair_id, **loaded, category=category_of(item.record)) if failed is None else failed


def make_batch(
    model: UnifiedModel, examples: Sequence[Example], *, swapped: bool, packed: bool = False
) -> tuple[Batch | Packed, Tensor | None]:
    """Return the groups chosen, rejected[, swapped] of the examples, stacked, and their stored masks (2·B, H, W)."""
    masks = [example.masks[side] for side in (0, 1) for example in examples if example.masks is not None]
    with torch.no_grad():
        batch = (pack if packed else teacher_forced)(model, *_sequences(examples, swapped))
    return batch, torch.stack(masks).to(model.device) if masks else None


def _sequences(examples: Sequence[Example], swapped: bool) -> tuple[list[Tensor], Tensor]:
    """Return prompts and codes (N, T) of the groups."""
    prompts = [example.ids for example in examples] * 2
    codes = [example.codes[side] for side in (0, 1) for example in examples]
    if swapped:
        prompts += [example.rejected_ids for example in examples if example.rejected_ids is not None]
        codes += [example.codes[0] for example in examples]
    return prompts, torch.stack(codes)


def unconditional_hidden_states(
    model: UnifiedModel, codes: Tensor, images: Sequence[int], batch: Batch | Packed
) -> Tensor:
    """Return the hidden states (N, S, D) of a batch with unconditional prompts.

    They are at the positions of the batch, also where an unconditional prompt has another length. Rows of the same
    image and the same prompt length are computed once.

    Args:
        model: whose states they are.
        codes: (M, T) of the images.
        images: of each row of the batch, or of more, which image it has, 0 to M − 1.
        batch: with the prompts.

    """
    rows = list(zip(images, batch.lengths.tolist(), strict=False))
    distinct = list(dict.fromkeys(rows))
    prompts = [model.unconditional(torch.full((length,), model.boi_id)) for _, length in distinct]
    with torch.no_grad():
        partner = teacher_forced(model, prompts, codes[[image for image, _ in distinct]])
    found = hidden_states(model, partner.embeds, positions=partner.positions)
    number = {row: n for n, row in enumerate(distinct)}
    order = [number[row] for row in rows]
    own, total = batch.lengths.tolist(), batch.embeds.shape[1]
    if all(int(partner.lengths[n]) == length for n, length in zip(order, own, strict=True)):
        return found[order]
    before = 1  # the token before an image predicts its first code
    moved = []
    for n, length in zip(order, own, strict=True):
        begin = int(partner.lengths[n]) - before
        image = found[n, begin : begin + partner.tokens + before]
        moved.append(F.pad(image, (0, 0, length - before, total - length - partner.tokens)))
    return torch.stack(moved)


def shuffled_indices(count: int, seed: int, start: int, length: int) -> list[int]:
    """Return `length` indices from position `start` of an endless stream of shuffled epochs over `count` examples."""
    indices: list[int] = []
    epoch, offset = divmod(start, count)
    while len(indices) < length:
        generator = torch.Generator().manual_seed(stable_hash(seed, "epoch", epoch))
        indices += torch.randperm(count, generator=generator).tolist()[offset:]
        epoch, offset = epoch + 1, 0
    return indices[:length]


def build_optimizer(
    parameters: list[nn.Parameter], settings: TrainConfig, extensions: Sequence[Extension] = ()
) -> tuple[torch.optim.Optimizer, Any]:
    """Return AdamW and its schedule: warm-up, then constant or a cosine that ends at `min_learning_rate`.

    "official" is `official_factor`. The schedule is that of the steps before the first of the extensions, which have
    schedules of their own.
    """
    from transformers import get_scheduler

    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    cosine = settings.schedule == "cosine"
    steps = extensions[0].after if extensions else settings.steps
    schedule: Any
    if settings.schedule == "official":
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(official_factor, settings, steps))
    else:
        schedule = get_scheduler(
            "cosine_with_min_lr" if cosine else "constant_with_warmup",
            optimizer,
            num_warmup_steps=round(settings.warmup_ratio * steps),
            num_training_steps=steps,
            scheduler_specific_kwargs={"min_lr": settings.min_learning_rate} if cosine else None,
        )
    if extensions:
        schedule.lr_lambdas = [partial(extended_factor, schedule.lr_lambdas[0], settings, extensions)]
    return optimizer, schedule


def official_factor(settings: TrainConfig, steps: int, step: int) -> float:
    """Return the learning rate after `step` steps, as a share of the highest one, by the official schedule.

    It counts from 1 (`CosineDecayWarmUpRestarts` in ospo/utils/train.py): warm-up begins above 0, and after it comes a
    cosine over all `steps`, of which the first ones are left out.
    """
    count, warmup = step + 1, steps * settings.warmup_ratio
    if count < warmup:
        return count / warmup
    low = settings.min_learning_rate / settings.learning_rate
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(count / steps, 1)))


class Trainer:
    """One training run in `folder`: weights, optimizer, schedule and checkpoints. The loss is that of pairs.

    With several processes each has a Trainer, and all call the same methods. The pairs of a step, their order and the
    learning rate depend on its number alone, and each process has a part of the pairs (`own_passes`). Random numbers
    depend on the seed, the step, and the place of a pass in it. So any number of processes computes the same step, up
    to rounding: sums have another order. The dropout of LoRA is the same where the passes are, which is so if
    `accumulation` is a multiple of the number of processes. Else other random numbers of the same distribution drop.
    """

    # Metrics that each category has as well.
    of_category: ClassVar[tuple[str, ...]] = ("accuracy", "chosen_logps", "rejected_logps")

    def __init__(
        self,
        model: UnifiedModel,
        examples: list[Any],
        config: Config,
        folder: Path,
        extractor: MaskExtractor | None = None,  # of the policy's own masks
        ranks: Ranks | None = None,
        held_out: Sequence[Example] = (),  # for `validate`
    ) -> None:
        self.held_out = held_out
        self.model, self.examples, self.config, self.folder, self.extractor = model, examples, config, folder, extractor
        self.settings, self.ranks = config.train, ranks or Ranks()
        torch.manual_seed(stable_hash(config.seed, "lora") % 2**31)
        full = self.settings.full
        self.weights = FullWeights(model, self.ranks) if full else LoraWeights(model, self.settings, self.ranks)
        self.parameters: list[Any] = list(self.weights.parameters.values())
        self.extensions = self.ranks.first(lambda: read_extensions(folder))
        self.optimizer, self.schedule = build_optimizer(self.parameters, self.settings, self.extensions)
        self.loss_config = loss_config(config)
        self.loss: Any = None if self.loss_config.group_size else OSPOLoss(self.loss_config)
        self.forward = self.weights.distribute(self._compute_loss)
        self.packed = self._find_packing()
        self.checkpointing = False  # whether layers run again in the backward pass; `train` decides
        self.step = 0
        # The best evaluation: its step, its value, and the SHA-256 of best.safetensors.
        self.best: dict[str, Any] = {}
        self.stale = 0  # evaluations since then
        self.stopped = False
        self.skipped_steps = 0
        self.skipped_pairs: dict[str, int] = {}  # by id, in how many of these steps
        self.skipped_row: list[list[str]] = []  # since the last update, the pairs of each skipped step
        self.last_good = self._moment()  # before these steps
        self.saved: Path | None = None  # the newest checkpoint

    def train_step(self) -> dict[str, Any]:
        """Run one optimizer step over `batch_size` × `accumulation` pairs; return the metrics of its log line.

        If the loss or the norm of the gradient is not finite, weights and optimizer stay as they are. The step counts
        as one: the next step has the next number, learning rate and pairs.
        """
        settings, started, ranks = self.settings, time.perf_counter(), self.ranks
        if not self.skipped_row:
            self.last_good = self._moment()
        pairs = settings.batch_size * settings.accumulation
        indices = shuffled_indices(len(self.examples), self.config.seed, self.step * pairs, pairs)
        counts = Counter(self.examples[i].category for i in indices)
        sums: defaultdict[str, float] = defaultdict(float, dict.fromkeys(self._category_keys(counts), 0.0))
        bad: list[str] = []  # pairs of the passes whose loss is not finite
        passes = own_passes(pairs, settings.batch_size, ranks.rank, ranks.size)
        for number, positions in enumerate(passes, 1):
            # A pass without pairs takes part in the collectives of the others, with a pair that counts 0.
            examples = [self.examples[indices[i]] for i in positions or range(1)]
            share = len(positions) / pairs
            examples = self.prepare(examples, positions or range(positions.start, positions.start + 1))
            torch.manual_seed(stable_hash(self.config.seed, "pass", self.step, positions.start))
            last = number == len(passes)
            with (
                nullcontext() if last else self.weights.accumulating(self.forward),
                packed_attention(self.model) if self.packed else nullcontext(),
            ):
                output = self.forward(examples)
                (output.loss * (share * ranks.size)).backward()  # the mean over ranks has 1 / size
            # Read after the backward pass is launched: reading a value synchronizes with the device.
            for name, value in output.metrics.items():
                sums[name] += float(value) * share if share else 0.0
            for name, category, value in self._pair_metrics(examples, output) if share else ():
                sums[f"{name}/{category}"] += value / counts[category]
            if share and not math.isfinite(output.metrics["loss"]):
                bad += [example.pair_id for example in examples]
        norm = self._clip()
        *values, bad_count = ranks.sums([*sums.values(), len(bad)])
        if bad_count:
            bad = list(chain.from_iterable(ranks.everywhere(lambda: bad)))
        rate = self.schedule.get_last_lr()[0]
        self.step += 1
        row = {"step": self.step, **dict(zip(sums, values, strict=True)), "lr": rate, "grad_norm": norm}
        if bad or not math.isfinite(norm):
            row |= self._skip(bad or [self.examples[i].pair_id for i in indices])
        else:
            self.optimizer.step()
            self.skipped_row = []
        self.optimizer.zero_grad(set_to_none=True)
        self._set_learning_rate()
        return {**row, "seconds": round(time.perf_counter() - started, 4)}

    def prepare(self, examples: list[Any], positions: Sequence[int]) -> list[Any]:
        """Return the examples of a pass, which have these positions in the step, as `_compute_loss` takes them."""
        return examples

    def _compute_loss(self, examples: list[Any]) -> Any:
        """Return the loss of some pairs, and its metrics."""
        settings = self.settings
        swapped = self.loss_config.cond_weight > 0
        batch, masks = make_batch(self.model, examples, swapped=swapped, packed=self.packed)
        # Swapped rows take the masks of the chosen.
        columns = [] if self.extractor is None else [example.columns for example in examples] * 2
        reference = None
        if self.loss_config.reference:
            reference = torch.stack([example.reference for example in examples], 1).flatten().to(self.model.device)
        with autocast(self.model, settings):
            hidden, online = self._forward(batch, columns)
            masks = masks if online is None else online
            codes = torch.stack([example.codes[side] for side in (0, 1) for example in examples])
            images = [*range(len(codes)), *range(len(examples))]  # swapped rows have the codes of the chosen
            hidden, head = self._guided(hidden, codes, images, batch)
            object_masks = None if masks is None else image_layout(self.model).masks(masks)
            output: OSPOLossOutput = self.loss(
                hidden, batch.labels, head, object_masks=object_masks, reference_logps=reference
            )
        count(codes=len(batch.lengths) * image_layout(self.model).codes, backward=torch.is_grad_enabled())
        if masks is not None and settings.masks == "online":
            output.metrics["mask_coverage"] = (masks > 0.5).float().mean()
        return output

    def _guided(
        self, hidden: Tensor, codes: Tensor, images: Sequence[int], batch: Batch | Packed
    ) -> tuple[Tensor, Head | nn.Module]:
        """Return hidden states and head of the distribution that trains; see `unconditional_hidden_states`."""
        head: Head | nn.Module = self.model.head
        if self.settings.guidance_scale == 1:
            return hidden, head
        from ospo_fast.ops import Head

        unconditional = unconditional_hidden_states(self.model, codes, images, batch)
        return Head.of(head).guided(hidden, unconditional, self.settings.guidance_scale)

    @torch.no_grad()
    def add_references(self) -> None:
        """Let every pair have its log-probabilities under the weights of now, those before training.

        Each rank computes a part of them.
        """
        if not self.loss_config.reference:
            return
        batches = list(chunked([*self.examples, *self.held_out], self.settings.batch_size))

        def own() -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for examples in batches[self.ranks.rank :: self.ranks.size]:
                with packed_attention(self.model) if self.packed else nullcontext():
                    logps = self._compute_loss(examples).pair_logps.float().cpu()
                found |= {example.pair_id: column for example, column in zip(examples, logps.unbind(1), strict=True)}
            return found

        self.weights.publish()
        parts = self.ranks.everywhere(own)
        self.weights.train()
        found = {pair_id: logps for part in parts for pair_id, logps in part.items()}
        self.examples, self.held_out = (
            [dataclasses.replace(example, reference=found[example.pair_id]) for example in examples]
            for examples in (self.examples, self.held_out)
        )

    def _clip(self) -> float:
        """Clip the gradient; return its norm over all weights and processes."""
        norm: Any = torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _skip(self, pair_ids: list[str]) -> dict[str, Any]:
        """Count a step without an update and its pairs; return what its log line says of them."""
        pairs = sorted(set(pair_ids))
        self._warn(
            "train: skipping step %d, whose loss or gradient is not finite; its pairs: %s", self.step, ", ".join(pairs)
        )
        self.skipped_row.append(pairs)
        self.skipped_steps += 1
        self.skipped_pairs = dict(Counter(self.skipped_pairs) + Counter(pairs))
        return {"skipped": True, "not_finite": pairs}

    def check_ranks(self) -> None:
        """Raise OspoError on every rank unless all have the same settings and pairs."""
        digests = self.ranks.everywhere(self.digest)
        if (other := next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)) is not None:
            raise OspoError(
                f"train: process {other} has other settings or other pairs than process 0, expected the same on all; "
                "give every process the same command, and a run folder that all of them see."
            )

    def check_skipped(self) -> None:
        """Raise OspoError after more than `max_skipped` skipped steps in a row, with a checkpoint from before them."""
        count = len(self.skipped_row)
        if count <= self.settings.max_skipped:
            return
        ids = [pair_id for pair_id, _ in Counter(chain.from_iterable(self.skipped_row)).most_common()]
        pairs = ", ".join(ids[:10]) + (", …" if len(ids) > 10 else "")
        self._return_to(self.last_good)
        self.save()
        raise OspoError(
            f"train: the loss or gradient of {count} steps in a row, from step {self.step + 1}, is not finite; the "
            f"checkpoint from before them is saved. Pairs: {pairs}; correct their files or raise train.max_skipped and "
            "resume, or lower train.learning_rate or remove these pairs and use --no-resume."
        )

    def _warn(self, message: str, *values: object) -> None:
        if self.ranks.rank == 0:
            logger.warning(message, *values)

    def _moment(self) -> dict[str, Any]:
        """Return what changes in a step, apart from weights and optimizer."""
        return {"progress": {name: getattr(self, name) for name in _PROGRESS}}

    def _return_to(self, moment: dict[str, Any]) -> None:
        for name, value in moment["progress"].items():
            setattr(self, name, value)
        self.skipped_row = []
        self._set_learning_rate()

    def _set_learning_rate(self) -> None:
        """Set the learning rate of the next step, which depends on its number alone."""
        with warnings.catch_warnings():  # torch expects an update before each step of the schedule
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.schedule.last_epoch = self.step - 1
            self.schedule.step()

    def needs_checkpointing(self) -> bool:
        """Return whether layers run again in the backward pass: as set, or as the free memory of a rank asks for."""
        if self.settings.gradient_checkpointing is not None:
            return self.settings.gradient_checkpointing
        prompts = [ids for example in self.examples for ids in example.forms]
        rows = min(
            self.settings.batch_size, -(-self.settings.batch_size * self.settings.accumulation // self.ranks.size)
        )
        longest = max(map(len, prompts)) + image_layout(self.model).tokens
        sequences = self.sequences_of_example * rows
        needed = self.ranks.everywhere(
            lambda: needs_checkpointing(
                self.model, self.settings, self.parameters, sequences=sequences, longest=longest
            )
        )
        if any(needed) and self.ranks.rank == 0:
            logger.info("train: activations would not fit into free memory; the backward pass computes them again")
        return any(needed)

    @property
    def sequences_of_example(self) -> int:
        """Sequences that a step runs with gradients for each example, those of guidance included."""
        # Swapped rows share the unconditional sequence of the chosen only where both prompts have the same length.
        return (3 if self.loss_config.cond_weight > 0 else 2) * (2 if self.settings.guidance_scale != 1 else 1)

    def _find_packing(self) -> bool:
        """Return whether sequences are packed without padding, where guidance and online masks do not need it."""
        settings, model = self.settings, self.model
        if self.extractor is not None or settings.guidance_scale != 1 or not self.examples:
            return False
        dtype = _compute_dtype(model, settings)
        if not all(self.ranks.everywhere(lambda: packing_runs(model, dtype))):
            return False
        self.weights.publish()
        several = sorted(self.examples, key=lambda example: len(example.ids))[:: max(1, len(self.examples) // 3)]
        with autocast(model, settings):
            same = packing_matches(model, *_sequences(several[:4], swapped=False))
        self.weights.train()
        return all(self.ranks.everywhere(lambda: same))

    def _forward(
        self, batch: Batch | Packed, columns: Sequence[list[list[int]] | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states of the batch, and masks of this forward pass of its first rows, or None.

        columns: of each of these rows the tokens of its objects; see `Example`.
        """
        if isinstance(batch, Packed):
            return packed_hidden_states(self.model, batch), None
        given = [tokens for tokens in columns if tokens is not None]
        if self.extractor is None or not given:
            return hidden_states(self.model, batch.embeds, positions=batch.positions), None
        rows = given + [[]] * (len(batch.lengths) - len(given))
        with self.extractor.capture(self.model, rows, batch, stop_early=False) as capture:
            hidden = hidden_states(self.model, batch.embeds, positions=batch.positions)
        return hidden, self.extractor.compute(capture, rows, batch).weights[: len(given)].float()

    def evaluate(self, evaluation: Evaluation | None) -> dict[str, Any]:
        """Return the metrics of the callback and of the held-out pairs.

        If those that `train.early_stopping` names are the best, save the adapter; if they no longer improve, stop.
        """
        self.weights.publish()
        metrics: dict[str, Any] = {}
        if evaluation is not None:
            metrics |= self.ranks.first(lambda: evaluation(self.model, self.step))
        if self.held_out:
            metrics |= self.validate()
        name = self.settings.early_stopping
        if name is not None and self.settings.eval_every:
            if name not in metrics:
                known = ", ".join(sorted(metrics))
                raise OspoError(f"train.early_stopping: got {name!r}, expected a metric of the evaluation: {known}.")
            if not self.best or _is_better(name, metrics[name], self.best["value"]):
                # A float of numpy could be saved, but not loaded with `weights_only`.
                self.best, self.stale = {"step": self.step, "value": float(metrics[name])}, 0
                self.best["sha256"] = self.ranks.first(self._write_best)
            else:
                self.stale += 1
            self.stopped = self.stale >= self.settings.patience
        self.weights.train()
        return {"step": self.step, **metrics}

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Return the means over the held-out pairs of what training logs, after `weights.publish`: without dropout.

        Each rank has some of the batches. A value that is not finite makes its means so, and the ids of its pairs are
        `validation/not_finite`.
        """
        counts, total = Counter(example.category for example in self.held_out), len(self.held_out)

        def own() -> tuple[dict[str, float], list[str]]:
            sums, bad = dict.fromkeys([*VALIDATION, *self._category_keys(counts)], 0.0), []
            batches = list(chunked(self.held_out, self.settings.batch_size))
            for examples in batches[self.ranks.rank :: self.ranks.size]:
                with packed_attention(self.model) if self.packed else nullcontext():
                    output = self._compute_loss(examples)
                for name in VALIDATION:
                    sums[name] += float(output.metrics[name]) * len(examples) / total
                for name, category, value in self._pair_metrics(examples, output):
                    sums[f"{name}/{category}"] += value / counts[category]
                finite = output.pair_logps.isfinite().all(0).tolist()
                bad += [example.pair_id for example, right in zip(examples, finite, strict=True) if not right]
            return sums, bad

        parts = self.ranks.everywhere(own)
        metrics: dict[str, Any] = {f"validation/{name}": sum(part[name] for part, _ in parts) for name in parts[0][0]}
        if bad := sorted(pair_id for _, pair_ids in parts for pair_id in pair_ids):
            self._warn("train: values of held-out pairs are not finite at step %d: %s", self.step, ", ".join(bad))
            metrics["validation/not_finite"] = bad
        return metrics

    def _category_keys(self, categories: Iterable[str]) -> list[str]:
        return [f"{name}/{category}" for name in self.of_category for category in sorted(categories)]

    def _pair_metrics(self, examples: Sequence[Any], output: Any) -> Iterator[tuple[str, str, float]]:
        """Yield (metric, category, value) of each pair."""
        rows = torch.cat([output.pair_accuracy[None].to(output.pair_logps), output.pair_logps]).tolist()
        for name, values in zip(self.of_category, rows, strict=True):
            for example, value in zip(examples, values, strict=True):
                yield name, example.category, value

    def sample(self, pairs: Sequence[ItemPair], tracker: Tracker | None) -> None:
        """Write images of prompts of these pairs; see `ospo_fast.stages.samples`."""
        self.weights.publish()
        self.ranks.first(lambda: sample(self.model, pairs, self.config, self.folder, self.step, tracker))
        self.weights.train()

    def _write_best(self) -> str:
        from safetensors.torch import save

        data = save(self.weights.whole())
        write_atomic(self.folder / "best.safetensors", data)
        return hashlib.sha256(data).hexdigest()

    def log_rows(self) -> list[dict[str, Any]]:
        """Return the log lines up to the present step. Those of evaluations have no loss."""
        return [*map(parse_json, _log_until(self.folder / "log.jsonl", self.step).splitlines())]

    def kept(self) -> dict[str, Any] | None:
        """Return step and value of the best evaluation, whose weights are kept, and the value before training.

        None without early stopping. At step 0, the kept weights are those before training.
        """
        metric = self.settings.early_stopping
        if not self.best or metric is None:
            return None
        before = next((row.get(metric) for row in self.log_rows() if row["step"] == 0 and "loss" not in row), None)
        return {"step": self.best["step"], "metric": metric, "before": before, "value": self.best["value"]}

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on, then delete those before it."""
        self.saved = checkpoint_path(self.folder / "checkpoints", self.step, sharded=self.settings.full)
        state = {"digest": self.digest(), "log": self.ranks.first(self._log_digest), **self._moment()}
        self.weights.save_checkpoint(self.saved, state, self.optimizer)
        self._delete_others()

    def _delete_others(self) -> None:
        if self.saved is not None:
            saved = self.saved
            self.ranks.first(lambda: delete_others(saved))

    def _log_digest(self) -> str:
        return hashlib.sha256(_log_until(self.folder / "log.jsonl", self.step)).hexdigest()

    def digest(self) -> str:
        """Identify the settings and pairs, which must not change when a run is resumed."""
        return self._digest_of(self.settings.steps, self.extensions)

    def _known_digests(self) -> list[str]:
        """Return the digest, and those of the training before each of its extensions, which continues from there."""
        before = [self._digest_of(each.after, self.extensions[:n]) for n, each in enumerate(self.extensions)]
        return [self.digest(), *before]

    def _digest_of(self, steps: int, extensions: Sequence[Extension]) -> str:
        settings = dataclasses.asdict(self.settings) | {"steps": steps}
        del settings["extend"]
        if extensions:
            settings["extended"] = [dataclasses.asdict(each) for each in extensions]
        for name in ("save_every", "eval_every", "patience", "early_stopping", "gradient_checkpointing", "max_skipped"):
            settings.pop(name)
        settings.pop("sample_every")
        if not self.held_out:  # as an older version, which could not hold pairs out
            settings.pop("validation_pairs")
        settings |= mask_settings(self.config) | reward_settings(self.config)
        pairs = [example.identity for example in (*self.examples, *self.held_out)]
        return f"{stable_hash(json.dumps(settings), self.config.preset, self.config.seed, *pairs):x}"

    def resume(self) -> bool:
        """Resume from the newest checkpoint that is whole; return whether there is any checkpoint.

        An older one takes longer, but leads to the same weights and log.
        """
        paths = self.ranks.first(lambda: checkpoint_paths(self.folder / "checkpoints"))
        broken: list[Failure] = []
        for path in paths:
            if (path.suffix == "") is not self.settings.full:
                self._refuse(path)
            state = attempt(self._read_state, path)
            failed = self.ranks.any(state if isinstance(state, Failure) else None)
            if failed is None:
                break
            broken.append(failed)
        else:
            if broken:
                raise OspoError(broken[0].reason)
            return False
        assert not isinstance(state, Failure)
        for failed in broken:
            self._warn("train: %s Training continues from the older %s.", failed, path.name)
        if state["digest"] not in self._known_digests():
            self._refuse(path)
        self.weights.load_checkpoint(state, self.optimizer)
        self._return_to(state)
        self.saved = path
        if self.best:
            self.ranks.first(lambda: self._read_best() and None)
        if state["log"] != self.ranks.first(self._log_digest):
            log = self.folder / "log.jsonl"
            self._warn("train: lines of %s were lost or changed since the checkpoint; the weights are as before", log)
        return True

    def _refuse(self, path: Path) -> NoReturn:
        raise OspoError(f"{path} has other settings or other pairs; train into another --out, or with --no-resume.")

    def _read_state(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint and check what it holds, if it is of this run. Raises OspoError."""
        with reading("checkpoint", path, REMEDY):
            state: dict[str, Any] = self.weights.read_checkpoint(path)
            if state["digest"] in self._known_digests():
                self.weights.check_checkpoint(state)
                check_progress(state["progress"], _PROGRESS, self.settings.steps)
                if not isinstance(state["log"], str):
                    raise ValueError("its checksum of the log should be a text")
        return state

    def _read_best(self, sha256: str | None = None) -> dict[str, Tensor]:
        """Read best.safetensors. Raises OspoError if it is broken or does not have this checksum."""
        from safetensors.torch import load

        path = self.folder / "best.safetensors"
        with reading("checkpoint", path, REMEDY):
            data = read_bytes(path, self.weights.max_bytes())
            if sha256 not in (None, hashlib.sha256(data).hexdigest()):
                raise ValueError("its checksum is wrong, as it is damaged or from another run")
            tensors: dict[str, Tensor] = load(data)
            self.weights.check_whole(tensors)
            return tensors

    def finish(self, failures: dict[str, Failure], pairs: Sequence[ItemPair], out: Path) -> None:
        """Save the best weights, or else the last, with model cards of their `pairs`, and merge them into the model.

        An adapter names its base model so that others can load it. `out`, the run folder, keeps where it is here.
        """
        best = int(self.best.get("step", self.step))
        self.weights.publish()
        if best != self.step:
            self.ranks.everywhere(lambda: self.weights.load_whole(self._read_best(self.best["sha256"])))
        base = public_name(self.model.name)
        trained = {example.pair_id for example in self.examples}
        pairs = [item for item in pairs if item.pair_id in trained]

        def card(merged: bool) -> bytes:
            rows, kept = self.log_rows(), self.kept()
            own = made_here(out, "images")
            return model_card(base, self.config, pairs, rows, kept, self.step, self.extensions, merged=merged, own=own)

        if isinstance(self.weights, LoraWeights):
            peft = self.weights.peft
            peft.peft_config["default"].base_model_name_or_path = base
            self.ranks.first(
                lambda: write_folder(self.folder / "adapter", lambda path: _save_adapter(peft, path, card(False)))
            )
        self.weights.merge()
        self.ranks.first(lambda: self._write_results(best, failures, out, card(True)))

    def _write_results(self, best: int, failures: dict[str, Failure], out: Path, card: bytes) -> None:
        def save(folder: Path) -> None:
            self._merged().save(folder)
            (folder / "README.md").write_bytes(card)

        base, base_path = public_name(self.model.name), base_folder(self.model.name)
        write_folder(self.folder / "model", save)
        reasons = {pair_id: failed.reason for pair_id, failed in failures.items()}
        done = {"step": self.step, "best_step": best, "digest": self.digest(), "left_out": reasons}
        done |= {"kept": self.kept()}
        saved = (path for name in ("adapter", "model") for path in (self.folder / name).rglob("*"))
        done |= {"files": sorted(path.relative_to(self.folder).as_posix() for path in saved if path.is_file())}
        if base_path is not None:
            done |= {"base_model": {"name": base, "folder": _relative(base_path, out / "train", out)}}
        done |= {"skipped_steps": self.skipped_steps, "skipped_pairs": self.skipped_pairs}
        if self.extensions:
            done |= {"extended": [dataclasses.asdict(each) for each in self.extensions]}
        if self.held_out:
            done |= {"validation_pairs": [example.pair_id for example in self.held_out]}
        if self.saved is not None:
            delete_others(self.saved)  # one that could not be deleted before
        write_json(self.folder / "done.json", done)  # last: after it, no other call works on this folder

    def _merged(self) -> UnifiedModel:
        """Return the trained model without adapters: of a quantized one, its base model in full with the adapter."""
        from ospo_fast.models import load_on_base

        model: Any = self.model
        if not is_quantized(model.module):
            return self.model
        size, cpu = getattr(model, "image_size", None), torch.device("cpu")
        return load_on_base(self.folder / "adapter", cpu, model.dtype, base=model.name, image_size=size)


def _save_adapter(peft: Any, folder: Path, card: bytes) -> None:
    peft.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").write_bytes(card)  # in place of peft's, which is empty


class _Log:
    """log.jsonl; the newest loss and evaluation in it are shown as the status of the stage."""

    def __init__(self, path: Path, context: StageContext, metric: str | None, ranks: Ranks) -> None:
        self.path, self.status, self.metric, self.ranks = path, context.status, metric or "alignment", ranks
        self.tracker = context.tracker
        self.values: dict[str, str] = {}

    def append(self, row: dict[str, Any]) -> None:
        self.ranks.first(lambda: append_line(self.path, row))
        if self.tracker is not None:
            self.tracker.log(row)
        for name in ("loss", "validation/loss", self.metric):
            if name in row:
                self.values[name] = f"{name} {float(row[name]):.3f}"
        self.show()

    def show(self, activity: str = "") -> None:
        if self.status is not None:
            self.status(", ".join([*self.values.values(), activity]).removesuffix(", "))


def _relative(path: Path, start: Path, out: Path) -> str:
    """Return a path relative to a folder of the run folder if it is in the run, which can be moved, else as it is."""
    run = out.parent if re.fullmatch(r"iter\d+", out.name) else out
    inside = path.is_relative_to(os.path.realpath(run))
    return os.path.relpath(path, os.path.realpath(start)) if inside else str(path)


def _is_better(metric: str, value: float, best: float) -> bool:
    """Return whether a value is better than the best one until now: a finite one is better than NaN."""
    if not math.isfinite(best):
        return math.isfinite(value)
    return value < best if metric == "validation/loss" else value > best


def autocast(model: UnifiedModel, settings: TrainConfig) -> AbstractContextManager[Any]:
    """Return the context of the matrix products of training."""
    if settings.autocast is not None or model.device.type == "cuda":
        return torch.autocast(model.device.type, _compute_dtype(model, settings))
    half = settings.full and model.dtype in (torch.bfloat16, torch.float16)  # trained in float32, see `FullWeights`
    return torch.autocast(model.device.type, model.dtype) if half else nullcontext()


def _compute_dtype(model: UnifiedModel, settings: TrainConfig) -> torch.dtype:
    if settings.autocast is not None:
        dtype: torch.dtype = getattr(torch, settings.autocast)
        return dtype
    return torch.bfloat16 if model.device.type == "cuda" else model.dtype


def _log_until(path: Path, step: int) -> bytes:
    """Return the lines of a log up to a step, without a torn one."""
    with os_errors("read", path):
        lines = regular(path).read_bytes().splitlines(keepends=True) if no_link(path).exists() else []
    return b"".join(line for line in lines if _line_step(line) <= step)


def _line_step(line: bytes) -> float:
    with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
        step = parse_json(line)["step"]
        if type(step) is int and line.endswith(b"\n"):
            return float(step)
    return math.inf


def train(
    records: Iterable[Record], model: UnifiedModel, config: Config, *, out: Path, context: StageContext | None = None
) -> None:
    """Train `model` in place on the pairs of `records`, and write the results to `out`/train.

    Writes log.jsonl (a line per step and per evaluation), checkpoints/, samples/ (`train.sample_every`), adapter/
    (peft; not with `train.full`), model/ (merged) and finally done.json. With `train.validation_pairs`, some pairs do
    not train: lines of evaluations have their loss (`Trainer.validate`). If `train.early_stopping` names a metric, the
    weights are those of the best evaluation, which best.safetensors holds, else the last.
    A step whose loss or gradient is not finite is skipped: it makes no update, its log line has `skipped` and the ids
    of its pairs (`not_finite`), and done.json counts these steps and pairs. It keeps its number, its learning rate and
    its pairs, so that the steps after it have the same as without it.
    Uses bf16 autocast on CUDA, the model's own dtype on the CPU, or that of `train.autocast`. The gradient is not
    scaled: in float16 its smallest values are 0, as in the official code.

    Where the folder lists extensions (`ospo_fast.stages.extension`), it continues from a checkpoint of the training
    before them. A step has the pairs and random numbers of its number, so that it does not matter when an extension was
    asked for; only the learning rate follows another schedule.

    If torch.distributed is initialized, every process of its default group calls this, with the same records and
    configuration, a run folder that all see, and the model on its own device. They train together, see `Trainer`: LoRA
    by DDP, all weights by FSDP2. A training may be resumed by another number of processes. Rank 0 alone writes, except
    shards of checkpoints, and alone calls `evaluation`. The trained model is in the memory of every process.

    Args:
        records: with `pairs`, and with masks if the loss uses stored ones.
        model: changed in place; afterwards it is the trained model.
        config: sections `train` and `masks`, `preset`, `seed`.
        out: the run folder.
        context: `evaluation` is called before the first step, every `train.eval_every` steps and after the last one
            (with `eval_every=0` never; held-out pairs are then evaluated at both ends). `report` gets the
            steps of this call (`items`), those of the run (`total`), the number of pairs that `failed`, and which
            weights are `kept`. `begin` is called after the evaluation before the first step. `tracker` gets a copy of
            every line of log.jsonl and of the contact sheets of samples.

    Raises:
        OspoError: no pair to train on, a file that cannot be written, or a checkpoint that is broken or of another
            run, or more than `train.max_skipped` skipped steps in a row, or processes that differ in these arguments.
            An error of rank 0 is raised on every rank.

    """
    context, ranks = context or StageContext(), Ranks()
    grpo = trains_groups(config)
    pairs = (select_training_prompts if grpo else select_training_pairs)(records, config)
    extractor = None
    if uses_masks(config) and config.train.masks == "online":
        extractor = ranks.first_alone(lambda: build_extractor(config.masks, pairs, model, out, config.read_from))
        config = dataclasses.replace(config, masks=extractor.settings)
    if grpo:
        from ospo_fast.stages.grpo import GroupTrainer, load_groups

        make_trainer: type[Trainer] = GroupTrainer
        found: tuple[list[Any], dict[str, Failure]] = load_groups(pairs, model, config)
    else:
        make_trainer, found = Trainer, load_examples(pairs, model, config, out)
    examples, failures = found
    if failures and ranks.rank == 0:
        reasons = [f"{pair_id}: {failed}" for pair_id, failed in failures.items()]
        logger.warning("train: %s", some_failed("pairs", reasons, len(pairs)))
    if not examples:
        where = "the warning above" if failures else f"the reasons in {input_stage(config)}.jsonl"
        raise OspoError(f"train: no pair to train on; see {where}.")
    if ranks.rank == 0:  # all have the same pairs
        count(kept=len(examples), dropped=len(failures))
    held_out = held_out_ids(pairs, config)
    validating = [example for example in examples if example.pair_id in held_out]
    examples = [example for example in examples if example.pair_id not in held_out]
    if not (examples and validating) and held_out:
        raise OspoError(f"train: no pair to {'validate with' if examples else 'train on'}; see the warning above.")
    settings, folder = config.train, (context.writes or out) / "train"
    if not context.resume:
        ranks.first(lambda: shutil.rmtree(folder, ignore_errors=True))
    trainer = make_trainer(model, examples, config, folder, extractor, ranks, validating)
    trainer.check_ranks()
    trainer.add_references()
    checkpointed = trainer.weights.checkpointed if trainer.needs_checkpointing() else None
    resumed = trainer.resume()
    logfile = folder / "log.jsonl"
    ranks.first(lambda: _begin_log(logfile, trainer.step if resumed else None, settings.steps))
    trainer.checkpointing = checkpointed is not None
    if checkpointed is not None:
        checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    evaluation = context.evaluation if settings.eval_every else None
    evaluates = evaluation is not None or bool(validating)
    log = _Log(logfile, context, settings.early_stopping, ranks)
    if context.tracker is not None:
        context.tracker.start(context.report.iteration, trainer.step if resumed else None)
    if evaluates and not resumed:
        log.show("evaluating before the first step")
        log.append(trainer.evaluate(evaluation))
    if context.begin is not None:
        context.begin(trainer.step)
    loaded = {example.pair_id for example in examples}
    sampled = [item for item in pairs if item.pair_id in loaded]
    due, device, shapes = False, device_name(model.device), work_of(model).shapes
    while trainer.step < settings.steps and not trainer.stopped:
        with counting(Work(shapes)) as work:
            row = trainer.train_step()
        cost = ranks.total_cost(work.cost(row["seconds"], device))
        log.append(row | step_rates(cost, row["seconds"]))
        trainer.check_skipped()
        last = trainer.step == settings.steps
        if evaluates and (last or (settings.eval_every and trainer.step % settings.eval_every == 0)):
            log.show("evaluating")
            log.append(trainer.evaluate(evaluation))
        if settings.sample_every and trainer.step % settings.sample_every == 0:
            log.show("generating samples")
            trainer.sample(sampled, context.tracker)
        due = due or trainer.step % settings.save_every == 0 or last or trainer.stopped
        if due and not trainer.skipped_row:  # every checkpoint follows an update, see `check_skipped`
            trainer.save()
            due = False
        context.report.items += 1
        if context.progress is not None:
            context.progress(1)
    if checkpointed is not None:
        checkpointed.gradient_checkpointing_disable()
    trainer.finish(failures, pairs, out)
    context.report.total, context.report.failed = trainer.step, len(failures)
    context.report.kept = ranks.first(trainer.kept)


def _begin_log(path: Path, resumed: int | None, steps: int) -> None:
    """Leave the lines of a log up to the step of a resumed training, else none."""
    if resumed is None and _log_until(path, steps):
        folder = path.parent / "checkpoints"
        logger.warning("train: no checkpoint in %s; training starts from step 0 again", folder)
    write_atomic(path, _log_until(path, -1 if resumed is None else resumed))


def run(
    records: Iterable[Record],
    model: UnifiedModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Train on the records and yield nothing; see `train`."""
    if out is None:
        raise OspoError("train: got no run folder; give `out`, where the weights go.")
    train(records, model, config, out=out, context=context)
    yield from ()


def failure(record: Record) -> Failure | None:
    """Return None: `run` reports the pairs that failed."""
    return None
