"""Trainings of a process, alone or one of several that torch.distributed.run started: `python train_worker.py JOBS`.

JOBS is a JSON file: where the model and the run folder to copy are, and rounds of trainings. test_train_distributed.py
writes it, and also calls `run_job` itself, for one process.
"""

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ospo_fast.config import load_config
from ospo_fast.errors import OspoError
from ospo_fast.models import load_model
from ospo_fast.pipeline import read_stage
from ospo_fast.stages import StageContext
from ospo_fast.stages import train as train_module
from ospo_fast.stages.extension import begin_extension

SMALL = ["train.steps=6", "train.batch_size=2", "train.save_every=2", "train.lora_rank=4", "train.lora_alpha=8"]
SMALL += ["train.accumulation=2", "train.learning_rate=1e-3", "masks.layers=[0]", "preset=full"]
ALIGNMENT = (0.1, 0.2, 0.3, 0.6, 0.4, 0.5, 0.5)


def poisoned(pair_id):
    """Return `make_batch`, whose embeddings are NaN where they are of this pair."""
    real = train_module.make_batch

    def make_batch(model, examples, **options):
        batch, masks = real(model, examples, **options)
        if any(example.pair_id == pair_id for example in examples):
            batch = dataclasses.replace(batch, embeds=batch.embeds * float("nan"))
        return batch, masks

    return make_batch


def run_job(job, tiny, made, rank):
    """Train; return what the process saw: calls of the evaluation, and a digest of the model or the error."""
    out = Path(job["out"])
    settings, work = load_config([*SMALL, *job["settings"]]), None
    if rank == 0 and not out.exists():
        shutil.copytree(job.get("extends", made), out)
    if "extends" in job:
        work = out / ".restart.train"
        if rank == 0:
            begin_extension(work, out / "train", settings.train, [])
    if dist.is_initialized():
        dist.barrier()
    done, evaluated = [], []

    def progress(steps):
        done.append(steps)
        if len(done) == job.get("stop"):
            raise KeyboardInterrupt
        if len(done) == job.get("kill") and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def evaluation(model, step):
        evaluated.append(step)
        if step == job.get("broken"):
            raise OspoError("no evaluation today")
        with torch.no_grad():  # the model has the weights of this step
            model.decoder(inputs_embeds=model.embed_tokens(model.image_prompt("a red circle"))[None])
        return {"alignment": ALIGNMENT[step]}

    # In float64, so that sums in another order differ by far less than another computation would.
    model = load_model(tiny, dtype="float64")
    real = train_module.make_batch
    if "poison" in job:
        train_module.make_batch = poisoned(job["poison"])
    try:
        context = StageContext(progress=progress, evaluation=evaluation, writes=work)
        train_module.train(read_stage(out, "masks"), model, settings, out=out, context=context)
    except KeyboardInterrupt:
        return {"stopped": len(done)}
    except OspoError as error:
        return {"error": str(error), "kind": type(error).__name__}
    finally:
        train_module.make_batch = real
    total = sum(float(p.double().abs().sum()) for p in model.module.parameters())
    return {"evaluated": evaluated, "weights": total, "steps": len(done), "kept": context.report.kept}


def main(path):
    """Run rounds of jobs, each by the first `processes` of the processes, which are a group for a round."""
    given, rank = json.loads(Path(path).read_text()), int(os.environ["RANK"])
    torch.set_num_threads(1)
    for number, (processes, jobs) in enumerate(given["rounds"]):
        if rank >= processes:
            continue  # it waits for the others where the next round begins
        store = f"file://{path}.{number}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
        for job in jobs:
            seen = run_job(job, given["tiny"], given["made"], rank)
            Path(f"{job['out']}.{processes}.{rank}.json").write_text(json.dumps(seen))
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
