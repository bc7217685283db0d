"""Stage 5, last part: LoRA training of the language model on preference pairs with the OSPO loss."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ospo_fast.config import Config, TrainConfig
from ospo_fast.errors import Failure, OspoError, some_failed
from ospo_fast.loss import OSPOLoss, OSPOLossConfig
from ospo_fast.records import Record, append_line, iter_pairs, stable_hash, write_atomic, write_json
from ospo_fast.stages import StageContext
from ospo_fast.stages.common import chunked, pair_codes, prompt_error
from ospo_fast.stages.teacher_forcing import IGNORE, Batch, hidden_states, teacher_forced

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel
    from ospo_fast.ops import Head

logger = logging.getLogger(__name__)

Evaluation = Callable[["UnifiedModel", int], dict[str, float]]


@dataclass(frozen=True)
class Example:
    """A pair, ready to train on: its prompt, the codes (2, T) of chosen and rejected, and what gives their masks:
    themselves (2, H, W), or the positions of each object's tokens, where the policy's own are taken.
    """

    item_id: str
    prompt: str
    rejected_prompt: str
    codes: Tensor
    masks: Tensor | None
    columns: list[list[int]] | None = None


@dataclass(frozen=True)
class TrainResult:
    """What training leaves: steps done, the step of the weights that were kept, and the last logged figures.

    `left_out`: item_id → why its pair could not be trained on.
    """

    steps: int
    best_step: int
    pairs: int
    metrics: dict[str, float]
    left_out: dict[str, str]


def loss_config(preset: str, overrides: dict[str, Any]) -> OSPOLossConfig:
    """The preset's loss with the values that the configuration sets."""
    return dataclasses.replace(OSPOLossConfig.preset(preset), **overrides)


def select_training_pairs(records: Iterable[Record], config: Config) -> list[Record]:
    """A record for each pair to train on: with a mask, where stored masks count; capped per kind and in all.

    The order depends on the ids alone, and so does the choice where there are more than the caps allow.
    """
    settings = config.train
    masked = uses_masks(config) and config.train.masks == "stored"
    pairs = [r for r in iter_pairs(records) if r.get("kept", "chosen" in r) and "chosen" in r]
    chosen = [r for r in pairs if not masked or r.get("mask_path")]
    if len(chosen) < len(pairs):
        logger.warning("%d of %d pairs have no object mask and are left out", len(pairs) - len(chosen), len(pairs))
    ranked = sorted(chosen, key=lambda r: (stable_hash(config.seed, "cap", r["item_id"]), r["item_id"]))
    if settings.max_pairs_per_kind is not None:
        seen: Counter[str] = Counter()
        kept = []
        for record in ranked:
            kind = record.get("kind") or record.get("sub_category", "")
            seen[kind] += 1
            if seen[kind] <= settings.max_pairs_per_kind:
                kept.append(record)
        ranked = kept
    return sorted(ranked[: settings.max_pairs], key=lambda r: r["item_id"])


def uses_masks(config: Config) -> bool:
    """Whether the configured loss weights tokens by object masks."""
    return config.masks.enabled and loss_config(config.preset, config.train.loss).mask_alpha > 0


def input_stage(config: Config) -> str:
    """Return the stage whose records training reads."""
    return "masks" if uses_masks(config) and config.train.masks == "stored" else "select"


def mask_settings(config: Config) -> dict[str, Any]:
    """What training depends on of the section `masks`: whether there are any and, where it takes its own, how."""
    section = dataclasses.asdict(config.masks)
    wanted = section if config.train.masks == "online" else {"enabled": config.masks.enabled}
    return {f"masks.{key}": value for key, value in wanted.items() if key != "batch_size"}


def load_examples(
    records: list[Record], model: UnifiedModel, config: Config, out: Path | None
) -> tuple[list[Example], dict[str, str]]:
    """The pairs with their codes (stored beside the images, or encoded from them) and masks, or what gives those of the
    policy, and what is left out.

    A pair is left out, item_id → reason, when a prompt is too long for the model or a file of it cannot be read. Raises
    OspoError for a pair that lacks the rejected prompt the loss needs.
    """
    conditional = loss_config(config.preset, config.train.loss).cond_weight > 0
    examples: list[Example] = []
    left_out: dict[str, str] = {}
    for part in chunked(records, 32):
        for record, codes in zip(part, pair_codes(model, part, out), strict=True):
            if conditional and not record.get("rejected_prompt"):
                raise OspoError(f"Item {record['item_id']} has no rejected_prompt, which the conditional term needs.")
            example = _example(record, codes, model, config, out)
            if isinstance(example, str):
                left_out[record["item_id"]] = example
            else:
                examples.append(example)
    return examples, left_out


