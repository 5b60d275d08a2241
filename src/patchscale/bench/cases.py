"""What is measured: the cases, their inputs and arithmetic, and this project's way of doing them."""

import functools
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from patchscale.models.block import CONV_WIDTH, Block, Mamba2Mixer
from patchscale.ops import causal_conv1d, ssd_scan
from patchscale.train.device import autocast

OURS = "patchscale"
HEADDIM = D_STATE = 64
EXPAND = 2
# The chunk length whose arithmetic is the scan's bound, whatever chunks an implementation takes.
BOUND_CHUNK = 64
# Of a scan's inputs: as a mixer has them before training, when now and then a head decays by more than exp(-100) in 64
# tokens; or none by more than about exp(-40).
DECAYS = ("fresh", "mild")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One piece of work.

    ``scan`` and ``conv`` see ``tokens`` tokens; ``mixer``, ``block``, ``model`` and ``step`` (a training step with its
    optimiser) see as many patches and a class token.
    """

    subject: str
    training: bool
    tokens: int
    batch: int
    heads: int
    device: str
    dtype: str
    model: str = ""
    checkpointing: bool = False
    decay: str = DECAYS[0]

    @property
    def width(self) -> int:
        return self.heads * HEADDIM // EXPAND

    @property
    def size(self) -> str:
        """What is alike in the cases of one series, beside the number of tokens."""
        if self.model:
            return re.sub(r"_patch\d+", "", self.model)
        if self.subject not in ("scan", "conv"):
            return f"width {self.width}"
        return f"{self.heads} heads" + (f", {self.decay} decay" if self.subject == "scan" else "")

    @property
    def mode(self) -> str:
        passes = "forward + backward" if self.training else "forward"
        what = "training step" if self.subject == "step" else passes
        return what + (", checkpointed" if self.checkpointing else "")

    @property
    def what(self) -> str:
        """All of it in words."""
        return f"{self.subject}, {self.size}, {self.mode}, {self.tokens:,} tokens"

    @property
    def series(self) -> tuple[str, str, str]:
        return self.subject, self.size, self.mode

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    @property
    def autocast(self) -> AbstractContextManager:
        """Of modules; the operators' inputs have the dtype themselves."""
        precision = "bf16-mixed" if self.dtype == "bfloat16" and self.subject not in ("scan", "conv") else "fp32"
        return autocast(self.place, precision)


class Candidate(NamedTuple):
    """One way of doing a case."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    parameters: list[nn.Parameter]
    comparable: Callable[..., Tensor] | None
    """The function in the form in which it equals this project's; None if it is another one."""
    optimizer: torch.optim.Optimizer | None = None


def scan_inputs(case: Case) -> tuple[Tensor, ...]:
    """x, dt, A, B, C as a mixer makes them before training, but for mild decay: the same for every candidate."""
    g = torch.Generator().manual_seed(0)
    shape = case.batch, case.tokens
    x = _random(case, g, *shape, case.heads, HEADDIM)
    B, C = (_random(case, g, *shape, D_STATE) for _ in range(2))
    A = -(1 + 15 * _random(case, g, case.heads, draw=torch.rand))
    step = 0.001 * 100 ** _random(case, g, case.heads, draw=torch.rand)
    if case.decay == "mild":
        A = A.clamp(min=-0.5 / step)
    bias = torch.log(torch.expm1(step))  # the inverse of softplus
    dt = F.softplus(bias + _random(case, g, *shape, case.heads) / 3**0.5)
    dtype = DTYPES[case.dtype]
    return _leaves(case, x.to(dtype), dt, A, B.to(dtype), C.to(dtype))


def conv_inputs(case: Case) -> tuple[Tensor, ...]:
    """x (batch, tokens, channels), weight (channels, width) and bias."""
    g = torch.Generator().manual_seed(0)
    channels = case.heads * HEADDIM + 2 * D_STATE
    x = _random(case, g, case.batch, case.tokens, channels).to(DTYPES[case.dtype])
    weight, bias = torch.randn(channels, CONV_WIDTH, generator=g) / 2, torch.randn(channels, generator=g) / 2
    return _leaves(case, x, weight, bias)


def token_inputs(case: Case) -> tuple[Tensor, ...]:
    """(batch, tokens + 1, width)."""
    g = torch.Generator().manual_seed(0)
    return _leaves(case, _random(case, g, case.batch, case.tokens + 1, case.width))


def image_inputs(case: Case) -> tuple[Tensor, ...]:
    """Images of the model's size, and labels for a training step."""
    g = torch.Generator().manual_seed(0)
    height, width = ours_model(replace(case, device="meta")).patch_embed.img_size
    images = _random(case, g, case.batch, 3, height, width).to(case.device)
    if case.subject != "step":
        return (images,)
    return images, torch.randint(1000, (case.batch,), generator=g).to(case.device)


def ours_mixer(case: Case) -> Mamba2Mixer:
    """This project's mixer, the same weights every time."""
    return made(case, lambda: Mamba2Mixer(case.width, D_STATE, HEADDIM, EXPAND))


def ours_block(case: Case) -> Block:
    """This project's block, the same weights every time."""
    return made(case, lambda: Block(case.width, D_STATE, HEADDIM, EXPAND, reverse=False, drop_path=0.0))


def ours_model(case: Case) -> Any:
    """This project's model, the same weights every time."""
    return made(case, lambda: timm.create_model(case.model))


MODULES: dict[str, Callable[[Case], Any]] = {
    "mixer": ours_mixer,
    "block": ours_block,
    "model": ours_model,
    "step": ours_model,
}


