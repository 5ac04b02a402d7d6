"""The passes of a training step, recorded once as a CUDA graph and replayed: one launch in the place of a thousand.

Where kernels are short the host, which launches them one by one, is what a step waits for. A graph has it launch all of
them at once. What it records are addresses: inputs, gradients and the loss stay where they were.
"""

import gc
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

# Steps, or passes of micro-batches, that run as they are before the graph is recorded: the first compiles kernels, the
# next ones let allocator and optimiser settle. They count for the training like all others.
EAGER_STEPS = 3

Result = TypeVar("Result")


class GraphCaptureFailed(RuntimeError):
    """CUDA refused to record a training step. The process is best left: its CUDA state may be damaged."""

    row = ""  # of the cell of a reproduction, where there is one


def record(
    function: Callable[[], Result], device: torch.device, stream: torch.cuda.Stream | None
) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The work that ``function`` launches, as a graph, and what it returns; nothing of it is computed yet.

    Args:
        function: it has run on this stream before, so that nothing is left to be compiled.
        device: where it works.
        stream: that it is recorded on.

    Raises:
        GraphCaptureFailed: it does what cannot be recorded, such as waiting for the device.
    """
    gc.collect()  # what autograd still has of an earlier step, in cycles, belongs to memory outside the graph
    graph = torch.cuda.CUDAGraph()
    try:
        torch.cuda.synchronize(device)
        # Other threads, such as the one that pins memory for the next batches, go on meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = function()
    except RuntimeError as error:
        # Ending a recording that was broken off fails too: what broke it is the error before.
        first = error.__context__ or error
        raise GraphCaptureFailed(" ".join(str(first).split())) from error
    return graph, result


class Recorder(Protocol):
    """What runs a function now, and records one to do its work again later."""

    def eagerly(self, function: Callable[[], Tensor]) -> Tensor:
        """Runs it as it is."""

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        """Records it; the tensor that it returns, and those it leaves behind, are filled by :meth:`replay`."""

    def replay(self) -> None:
        """Does the work that was recorded, on what its inputs hold now."""


class CudaRecorder:
    """A :class:`Recorder` by a CUDA graph.

    Everything is launched on one stream: autograd remembers on which one a gradient was first accumulated, and has it
    waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def eagerly(self, function: Callable[[], Tensor]) -> Tensor:
        # Each waits for the other, so that memory may be given back on either side.
        around = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(around)
        with torch.cuda.stream(self.stream):
            result = function()
        around.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Tensor]) -> Tensor:
        self.graph, result = record(function, self.device, self.stream)
        return result

    def replay(self) -> None:
        assert self.graph is not None
        self.graph.replay()


def recorder_for(device: torch.device) -> Recorder | None:
    """None, said once, where there are no CUDA graphs."""
    if device.type == "cuda":
        return CudaRecorder(device)
    _warn_of_no_graphs(device.type)
    return None


@cache  # once for each kind of device
def _warn_of_no_graphs(device: str) -> None:
    warnings.warn(f"training.cuda_graphs: no effect on the device {device}: steps run as they are", stacklevel=2)


class RecordedPasses:
    """Forward and backward pass of micro-batches: as they are at first, then recorded, from then on replayed.

    Called with the inputs of a micro-batch it adds its gradients to the parameters' ``.grad`` (None: there are none so
    far) and returns its loss, as ``passes`` does. Micro-batches unlike the first one in the names, shapes or types of
    their inputs always run as they are.

    After a replay ``.grad`` is memory of the graph's, which the next one overwrites.

    Args:
        passes: of inputs; it calls backward() and returns the loss without its graph. All it does is done on the
            device; contexts such as autocast begin and end in it, so that weights cast in one step are not those of
            another. Named numbers such as the number of labels are inputs too: a Python number would be recorded.
        parameters: whose gradients it computes.
        recorder: by which.
    """

    def __init__(
        self,
        passes: Callable[[dict[str, Tensor]], Tensor],
        parameters: Iterable[nn.Parameter],
        recorder: Recorder,
    ) -> None:
        self.passes, self.recorder = passes, recorder
        self.parameters = [p for p in parameters if p.requires_grad]
        self.eager_left = EAGER_STEPS
        self.inputs: dict[str, Tensor] = {}  # what the graph reads; what it writes:
        self.gradients: list[Tensor | None] = [None] * len(self.parameters)
        self.loss: Tensor | None = None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss of a micro-batch, which is the caller's.

        Raises:
            GraphCaptureFailed: CUDA refuses to record it.
        """
        if not self.inputs:
            self.inputs = {name: torch.empty_like(x) for name, x in inputs.items()}
        if not self._like_the_first(inputs):
            return self.recorder.eagerly(lambda: self.passes(dict(inputs)))
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        if self.eager_left:
            self.eager_left -= 1
            return self.recorder.eagerly(self._passes)
        earlier = self._earlier_gradients()
        if self.loss is None:
            self.loss = self._record()
        self.recorder.replay()
        self._add_to(earlier)
        return self.loss.clone()

    def _passes(self) -> Tensor:
        return self.passes(dict(self.inputs))

    def _like_the_first(self, inputs: Mapping[str, Tensor]) -> bool:
        return inputs.keys() == self.inputs.keys() and all(
            (x.shape, x.dtype) == (self.inputs[name].shape, self.inputs[name].dtype) for name, x in inputs.items()
        )

    def _record(self) -> Tensor:
        for p in self.parameters:
            p.grad = None  # so that gradients are written, not added up, into memory of the graph's
        loss = self.recorder.record(self._passes)
        self.gradients = [p.grad for p in self.parameters]
        return loss

    def _earlier_gradients(self) -> list[Tensor | None]:
        """Those of the step's micro-batches before this one, where the graph will not overwrite them."""
        earlier = [p.grad for p in self.parameters]
        ours = [n for n, (x, y) in enumerate(zip(earlier, self.gradients, strict=True)) if x is not None and x is y]
        if ours:
            sources = [x for n in ours if (x := self.gradients[n]) is not None]
            copies = [torch.empty_like(x) for x in sources]
            torch._foreach_copy_(copies, sources)
            for n, copy in zip(ours, copies, strict=True):
                earlier[n] = copy
        return earlier

    def _add_to(self, earlier: list[Tensor | None]) -> None:
        """Makes ``.grad`` of the gradients that the graph has written and of earlier ones."""
        sums, added = [], []
        for p, before, new in zip(self.parameters, earlier, self.gradients, strict=True):
            p.grad = new if before is None else before
            if before is not None and new is not None:
                sums.append(before)
                added.append(new)
        if sums:
            torch._foreach_add_(sums, added)
