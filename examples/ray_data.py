"""Images of many prompts with Ray Data: `map_batches` with actors that hold an `ImageGenerator`.

An image depends on its prompt and its seed alone, so that the results are the same for any number of actors and blocks.
The output is Parquet files with a row per image: index, prompt, seed, codes and png. Needs `pip install 'ray[data]'`.

    python examples/ray_data.py --prompts prompts.txt --out images --actors 8 --gpus-per-actor 1
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ospo_fast as of


class Generate:
    """Actor: generate the images of a batch of rows that have a prompt and a seed.

    Args:
        model: an embedded model, a folder or a hub name. Each actor loads it once.
        batch_size: images at once. On a GPU codes may round differently with another one, so all actors have the same.
        sampling: arguments of `ImageGenerator.generate`, such as guidance_scale.

    """

    def __init__(self, model: str, batch_size: int, **sampling: Any) -> None:
        self.model, self.sampling = of.load_model(model), sampling
        self.generator = of.ImageGenerator(self.model, batch_size=batch_size)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Add `codes` (N, T) int64 and `png`, a list of N files, to the columns of a batch."""
        prompts, seeds = batch["prompt"].tolist(), batch["seed"].tolist()
        codes = self.generator.generate(prompts, seeds=seeds, output="codes", progress=False, **self.sampling)
        return {**batch, "codes": codes.numpy(), "png": [encode(image) for image in self.model.decode_codes(codes)]}


def encode(image: Any) -> bytes:
    """Return an image as PNG."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def build_rows(prompts: Sequence[str], num: int, seed: int) -> list[dict[str, Any]]:
    """Return a row for each of `num` images of each prompt; image n of every prompt has seed `seed` + n."""
    rows = [{"prompt": prompt, "seed": seed + n} for prompt in prompts for n in range(num)]
    return [{"index": index, **row} for index, row in enumerate(rows)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the images of a file of prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="a text file, one prompt per line")
    parser.add_argument("--out", required=True, help="folder of the Parquet files; with several nodes a shared one")
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--num", type=int, default=1, help="images of each prompt")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus-per-actor", type=float, default=0)
    args = parser.parse_args(arguments)
    import ray

    prompts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = build_rows(prompts, args.num, args.seed)
    images = ray.data.from_items(rows).map_batches(
        Generate,
        fn_constructor_args=(args.model, args.batch_size),
        fn_constructor_kwargs={"guidance_scale": args.guidance_scale},
        batch_size=args.batch_size,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        num_gpus=args.gpus_per_actor,
    )
    images.write_parquet(args.out)


if __name__ == "__main__":
    main()