def _example(
    record: Record, codes: Tensor | str, model: UnifiedModel, config: Config, out: Path | None
) -> Example | str:
    from ospo_fast.stages.masks import find_objects, load_unions

    masked = uses_masks(config)
    rejected_prompt = record.get("rejected_prompt", "")
    conditional = loss_config(config.preset, config.train.loss).cond_weight > 0
    for prompt in (record["prompt"], *([rejected_prompt] if conditional else [])):
        if (why := prompt_error(model, prompt)) is not None:
            return why
    if isinstance(codes, str):
        return codes
    masks, columns = None, None
    if masked and config.train.masks == "online":
        target = find_objects(record, model, config.masks.match)
        if isinstance(target, str):
            return target
        columns = target.columns
    elif masked:
        try:
            masks = load_unions(record, out)
        except OspoError as error:
            return str(error)
    return Example(record["item_id"], record["prompt"], rejected_prompt, codes, masks, columns)


def make_batch(model: UnifiedModel, examples: list[Example], *, swapped: bool) -> tuple[Batch, Tensor | None]:
    """Groups chosen, rejected[, swapped] of the examples, stacked, and their masks (2·B, H, W)."""
    prompts = [model.image_prompt(example.prompt) for example in examples] * 2
    codes = [example.codes[side] for side in (0, 1) for example in examples]
    if swapped:
        prompts += [model.image_prompt(example.rejected_prompt) for example in examples]
        codes += [example.codes[0] for example in examples]
    masks = [example.masks[side] for side in (0, 1) for example in examples if example.masks is not None]
    with torch.no_grad():
        batch = teacher_forced(model, prompts, torch.stack(codes))
    return batch, torch.stack(masks).to(model.device) if masks else None


def unconditional_hidden_states(model: UnifiedModel, examples: list[Example], batch: Batch) -> Tensor:
    """Hidden states (N, S, D) at the positions of a batch of `make_batch`, each row after its guidance partner.

    Rows with the same codes after prompts of one length share their partner, which is run once.
    """
    sides = [(side, n) for side in (0, 1, 0) for n in range(len(examples))]  # the third group: swapped, if there
    rows = [(*which, length) for which, length in zip(sides, batch.lengths.tolist(), strict=False)]
    distinct = list(dict.fromkeys(rows))
    prompts = [model.unconditional(torch.zeros(length, dtype=torch.long)) for *_, length in distinct]
    codes = torch.stack([examples[n].codes[side] for side, n, _ in distinct])
    with torch.no_grad():
        partners = teacher_forced(model, prompts, codes)
    return hidden_states(model, partners.embeds)[[distinct.index(row) for row in rows]]


def unconditional_loss(model: UnifiedModel, examples: list[Example]) -> Tensor:
    """Mean −log p of the chosen codes after the guidance partner of their prompts.

    Guidance adds what a prompt changes. Where only the sequences with prompts are trained, the difference to the
    partner grows by as much as they got surer, and guidance that was right before is too strong.
    """
    from ospo_fast.ops import token_logprobs

    prompts = [model.unconditional(model.image_prompt(example.prompt)) for example in examples]
    with torch.no_grad():
        batch = teacher_forced(model, prompts, torch.stack([example.codes[0] for example in examples]))
    hidden = hidden_states(model, batch.embeds)[:, :-1]
    logps = token_logprobs(hidden, model.head, batch.labels[:, 1:])
    return -logps.sum() / (batch.labels != IGNORE).sum()


def shuffled_indices(count: int, seed: int, start: int, length: int) -> list[int]:
    """`length` indices from position `start` of an endless stream of shuffled epochs over `count` examples."""
    indices: list[int] = []
    epoch, offset = divmod(start, count)
    while len(indices) < length:
        generator = torch.Generator().manual_seed(stable_hash(seed, "epoch", epoch))
        indices += torch.randperm(count, generator=generator).tolist()[offset:]
        epoch, offset = epoch + 1, 0
    return indices[:length]