def of_module(case: Case, module: nn.Module, comparable: bool | Callable[..., Tensor] = True) -> Candidate:
    """A module as a candidate: for a step, with its loss and optimiser."""
    module.train(case.training)
    if case.checkpointing:
        module.set_grad_checkpointing(True)  # type: ignore[operator]
    inputs = image_inputs(case) if case.model else token_inputs(case)
    function: Callable[..., Tensor] = module
    optimizer = None
    if case.subject == "step":
        # A rate at which the weights stay what they are, in the arithmetic of any other.
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-8, fused=case.device != "meta")

        def function(images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(module(images).float(), labels)

    equal = comparable if callable(comparable) else (function if comparable else None)
    return Candidate(function, inputs, list(module.parameters()), equal, optimizer)


def ours(case: Case) -> Candidate:
    """This project's way of doing a case."""
    if case.subject == "scan":
        return Candidate(_scan, scan_inputs(case), [], _scan)
    if case.subject == "conv":
        return Candidate(causal_conv1d, conv_inputs(case), [], causal_conv1d)
    return of_module(case, MODULES[case.subject](case))


def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return ssd_scan(x, dt, A, B, C, final_state=False)[0]


def as_call(case: Case, candidate: Candidate) -> Callable[[], Tensor]:
    """What is timed: the forward under inference mode, or forward and backward (and the optimiser's step)."""

    def forward() -> Tensor:
        with torch.inference_mode(), case.autocast:
            return candidate.function(*candidate.inputs)

    def train() -> Tensor:
        y = differentiate(case, candidate, candidate.function, candidate.inputs)
        if candidate.optimizer is not None:
            candidate.optimizer.step()
        forget_gradients(candidate.inputs, candidate.parameters)
        return y.detach()

    return train if case.training else forward


def differentiate(
    case: Case, candidate: Candidate, function: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> Tensor:
    """Forward and backward; gradients are left where autograd leaves them, added to those that are there."""
    with case.autocast:
        y = function(*inputs)
    y.backward(_output_gradient(tuple(y.shape), y.dtype, y.device))
    return y


def forget_gradients(inputs: tuple[Tensor, ...], parameters: list[nn.Parameter]) -> None:
    """Set them to None."""
    for t in (*inputs, *parameters):
        t.grad = None


@functools.cache  # of every shape: to draw one takes a tenth of a mixer's forward and backward
def _output_gradient(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if not shape:
        return torch.ones((), dtype=dtype, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def scan_flops(tokens: int, heads: int, headdim: int = HEADDIM, d_state: int = D_STATE) -> int:
    """FLOPs of one sample's forward scan in chunks of 64: the bound that shares of the peak refer to.

    In a chunk of Q tokens, C B^T once for all heads is 2 Q d_state a token; the masked scores times x are
    2 Q headdim a token and head; reading the state and writing it are 2 headdim d_state each. A multiply-add counts as
    two. A backward pass needs each product's two gradients: twice as much again.
    """
    Q = min(BOUND_CHUNK, tokens)
    return tokens * (2 * Q * d_state + heads * (2 * Q * headdim + 4 * headdim * d_state))


def flops(case: Case) -> int:
    """FLOPs of this project's matrix products in a case, with its backward when training; recomputing does not count.

    Counted from what the modules hold, so that it is the same however they are computed: each weight of a linear layer
    meets each token once, the scan is :func:`scan_flops`. The heading average's own projection is left out.
    """
    passes = 3 if case.training else 1
    if case.subject == "conv":
        return 0
    scan = case.batch * scan_flops(case.tokens, case.heads)
    if case.subject == "scan":
        return passes * scan
    module = MODULES[case.subject](replace(case, device="meta"))
    total = 0
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            tokens = 1 if name == "head" else case.tokens + 1
            total += passes * 2 * case.batch * tokens * layer.weight.numel()
        elif isinstance(layer, nn.Conv2d):  # the patch embedding; an image wants no gradient
            total += (passes - case.training) * 2 * case.batch * case.tokens * layer.weight.numel()
        elif isinstance(layer, Mamba2Mixer):
            total += passes * scan
    return total


def counted_flops(case: Case, make: Callable[[Case], Candidate]) -> int:
    """The same of another candidate, by PyTorch's counter on tensors without data."""
    case = replace(case, device="meta", checkpointing=False)
    candidate = make(case)
    with FlopCounterMode(display=False) as counter:
        if case.training:
            candidate.function(*candidate.inputs).sum().backward()
        else:
            with torch.no_grad():
                candidate.function(*candidate.inputs)
    return counter.get_total_flops()


def bytes_moved(case: Case) -> int | None:
    """The least that an operator moves to and from memory: inputs once, outputs once, and so for the backward."""
    if case.subject not in ("scan", "conv"):
        return None
    inputs = (scan_inputs if case.subject == "scan" else conv_inputs)(replace(case, device="meta"))
    read = sum(t.numel() * t.element_size() for t in inputs)
    written = inputs[0].numel() * inputs[0].element_size()  # y is like x
    backward = read + written + read  # the inputs and y's gradient; then the inputs' gradients
    return read + written + (backward if case.training else 0)


def _leaves(case: Case, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(case.device).requires_grad_(case.training) for t in tensors)


def _random(case: Case, generator: torch.Generator, *shape: int, draw: Callable[..., Tensor] = torch.randn) -> Tensor:
    return torch.empty(shape, device="meta") if case.device == "meta" else draw(*shape, generator=generator)


def made(case: Case, make: Callable[[], Any]) -> Any:
    """A module on the case's device, with the weights that seed 0 gives on a CPU."""
    with torch.random.fork_rng(devices=[]), torch.device("meta" if case.device == "meta" else "cpu"):
        torch.manual_seed(0)
        return make().to(case.device)
