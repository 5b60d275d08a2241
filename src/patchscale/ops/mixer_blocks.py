"""A mixer between its projections in plain PyTorch, block by block of tokens.

What one step writes is in the cache when the next one reads it. For the backward there are the scan's output and the
states at chunk boundaries; the convolution and the gate are computed again.

Shapes in comments: b = samples in the group, h = heads, p = headdim, n = d_state.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchscale.ops import chunked
from patchscale.ops.chunks import Plan, is_stateless, take
from patchscale.ops.conv import convolve, convolve_backward, gradients_of_window, tokens_before_next, window_of
from patchscale.ops.decays import Decays


class Sizes:
    """The dimensions of a mixer, and how its channels are divided."""

    def __init__(self, conv_weight: Tensor, A: Tensor, norm_weight: Tensor) -> None:
        self.conv_dim, self.width = conv_weight.shape
        self.d_inner, self.heads = norm_weight.shape[0], A.shape[0]
        self.headdim, self.d_state = self.d_inner // self.heads, (self.conv_dim - self.d_inner) // 2
        self.by_head = self.heads, self.headdim

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """z, xBC and dt."""
        return projected.split_with_sizes([self.d_inner, self.conv_dim, self.heads], dim=-1)

    def split_conv(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x by head, B and C."""
        x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        return x.unflatten(-1, self.by_head), B, C


class Parameters(NamedTuple):
    """Of the convolution, the scan and the norm, in the working precision."""

    taps: Tensor  # (conv_dim, width)
    conv_bias: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    norm_weight: Tensor
    eps: float


class Gradients(NamedTuple):
    """Of all that a mixer is given but ``projected``; empty for an initial state that there is not."""

    taps: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    norm_weight: Tensor
    history: Tensor
    initial_state: Tensor


def forward(
    sizes: Sizes,
    parameters: Parameters,
    plan: Plan,
    heading: bool,
    projected: Tensor,
    history: Tensor,
    initial_state: Tensor | None,
    out: Tensor,
    final_state: Tensor | None,
    ys: Tensor | None,
    states: Tensor | None,
) -> None:
    """Write out and, where they are wanted, the final state, the scan's output and the states at chunk boundaries.

    projected: (batch, length, channels); with ``heading`` its last token is scanned first, stands accordingly in the
    plan's order, and has no output. history: (batch, width - 1, conv_dim). initial_state, final_state: (batch, h,
    p, n). out: (batch, length, d_inner), less a heading token. ys: (batch, length, d_inner), in the plan's order.
    states: (batch, chunks, n, h p).
    """
    blocks = Blocks(sizes, parameters, plan, heading, is_stateless(plan.chunks, initial_state, final_state is not None))
    with torch.autocast(projected.device.type, enabled=False):
        for group in plan.groups(projected.shape[0]):
            blocks.forward(*take(group, projected, history, initial_state, out, final_state, ys, states))


def backward(
    sizes: Sizes,
    parameters: Parameters,
    plan: Plan,
    heading: bool,
    projected: Tensor,
    history: Tensor,
    initial_state: Tensor | None,
    grad_final: Tensor | None,
    final_state: Tensor | None,
    ys: Tensor,
    states: Tensor | None,
    dout: Tensor,
    dprojected: Tensor,
) -> Gradients:
    """Write dprojected; arguments as above, and grad_final as final_state, None if nothing depends on it.

    final_state: None if it was not wanted. states: None if there are none.
    """
    blocks = Blocks(sizes, parameters, plan, heading, states is None)
    dhistory = torch.empty_like(history, dtype=ys.dtype)
    dinitial = ys.new_empty(chunked.gradient_shape(initial_state))
    *tensors, _ = parameters
    totals = [torch.zeros_like(t) for t in tensors]
    for group in plan.groups(projected.shape[0]):
        given = projected, history, grad_final, final_state, ys, states, dout, dprojected
        with torch.autocast(projected.device.type, enabled=False):
            gradients = blocks.backward(*take(group, *given))
        for total, gradient in zip(totals, gradients, strict=False):
            total += gradient
        dhistory[group] = gradients.history
        if initial_state is not None:
            dinitial[group] = gradients.initial_state
    return Gradients._make([*totals, dhistory, dinitial])