def add_lora(model: UnifiedModel, settings: TrainConfig) -> Any:
    """LoRA layers in the language model, everything else frozen; the PeftModel around `model.module`."""
    from peft import LoraConfig, get_peft_model

    prefix = next((name for name, module in model.module.named_modules() if module is model.decoder), None)
    if prefix is None:
        raise OspoError("train: the model's decoder is not a part of its module; the adapter is at fault.")
    names = "|".join(settings.lora_targets)
    lora = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=rf"{prefix.replace('.', chr(92) + '.')}\..*\.({names})" if prefix else rf".*\.({names})",
        bias="none",
    )
    return get_peft_model(model.module, lora)


def build_optimizer(parameters: list[nn.Parameter], settings: TrainConfig) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and its schedule: warm-up, then constant, or a cosine that ends at `min_learning_rate`."""
    from transformers import get_scheduler

    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.betas[0], settings.betas[1]),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    cosine = settings.schedule == "cosine"
    schedule = get_scheduler(
        "cosine_with_min_lr" if cosine else "constant_with_warmup",
        optimizer,
        num_warmup_steps=round(settings.warmup_ratio * settings.steps),
        num_training_steps=settings.steps,
        scheduler_specific_kwargs={"min_lr": settings.min_learning_rate} if cosine else None,
    )
    return optimizer, schedule


class Trainer:
    """One training run in `folder`: adapter, optimizer, schedule and what is needed to go on after a stop."""

    def __init__(self, model: UnifiedModel, examples: list[Example], config: Config, folder: Path) -> None:
        self.model, self.examples, self.config, self.folder = model, examples, config, folder
        self.settings = config.train
        torch.manual_seed(stable_hash(config.seed, "lora") % 2**31)
        self.peft = add_lora(model, self.settings)
        self.parameters = {name: p for name, p in self.peft.named_parameters() if p.requires_grad}
        self.optimizer, self.schedule = build_optimizer(list(self.parameters.values()), self.settings)
        self.loss = OSPOLoss(loss_config(config.preset, self.settings.loss))
        self.step = 0
        self.best: dict[str, float] = {}
        self.stale = 0
        self.stopped = False

    def train_step(self) -> dict[str, float]:
        """One step of the optimizer over `batch_size` × `accumulation` pairs; the figures of the log line."""
        settings, started = self.settings, time.perf_counter()
        size = settings.batch_size
        start = self.step * size * settings.accumulation
        indices = shuffled_indices(len(self.examples), self.config.seed, start, size * settings.accumulation)
        sums: defaultdict[str, float] = defaultdict(float)
        for part in range(settings.accumulation):
            chosen = [self.examples[i] for i in indices[part * size : (part + 1) * size]]
            batch, masks = make_batch(self.model, chosen, swapped=self.loss.config.cond_weight > 0)
            with _autocast(self.model):
                hidden, masks = self._forward(batch, masks, chosen)
                head: Head | nn.Module = self.model.head
                if settings.guidance_scale != 1:
                    from ospo_fast.ops import Head

                    partners = unconditional_hidden_states(self.model, chosen, batch)
                    hidden, head = Head.of(head).guided(hidden, partners, settings.guidance_scale)
                output = self.loss(hidden, batch.labels, head, object_masks=masks)
            (output.loss / settings.accumulation).backward()
            if masks is not None and settings.masks == "online":
                output.metrics["mask_coverage"] = (masks > 0.5).float().mean()
            # Read once all is under way: each figure waits for the device.
            for name, value in output.metrics.items():
                sums[name] += float(value) / settings.accumulation
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), settings.clip))
        if not torch.isfinite(torch.tensor(norm)):
            raise OspoError(f"train: the gradient of step {self.step + 1} is not finite; lower train.learning_rate.")
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - started
        return {"step": self.step, **sums, "lr": rate, "grad_norm": norm, "seconds": round(seconds, 4)}

    def _forward(self, batch: Batch, masks: Tensor | None, chosen: list[Example]) -> tuple[Tensor, Tensor | None]:
        """Hidden states of the batch and its masks: those given, or the policy's own, from this very forward pass."""
        columns = [example.columns for example in chosen if example.columns is not None]
        if not columns:
            return hidden_states(self.model, batch.embeds), masks
        from ospo_fast.stages.masks import code_embeddings, compute_masks, mask_capture

        pairs, tokens = len(columns), chosen[0].codes.shape[1]
        wanted = columns * 2 + [[]] * (len(batch.lengths) - 2 * pairs)  # swapped rows take the chosen's
        settings = self.config.masks
        with mask_capture(self.model, wanted, batch.lengths, tokens, settings, stop_early=False) as capture:
            hidden = hidden_states(self.model, batch.embeds)
        masks = compute_masks(capture, wanted, settings, code_embeddings(batch, tokens, settings)).weights
        return hidden, masks[: 2 * pairs].float()

    def evaluate(self, evaluation: Evaluation) -> dict[str, float]:
        """The callback's figures; keeps the adapter when they are the best so far, and notes when to stop."""
        self.peft.eval()
        with torch.random.fork_rng():
            figures = evaluation(self.model, self.step)
        self.peft.train()
        metric = self.settings.early_stopping
        if metric is not None:
            if metric not in figures:
                raise OspoError(f"train.early_stopping={metric!r} is no figure of the evaluation: {sorted(figures)}.")
            if not self.best or figures[metric] > self.best["value"]:
                self.best, self.stale = {"step": self.step, "value": figures[metric]}, 0
                self._save_tensors(self.folder / "best.safetensors")
            else:
                self.stale += 1
            self.stopped = self.stale >= self.settings.patience
        return {"step": self.step, **figures}

    def _save_tensors(self, path: Path) -> None:
        from safetensors.torch import save

        write_atomic(path, save({name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}))

    def _load_tensors(self, path: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise OspoError(
                f"Cannot read the checkpoint {path}: {error}; remove its folder to start afresh."
            ) from error
        if {n: t.shape for n, t in tensors.items()} != {n: p.shape for n, p in self.parameters.items()}:
            raise OspoError(f"{path} is of another LoRA configuration; train into another --out, or with --no-resume.")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    def save(self) -> None:
        """A checkpoint of everything that the next step depends on; the one before it is removed afterwards."""
        name = f"step-{self.step:06d}"
        root = self.folder / "checkpoints"
        temporary = root / f".{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            self._save_tensors(temporary / "adapter.safetensors")
            rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
            state = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), "rng": rng}
            torch.save(state, temporary / "state.pt")
            progress = {"step": self.step, "best": self.best, "stale": self.stale, "stopped": self.stopped}
            write_json(temporary / "progress.json", progress | {"digest": self._digest()})
            shutil.rmtree(root / name, ignore_errors=True)
            temporary.rename(root / name)
        except OSError as error:
            raise OspoError(f"Cannot write the checkpoint {root / name}: {error.strerror or error}.") from error
        for older in root.glob("step-*"):
            if older.name != name:
                shutil.rmtree(older, ignore_errors=True)

    def _digest(self) -> str:
        """What must not change between a stop and its resumption."""
        settings = dataclasses.asdict(self.settings)
        for name in ("save_every", "eval_every", "patience", "early_stopping", "gradient_checkpointing"):
            settings.pop(name)
        settings |= mask_settings(self.config)
        items = [example.item_id for example in self.examples]
        return f"{stable_hash(json.dumps(settings), self.config.preset, self.config.seed, *items):x}"

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one; the log loses what was written after it."""
        found = sorted((self.folder / "checkpoints").glob("step-*"))
        if not found:
            return
        path = found[-1]
        try:
            progress = json.loads((path / "progress.json").read_text())
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except (OSError, ValueError, RuntimeError, EOFError) as error:
            raise OspoError(
                f"Cannot read the checkpoint {path}: {error}; remove the folder to start afresh."
            ) from error
        if progress["digest"] != self._digest():
            raise OspoError(
                f"{path} belongs to other settings or other pairs; train into another --out, or with --no-resume."
            )
        self._load_tensors(path / "adapter.safetensors")
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"]["cpu"])
        if state["rng"]["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])
        self.step, self.best = progress["step"], progress["best"]
        self.stale, self.stopped = progress["stale"], progress["stopped"]

    def finish(self, metrics: dict[str, float], left_out: dict[str, str]) -> TrainResult:
        """The best adapter (or the last), saved, then merged into the model, which is the tuned one from then on."""
        best = self.best.get("step", self.step)
        if best != self.step:
            self._load_tensors(self.folder / "best.safetensors")
        self.peft.eval()
        self.peft.save_pretrained(str(self.folder / "adapter"), save_embedding_layers=False)
        self.peft.merge_and_unload()
        self.model.module.requires_grad_(False)
        self.model.save(self.folder / "model")
        done = {"step": self.step, "best_step": best, "digest": self._digest(), "left_out": left_out}
        write_json(self.folder / "done.json", done)
        return TrainResult(self.step, int(best), len(self.examples), metrics, left_out)


def _autocast(model: UnifiedModel) -> AbstractContextManager[Any]:
    if model.device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def _trim_log(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, and a torn one."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        write_atomic(path, "".join(line for line in lines if _step_of(line) <= step).encode())


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return float("inf")


def train(
    records: Iterable[Record],
    model: UnifiedModel,
    config: Config,
    *,
    out: Path,
    evaluation: Evaluation | None = None,
    resume: bool = True,
    progress: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train `model` in place on the pairs of `records`; results lie in `out`/train.

    Writes log.jsonl (a line per step, and per evaluation), checkpoints/, adapter/ (peft), model/ (merged) and, at the
    end, done.json with the pairs that were left out and why (see `load_examples`). Weights are those of the best
    evaluation where `train.early_stopping` names a figure, else the last. bf16 autocast on CUDA, the model's own dtype
    on the CPU.

    Args:
        records: with `chosen` and `rejected`, and `mask_path` where the loss uses masks.
        model: changed in place: afterwards it is the trained model.
        config: sections `train`, `masks.enabled`, `preset`, `seed`.
        out: the run folder.
        evaluation: (model, step) → figures, called before the first step and every `train.eval_every` steps.
        resume: go on from the newest checkpoint.
        progress: called with the number of steps just done.

    Raises:
        OspoError: no pair to train on, a file that cannot be written, a checkpoint that is broken or of another run.

    """
    picked = select_training_pairs(records, config)
    if uses_masks(config) and config.train.masks == "online":
        from ospo_fast.stages.masks import resolve_auto_layers

        config = dataclasses.replace(config, masks=resolve_auto_layers(config.masks, picked, model, out))
    examples, left_out = load_examples(picked, model, config, out)
    if left_out:
        reasons = [f"{item}: {reason}" for item, reason in left_out.items()]
        logger.warning("train: %s", some_failed("pairs", reasons, len(examples) + len(left_out)))
    if not examples:
        where = "the warning above" if left_out else "the reasons in select.jsonl"
        raise OspoError(f"train: no pair was left to train on; see {where}.")
    settings, folder = config.train, out / "train"
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    trainer = Trainer(model, examples, config, folder)
    trainer.resume()
    logfile = folder / "log.jsonl"
    _trim_log(logfile, trainer.step or -1)
    metrics: dict[str, float] = {}
    trainer.peft.train()
    module: Any = model.module  # of transformers, which torch's type does not know
    checkpointing = settings.gradient_checkpointing
    if checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    watching = evaluation if settings.eval_every else None
    if watching is not None and trainer.step == 0:
        append_line(logfile, trainer.evaluate(watching))
    while trainer.step < settings.steps and not trainer.stopped:
        metrics = trainer.train_step()
        append_line(logfile, metrics)
        last = trainer.step == settings.steps
        if watching is not None and (trainer.step % settings.eval_every == 0 or last):
            append_line(logfile, trainer.evaluate(watching))
        if trainer.step % settings.save_every == 0 or last or trainer.stopped:
            trainer.save()
        if progress is not None:
            progress(1)
    if checkpointing:
        module.gradient_checkpointing_disable()
    return trainer.finish(metrics, left_out)


def run(
    records: Iterable[Record],
    model: UnifiedModel,
    config: Config,
    *,
    out: Path | None = None,
    context: StageContext | None = None,
) -> Iterator[Record]:
    """Train on the records and yield nothing; see `train`.

    `context.report` counts the steps of this call, and afterwards holds the steps of the run and the pairs that failed.
    """
    if out is None:
        raise OspoError("train: got no run folder; give `out`, where the weights go.")
    context = StageContext() if context is None else context

    def advance(steps: int) -> None:
        context.report.items += steps
        if context.progress is not None:
            context.progress(steps)

    result = train(
        records,
        model,
        config,
        out=out,
        evaluation=context.evaluation,
        resume=context.resume,
        progress=advance,
    )
    context.report.total, context.report.failed = result.steps, len(result.left_out)
    yield from ()


def failure(record: Record) -> Failure | None:
    """Return None: the pairs that failed are in the report of the stage."""
    return None
