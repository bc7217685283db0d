"""CUDA graphs of decoding steps."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ospo_fast.generation.decoder import Decoder
from ospo_fast.ops import _dispatch


def capturable(decoder: Decoder) -> bool:
    """Return whether steps can be captured: on a CUDA device, with no host synchronization in them.

    The reference of `decode_attention` reads lengths on the host, and modules with adapters or hooks may synchronize.
    """
    kind = decoder.device.type
    return kind == "cuda" and decoder.plain and _dispatch.resolve("decode_attention", "auto", kind) != "torch"


def capture_graph(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """Capture a step that has run before, so that its kernels are compiled and its workspaces allocated."""
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads decode and write finished images during the capture.
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"),
    ):
        step()
    return graph


class GraphRunner:
    """Run `step` eagerly once, then capture and replay a CUDA graph. Without `capture` every run is eager.

    `step` is a call argument so that this object keeps no reference to its owner.
    """

    def __init__(self, device: torch.device, capture: bool) -> None:
        self.capture = capture
        self.graph: torch.cuda.CUDAGraph | None = None
        self._device = device

    def __call__(self, step: Callable[[], None]) -> None:
        """Run the step, the same one in every call."""
        if self.graph is not None:
            self.graph.replay()
            return
        step()
        if self.capture:
            self.graph = capture_graph(step, self._device)


@functools.cache  # a stream keeps its workspaces for good
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return a stream for captures alone. Other threads take theirs from the pool of the default priority."""
    return torch.cuda.Stream(device, priority=-1)
