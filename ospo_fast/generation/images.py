"""Images from prompts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ospo_fast.errors import Failure, OspoError, UsageError
from ospo_fast.generation.decoder import Decoder, InferenceDecoder
from ospo_fast.generation.engine import Engine, eval_mode, signature
from ospo_fast.generation.image_writer import ImageWriter
from ospo_fast.generation.module_decoder import ModuleDecoder, warn_of_modules
from ospo_fast.generation.overrides import find_override
from ospo_fast.generation.requests import GenerationError, make_requests, tokenize_prompts
from ospo_fast.generation.sampling import Sampling
from ospo_fast.generation.throughput import Throughput, streamed_bytes
from ospo_fast.generation.validation import check_batch_size, check_choice, check_positive, check_window
from ospo_fast.models.base import UnifiedModel, run_check
from ospo_fast.models.layout import image_layout
from ospo_fast.models.resolve import resolve_model
from ospo_fast.oom import out_of_memory, short
from ospo_fast.packages import required_by


@dataclass(frozen=True)
class GeneratedBatch:
    """Argument of `callback`: the finished images of a batch, and the progress."""

    indices: list[int]  # positions in the output
    codes: Tensor  # (len(indices), T) int64
    done: int
    total: int
    logps: Tensor | None = None  # (len(indices), T) fp32, with `return_logps`


class _OneAtATime:
    """Lock of an object whose calls share buffers: other threads wait, and a call within a call is refused."""

    def __init__(self) -> None:
        self._lock, self._owner = threading.Lock(), 0

    def __reduce__(self) -> tuple[Any, ...]:
        return _OneAtATime, ()  # copies of the object have their own buffers

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise UsageError(
                "generate: called from its own callback, expected one call at a time; use another generator"
            )
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = 0
        self._lock.release()


class ImageGenerator:
    """Image generation with a unified model.

    The codes of an image depend on the model, its prompt, its seed and the sampling settings alone. On one machine they
    are the same in any batch and at any place in it. On a GPU this takes matrix products of one size: batches are
    padded to 96 images, or to `batch_size` if given; with another `batch_size` they may round differently.

    Args:
        model: from `load_model`, or the module of transformers, also inside of a PeftModel.
            Hooks and patched forwards in its decoder and its head take effect. They make generation slower, because its
            modules then run one by one, and codes may round differently in another batch. A warning names the module.
            Which rows a hook sees differs from transformers' `generate`: equal prompts run once, for example.
        processor: the processor of such a module. Without it, which a Janus alone allows, prompts are token ids, and
            `output` is "codes".
        batch_size: images per batch; by default as many as are useful and fit the free memory. A batch that runs out
            of memory is halved and generated again, and later batches are no larger.
        capture: replay the steps from a CUDA graph; False runs them one by one, with the same results.
        jacobi_window: experimental. Codes of an image that one step may generate, 2 or more; 0 for one. The codes stay
            the same (on a GPU up to rounding). It is meant for few images, where a step costs what reading the weights
            costs, and its gain depends on the model (`throughput.codes_per_step`). See
            `ospo_fast.experimental.jacobi` and docs/benchmarks.md for measurements.

    Attributes:
        batch_size, capture, jacobi_window: the arguments; changes apply to the next call.
        throughput: speed of the last call of `generate`; None if it generated nothing.
        failures: of the last call of `generate`: position of each image that failed → why.
        decoder_class: builds the decoder from the model; `ospo_fast.experimental` has another one.

    """

    decoder_class: type[InferenceDecoder] = InferenceDecoder

    def __init__(
        self,
        model: UnifiedModel | nn.Module,
        processor: Any = None,
        *,
        batch_size: int | None = None,
        capture: bool = True,
        jacobi_window: int = 0,
    ) -> None:
        check_batch_size(batch_size)
        check_window(jacobi_window)
        with required_by("ImageGenerator", "transformers", "tqdm"):
            import transformers  # noqa: F401
        self.model = resolve_model(model, processor)
        run_check(self.model, "check_generation")
        self.throughput: Throughput | None = None
        self.failures: dict[int, Failure] = {}
        self.batch_size, self.capture, self.jacobi_window = batch_size, capture, jacobi_window
        self._engine: Engine | None = None
        self._signature: tuple[object, ...] = ()
        self._one_at_a_time = _OneAtATime()
        self._warned = False  # that the modules run as they are

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str | Tensor],
        *,
        seeds: Sequence[int] | Tensor,
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        num_images: int = 1,
        output: str = "pil",
        callback: Callable[[GeneratedBatch], None] | None = None,
        progress: bool = True,
        on_error: str = "raise",
        groups: Sequence[Hashable] | None = None,
        return_logps: bool = False,
    ) -> Any:
        """Generate `num_images` images of each prompt, in input order (all images of the first prompt first).

        Args:
            prompts: texts (the chat template is applied), or token ids (S,) int64 that end in begin-of-image.
            seeds: one integer per image, len(prompts) · num_images of them.
            guidance_scale: w in u + w·(c − u), with logits c under the prompt and u without it. At 1 only c is
                computed.
            temperature: divides the logits, 1e-30 to 1e30; 0 takes the most likely code.
            top_k: keep this many of the most likely codes; 0 keeps all.
            top_p: keep the smallest set of most likely codes with at least this total probability; 1 keeps all.
            num_images: images per prompt.
            output: "pil" (list of images), "codes" ((N, T) int64 tensor on the CPU) or "pt" ((N, 3, H, W) float
                tensor in [0, 1], on the CPU).
            callback: called with a `GeneratedBatch` after each batch. Hooks that it adds take effect in the next call.
            progress: show a bar on stderr if it takes more than two seconds.
            on_error: an image fails by itself if its logits are not finite. "raise": GenerationError once the others
                are finished. "skip": the result is None (−1 in codes, NaN in "pt"), and `failures` holds the reason.
            groups: one value per image. Neighbors of one group, such as the images of an item, share a batch if they
                fit one.
            return_logps: return the log-probabilities of the codes, too: each under the distribution that it was
                sampled from, with guidance, temperature and truncation; 0 for temperature 0. `exact_logprobs` gives the
                same bits where it can, see docs/images.md.

        Returns:
            The images, as `output` says. With `return_logps` a pair of them and log-probabilities (N, T) fp32 on the
            CPU, NaN for images that failed.

        Raises:
            UsageError: an invalid argument; a call from the callback.
            GenerationError: images failed; it carries the finished ones.
            OspoError: guidance has no effect, or one image does not fit the memory.

        """
        from tqdm.auto import tqdm

        sampling = Sampling(guidance_scale, temperature, top_k, top_p, return_logps)
        if return_logps and self.jacobi_window:
            raise UsageError(
                f"return_logps: got True with jacobi_window {self.jacobi_window}, expected 0, because a window samples "
                "codes from logits of other bits; set jacobi_window=0"
            )
        check_choice("output", output, ("pil", "codes", "pt"))
        if output != "codes" and not hasattr(self.model, "decode_codes"):
            raise UsageError(
                f"output: got {output!r}, which needs the image statistics of the processor, expected 'codes'; pass "
                "processor=JanusProcessor.from_pretrained(…) to ImageGenerator, or output='codes'"
            )
        if output != "codes":
            run_check(self.model, "check_pixels")
        check_choice("on_error", on_error, ("raise", "skip"))
        check_positive("num_images", num_images)
        ids = [ids for ids in tokenize_prompts(self.model, prompts) for _ in range(num_images)]
        layout = image_layout(self.model)
        sampled = list(layout.code_positions)
        requests = make_requests(ids, seeds, [layout.tokens] * len(ids))
        total = len(requests)
        if groups is not None and (not isinstance(groups, Sized) or len(groups) != total):
            got = f"{len(groups)} of them" if isinstance(groups, Sized) else repr(groups)
            raise UsageError(f"groups: got {got}, expected {total}, one for each image")
        codes = torch.full((total, layout.codes), -1, dtype=torch.long)
        logps = torch.full((total, layout.codes), torch.nan, dtype=torch.float32) if return_logps else None
        images: dict[int, Any] = {}
        with (
            self._one_at_a_time,
            eval_mode(self.model),
            tqdm(total=total, unit="image", delay=2, disable=not progress) as bar,
            ImageWriter(self.model, lambda index, _, image: images.update({index: image})) as writer,
        ):
            self.throughput, self.failures = None, {}
            speed = Throughput(0, 0.0, 0)
            begin = time.perf_counter()
            for batch, completions in self._current_engine().decode(requests, sampling, groups) if total else ():
                seconds, steps = time.perf_counter() - begin, [completion.steps for completion in completions]
                streamed = streamed_bytes(self.model, [len(r.ids) for r in batch], sampling.branches, steps)
                speed += Throughput(len(batch), seconds, streamed, len(batch) * layout.tokens, sum(steps))
                self.throughput = speed
                finished = []
                for request, completion in zip(batch, completions, strict=True):
                    if isinstance(completion.tokens, Failure):
                        self.failures[request.index] = completion.tokens
                    else:
                        codes[request.index] = completion.tokens[sampled]
                        if logps is not None and completion.logps is not None:
                            logps[request.index] = completion.logps[sampled]
                        finished.append(request.index)
                if output != "codes":
                    writer.take(finished, codes[finished])
                bar.update(len(batch))
                bar.set_postfix_str(speed.bandwidth, refresh=False)
                if callback is not None:
                    own = None if logps is None else logps[finished]
                    callback(GeneratedBatch(finished, codes[finished], speed.images, total, own))
                begin = time.perf_counter()
            failures = self.failures
        results = codes if output == "codes" else _collect_images(images, total, output)
        if failures and on_error == "raise":
            failed = {}
            for n, failure in failures.items():
                prompt = prompts[n // num_images]
                name = repr(prompt[:60]) if isinstance(prompt, str) else f"{len(prompt)} token ids"
                failed[n] = f"image {n} ({name}, seed {requests[n].seed}): {failure}"
            error = GenerationError.from_failures("images", results, failed)
            error.results = results if logps is None else (results, logps)
            raise error
        return results if logps is None else (results, logps)

    def _current_engine(self) -> Engine:
        """The engine, with the weights that the model has now, and the options that the generator has now."""
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "capture": self.capture,
            "jacobi_window": self.jacobi_window,
        }
        override = find_override(self.model)
        if override is not None and not self._warned:
            self._warned = True
            warn_of_modules(override)
        decoder_class: Callable[[UnifiedModel], Decoder] = self.decoder_class if override is None else ModuleDecoder
        found = (*signature(self.model), decoder_class, *options.values())
        if self._engine is not None and self._signature == found:
            self._engine.refresh()
            return self._engine
        self._engine, self._signature = None, found  # the memory of the old one is freed first
        try:
            self._engine = Engine(self.model, decoder=decoder_class(self.model), **options)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise OspoError(
                f"model: {self.model.name} leaves no memory for generation ({short(error)}); "
                "free some, or use a smaller dtype"
            ) from error
        return self._engine


def _collect_images(images: dict[int, Any], count: int, output: str) -> Any:
    """Images in the form `output`, with None or NaN for those that are missing."""
    if output == "pil":
        return [images.get(i) for i in range(count)]
    arrays = {i: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for i, image in images.items()}
    if not arrays:
        return torch.empty(count, 3, 0, 0, dtype=torch.float32, device="cpu")
    blank = torch.full_like(next(iter(arrays.values())), torch.nan)
    return torch.stack([arrays.get(i, blank) for i in range(count)])
