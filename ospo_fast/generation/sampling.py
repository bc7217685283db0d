"""Token sampling from logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ospo_fast.errors import UsageError
from ospo_fast.generation.validation import check_number, is_number, is_whole_number
from ospo_fast.ops._chunked_head import logits_logprobs
from ospo_fast.ops.sample_codes import sample_codes_into


@dataclass(frozen=True)
class Sampling:
    """Settings of token sampling, checked at construction; see `ImageGenerator.generate`."""

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    return_logps: bool = False

    def __post_init__(self) -> None:
        # A guided logit u + w·(c − u) of a larger scale may be no number of float32.
        check_number("guidance_scale", self.guidance_scale, "a number from 0 to 1e6; 1 turns guidance off", 1e6)
        limits = "a number from 1e-30 to 1e30, or 0, which takes the most likely token"  # those of `sample_codes`
        check_number("temperature", self.temperature, limits, 1e30)
        if 0 < self.temperature < 1e-30:
            raise UsageError(f"temperature: got {self.temperature!r}, expected {limits}")
        if not is_whole_number(self.top_k) or self.top_k < 0:
            raise UsageError(f"top_k: got {self.top_k!r}, expected an integer >= 0; 0 keeps all tokens")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UsageError(f"top_p: got {self.top_p!r}, expected a number in (0, 1]; 1 keeps all tokens")
        # Numbers of other libraries may compute in the precision of their own.
        for name in ("guidance_scale", "temperature", "top_p"):
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "top_k", int(self.top_k))

    @property
    def branches(self) -> int:
        """Decoder rows per request: with guidance one with the prompt and one without."""
        return 1 if self.guidance_scale == 1 else 2

    def guided(self, logits: Tensor) -> Tensor:
        """Return the guided logits (rows, V) fp32 of logits (branches · rows, V), as `sample_codes` computes them."""
        rows = len(logits) // self.branches
        cond, uncond = logits[:rows].float(), logits[rows:].float()
        return cond if self.branches == 1 else uncond + self.guidance_scale * (cond - uncond)

    def sample_guided(self, logits: Tensor, **vectors: Tensor) -> Tensor:
        """Sample from guided logits (rows, V) fp32 into `vectors`; return the log-probabilities (rows,) of the codes.

        They are those of the distribution that is sampled: with temperature, and renormalized after truncation. Rows of
        invalid logits get NaN.
        """
        temperature, truncated = self.temperature, 0 < self.top_k < logits.shape[1] or self.top_p < 1
        logps = logits.new_empty(len(logits)) if truncated and temperature else None
        sample_codes_into(
            logits,
            guidance_scale=1.0,
            temperature=temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            logps=logps,
            **vectors,
        )
        if logps is not None:
            return logps
        if not temperature:
            return (logits.amax(1) * 0).abs()  # NaN of NaN and of infinity
        return logits_logprobs(logits, vectors["codes"], temperature)

    def sample(self, logits: Tensor, **vectors: Tensor) -> None:
        """Sample from logits (branches · rows, V), branch by branch, into `vectors`; see `sample_codes_into`."""
        rows = len(logits) // self.branches
        sample_codes_into(
            logits[:rows],
            logits[rows:] if self.branches == 2 else None,
            guidance_scale=self.guidance_scale,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            **vectors,
        )
