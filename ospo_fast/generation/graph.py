"""CUDA graphs of steps that keep all their state on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ospo_fast.generation.decoder import InferenceDecoder
from ospo_fast.ops import _dispatch


def capturable(decoder: InferenceDecoder) -> bool:
    """Whether steps of a decoder can be captured: on a CUDA device, and nothing in them looks at it from the host.

    The twin of the attention looks at lengths, and modules that are called may do anything.
    """
    kind = decoder.device.type
    return kind == "cuda" and decoder.plain and _dispatch.resolve("decode_attention", "auto", kind) != "torch"


def captured(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph:
    """The graph of a step that has run before, which warmed up what it needs."""
    graph = torch.cuda.CUDAGraph()
    # Other threads decode and write finished images meanwhile.
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"),
    ):
        step()
    return graph


class GraphRunner:
    """Runs a step: the first time as it is, then from a graph that is captured once; always as it is without `capture`.

    The step comes with each call: held here, it would keep alive what it belongs to.
    """

    def __init__(self, device: torch.device, capture: bool) -> None:
        self.capture = capture
        self.graph: torch.cuda.CUDAGraph | None = None
        self._device, self._warm = device, False

    def __call__(self, step: Callable[[], None]) -> None:
        """Run the step, which is the same one at every call."""
        if self.capture and self._warm and self.graph is None:
            self.graph = captured(step, self._device)
        if self.graph is not None:
            self.graph.replay()
        else:
            step()
            self._warm = True


@functools.cache  # every stream gets workspaces that stay
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One that no other thread gets: streams come from pools, one for each priority, and others take the usual one."""
    return torch.cuda.Stream(device, priority=-1)