class Blocks:
    """The work on groups of samples, a block of tokens at a time."""

    def __init__(self, sizes: Sizes, parameters: Parameters, plan: Plan, heading: bool, stateless: bool) -> None:
        self.sizes, self.parameters, self.plan, self.stateless = sizes, parameters, plan, stateless
        self.heading = heading
        # How many tokens of a block, as they stand, have an output; and where a heading token stands for the plan.
        first = plan.blocks[0].place if heading else None
        self.tokens_with_output = [size - (place == first) for place, size in enumerate(plan.block_tokens)]
        self.place_of_heading = plan.body - 1 if plan.reverse else 0
        self.flipped_taps = parameters.taps.flip(1)
        self.rooms: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def forward(
        self,
        projected: Tensor,
        history: Tensor,
        initial_state: Tensor | None,
        out: Tensor,
        final_state: Tensor | None,
        ys: Tensor | None,
        states: Tensor | None,
    ) -> None:
        """As the function above, of a group."""
        sizes, plan = self.sizes, self.plan
        z, xBC, dt = sizes.split(projected)
        decays = Decays(F.softplus(self._steps(dt)), self.parameters.A, plan, self.stateless)
        scan = chunked.Scan(decays, sizes.headdim, sizes.d_state)
        if initial_state is not None:
            scan.begin(initial_state)
        zs, xBCs = self._by_block(z), self._by_block(xBC)
        outs = out.split(self.tokens_with_output, 1)
        kept_ys = None if ys is None else ys.split(plan.block_tokens, 1)
        kept_states = None if states is None else states.split(plan.block_chunks, 1)
        befores = self._befores(xBCs, history)
        for i, block in enumerate(plan.blocks):
            window = self._window(xBCs[block.place], befores[i], block.reverse)
            x, B, C = sizes.split_conv(F.silu(self._convolve(window, block.reverse), inplace=True))
            y = self._room("y", x.shape[:2]) if kept_ys is None else kept_ys[block.place]
            block_states = None if kept_states is None else kept_states[block.place]
            pass_on = final_state is not None or i + 1 < len(plan.blocks)
            scan.forward(i, x, B, C, y.unflatten(2, sizes.by_head), block_states, pass_on)
            with_output = self._with_output(i)
            _, gated, scale = self._gate(y[:, with_output], x[:, with_output], zs[block.place])
            torch.mul(gated.mul_(scale), self.parameters.norm_weight, out=outs[block.place])
        if final_state is not None:
            final_state.copy_(scan.final_state())

    def backward(
        self,
        projected: Tensor,
        history: Tensor,
        grad_final: Tensor | None,
        final_state: Tensor | None,
        ys: Tensor,
        states: Tensor | None,
        dout: Tensor,
        dprojected: Tensor,
    ) -> Gradients:
        """As the function above, of a group; its gradient of the initial state means nothing if there was none."""
        sizes, plan, parameters = self.sizes, self.plan, self.parameters
        z, xBC, dt = sizes.split(projected)
        dz, dxBC, ddt = sizes.split(dprojected)
        steps = self._steps(dt)
        decays = Decays(F.softplus(steps), parameters.A, plan, self.stateless)
        scan = chunked.Scan(decays, sizes.headdim, sizes.d_state)
        scan.begin_backward(grad_final)
        zs, xBCs, dzs, dxBCs = (self._by_block(t) for t in (z, xBC, dz, dxBC))
        kept_ys, douts = ys.split(plan.block_tokens, 1), dout.split(self.tokens_with_output, 1)
        kept_states = None if states is None else states.split(plan.block_chunks, 1)
        befores = self._befores(xBCs, history)
        # Of a block's last tokens, from the next one's convolution
        work = decays.dt.dtype
        dafter = torch.zeros_like(history, dtype=work)
        dtaps, dconv_bias, dnorm_weight = (
            torch.zeros_like(t) for t in (parameters.taps, parameters.conv_bias, parameters.norm_weight)
        )
        dD = torch.zeros_like(dnorm_weight)
        next_state = None if final_state is None else final_state.permute(0, 3, 1, 2).flatten(2)
        for i, block in reversed([*enumerate(plan.blocks)]):
            window = self._window(xBCs[block.place], befores[i], block.reverse)
            pre = self._convolve(window, block.reverse)
            act, dact = (self._room(name, pre.shape[:2], sizes.conv_dim) for name in ("act", "dact"))
            x, B, C = sizes.split_conv(torch.ops.aten.silu.out(pre, out=act))
            y, block_dout, with_output = kept_ys[block.place], douts[block.place].to(work), self._with_output(i)
            dy, dweight = self._gate_backward(
                block_dout, y[:, with_output], x[:, with_output], zs[block.place], dzs[block.place]
            )
            dnorm_weight += dweight
            if self.heading and i == 0:  # nothing depends on its output
                dy = F.pad(dy, (0, 0, 0, 1) if block.reverse else (0, 0, 1, 0))
            dx, dB, dC = sizes.split_conv(dact)
            dy, y = dy.view(x.shape), y.unflatten(2, sizes.by_head)
            block_states = None if kept_states is None else kept_states[block.place]
            dB_dC = scan.backward(i, x, B, C, y, dy, block_states, next_state, dx)
            for gradient, value in zip((dB, dC), dB_dC, strict=True):
                gradient.copy_(value)
            next_state = None if block_states is None else block_states[:, block.in_scan_order[0]]
            dx.addcmul_(dy, parameters.D[:, None])
            along_skip = torch.mul(dy, x, out=self._room("silu", x.shape[:2]).view(x.shape))
            dD += along_skip.flatten(0, 1).flatten(1).sum(0)
            dpre = torch.ops.aten.silu_backward.grad_input(dact, pre, grad_input=dact)
            taps = self.flipped_taps if block.reverse else parameters.taps
            dwindow, dblock_taps, dblock_bias = convolve_backward(dpre, window, taps)
            dtaps += dblock_taps.flip(1) if block.reverse else dblock_taps
            dconv_bias += dblock_bias
            dblock, dafter = gradients_of_window(dwindow, dafter, befores[i].shape[1], block.reverse)
            dxBCs[block.place].copy_(dblock)
        dhistory, dheading = dafter.split([history.shape[1], self.heading], 1)
        if self.heading:
            dxBCs[-1].copy_(dheading)
            dzs[-1].zero_()
        gradient, dA, dinitial = scan.end_backward()
        dsteps = gradient.mul_(torch.sigmoid(steps))
        ddt.copy_(self._as_they_stand(dsteps))
        dD = dD.view(sizes.by_head).sum(1)
        return Gradients(dtaps, dconv_bias, dsteps.sum((0, 1)), dA, dD, dnorm_weight, dhistory, dinitial)

    def _steps(self, dt: Tensor) -> Tensor:
        """Before softplus, (b, length, h), in the plan's order."""
        steps = dt.to(self.parameters.dt_bias.dtype) + self.parameters.dt_bias
        if not self.heading:
            return steps
        place = self.place_of_heading
        return torch.cat([steps[:, :place], steps[:, -1:], steps[:, place:-1]], 1)

    def _as_they_stand(self, values: Tensor) -> Tensor:
        """(b, length, h) from the plan's order."""
        if not self.heading:
            return values
        place = self.place_of_heading
        return torch.cat([values[:, :place], values[:, place + 1 :], values[:, place : place + 1]], 1)

    def _by_block(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Those of each block, as blocks stand; then a heading token."""
        return tokens.split([*self.tokens_with_output, *[1] * self.heading], 1)

    def _befores(self, xBCs: tuple[Tensor, ...], history: Tensor) -> list[Tensor]:
        """For each block in scan order, what the convolution meets before its tokens: a heading token, too."""
        reach = history.shape[1]
        befores = [torch.cat([history, xBCs[-1]], 1) if self.heading else history]
        for block in self.plan.blocks[:-1]:
            last = befores[-1][:, befores[-1].shape[1] - reach :]
            befores.append(tokens_before_next(xBCs[block.place], last, block.reverse))
        return befores

    def _with_output(self, i: int) -> slice:
        """The tokens of block i in the plan's order but the heading token."""
        if not self.heading or i:
            return slice(None)
        return slice(-1) if self.plan.blocks[0].reverse else slice(1, None)

    def _room(self, name: str, tokens: tuple[int, ...], channels: int | None = None) -> Tensor:
        """(*tokens, d_inner or channels), the same memory whenever asked: what was just in use is in the cache."""
        key = (name, tuple(tokens))
        if key not in self.rooms:
            self.rooms[key] = self.parameters.norm_weight.new_empty(*tokens, channels or self.sizes.d_inner)
        return self.rooms[key]

    def _window(self, block: Tensor, before: Tensor, reverse: bool) -> Tensor:
        length = before.shape[1] + block.shape[1]
        return window_of(block, before, reverse, self._room("window", (block.shape[0], length), self.sizes.conv_dim))

    def _convolve(self, window: Tensor, reverse: bool) -> Tensor:
        return convolve(window, self.flipped_taps if reverse else self.parameters.taps, self.parameters.conv_bias)

    def _gate(self, y: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With the skip y + D x: silu(z), its product with silu(z), and one over that product's root mean square."""
        silu = torch.ops.aten.silu.out(z.to(y.dtype), out=self._room("silu", y.shape[:2]))
        gated = self._room("gated", y.shape[:2])
        torch.addcmul(y.view(x.shape), x, self.parameters.D[:, None], out=gated.view(x.shape))
        gated.mul_(silu)
        norm = torch.linalg.vector_norm(gated, dim=-1, keepdim=True)
        return silu, gated, norm.square_().div_(self.sizes.d_inner).add_(self.parameters.eps).rsqrt_()

    def _gate_backward(self, dout: Tensor, y: Tensor, x: Tensor, z: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
        """Write the gradient of z; returns those of y, the skip included, and of norm_weight."""
        norm_weight = self.parameters.norm_weight
        silu, gated, scale = self._gate(y, x, z)
        products = torch.mul(dout, gated, out=self._room("products", y.shape[:2])).flatten(0, 1)
        dnorm_weight = torch.mv(products.t(), scale.flatten())
        along = torch.mv(products, norm_weight).view(scale.shape).mul_(scale.pow(3)).div_(-self.sizes.d_inner)
        dgated = torch.mul(dout, norm_weight, out=products.view(y.shape)).mul_(scale)
        dgated.addcmul_(gated, along)
        skipped = torch.addcmul(y.view(x.shape), x, self.parameters.D[:, None], out=gated.view(x.shape)).view(y.shape)
        dsilu = skipped.mul_(dgated)
        dz.copy_(torch.ops.aten.silu_backward.grad_input(dsilu, z.to(dsilu.dtype), grad_input=dsilu))
        return dgated.mul_(silu), dnorm_weight
