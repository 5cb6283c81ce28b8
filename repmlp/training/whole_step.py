"""A step of training as one function of a batch, which a GPU replays as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Step = Callable[[], Tensor]


class WholeStep:
    """Forward, loss, backward, clipping and the optimiser's update as one function of a batch.

    Launched one by one, the thousand operations of a step take a CPU longer than a GPU needs for them; a captured step
    is one launch. The first WARM_UP steps are done one by one, then the step is captured once and replayed from then
    on; every call is a step of training. What reads the batch from the host (mixup's draws) has to stand before it.

    loss: gives the loss of a batch's tensors, under the caller's autocast. optimizer: its learning rates, floats that a
    schedule sets, are copied into tensors before each step, so that state dicts are those of other runs. parameters,
    clip_norm: see torch.nn.utils.clip_grad_norm_; None for no clipping. capture: makes a replay of a function, which
    must not run it; `captured` on an NVIDIA GPU.
    Raises ValueError where a batch has another shape than the first one.
    """

    WARM_UP = 3

    def __init__(
        self,
        loss: Callable[..., Tensor],
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        clip_norm: float | None,
        capture: Callable[[Step], Step],
    ):
        self.loss, self.optimizer, self.parameters, self.clip_norm = loss, optimizer, parameters, clip_norm
        self.capture = capture
        self.rates: list[Tensor] = []  # a learning rate a group of the optimiser
        self.inputs: tuple[Tensor, ...] = ()
        self.calls = 0
        self.replay: Step | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Do a step of training on a batch; returns its loss, overwritten by the next call."""
        if not self.inputs:
            self.inputs = tuple(torch.empty_like(each) for each in inputs)
            device = self.parameters[0].device
            # a fused AdamW reads float32 on a GPU; on a CPU, float64 is what a Python number is
            dtype = torch.float64 if device.type == "cpu" else torch.float32
            self.rates = [torch.empty((), dtype=dtype, device=device) for _ in self.optimizer.param_groups]
        shapes = [[tuple(each.shape) for each in batch] for batch in (inputs, self.inputs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"a batch of shapes {shapes[0]}: a captured step takes batches of {shapes[1]} alone")
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given, non_blocking=True)
        groups = self.optimizer.param_groups
        for rate, group in zip(self.rates, groups, strict=True):
            rate.fill_(group["lr"])
        self.calls += 1
        if self.replay is not None:
            return self.replay()
        capturing = self.calls > self.WARM_UP
        # only while its operations are called; the schedule, and state dicts, have numbers
        kept = [{name: group[name] for name in ("lr", "capturable")} for group in groups]
        for rate, group in zip(self.rates, groups, strict=True):
            group.update(lr=rate, capturable=capturing)
        try:
            if not capturing:
                return aside(self._step, self.rates[0].device)
            self.replay = self.capture(self._step)
        finally:
            for group, values in zip(groups, kept, strict=True):
                group.update(values)
        return self.replay()

    def _step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(*self.inputs)
        with torch.autocast(loss.device.type, enabled=False):
            loss.backward()
            if self.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)
            self.optimizer.step()
        return loss.detach()


def aside(step: Step, device: torch.device) -> Tensor:
    """Do a step on a stream of its own, as torch asks for before a capture; on a CPU just do it."""
    if device.type == "cpu":
        return step()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        out = step()
    torch.cuda.current_stream(device).wait_stream(stream)
    return out


def captured(step: Step) -> Step:
    """Capture a step in a CUDA graph, without doing it; what is returned does it.

    Raises RuntimeError where something in it cannot be captured, e.g. waits for the GPU.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # a loader's threads may use the GPU meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = step()
    except RuntimeError as error:
        message = str(error).split("\n")[0]
        raise RuntimeError(f"the step cannot be captured as a CUDA graph, train without: {message}") from error

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
