"""A Mamba-2 token mixer between its two projections: convolution, scan, skip, gate and norm in one operator.

Everything runs block by block of tokens, so that what one step writes is in the cache when the next one reads it. For
the backward it keeps the scan's output and the states at chunk boundaries; the convolution and the gate are computed
again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from patchscale.errors import UserError
from patchscale.ops import chunked
from patchscale.ops.chunks import DEFAULT_CHUNK_SIZE, chunk_bounds, cut, group_and_block, is_stateless, work_dtype
from patchscale.ops.conv import convolve, convolve_backward, gradients_of_window, tokens_before_next, window_of
from patchscale.ops.dispatch import choose_implementation
from patchscale.ops.reference import mix_tokens_reference


def mix_tokens(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    *,
    history: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    suffix: int = 0,
    eps: float = 1e-5,
    final_state: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What a Mamba-2 mixer does between in_proj and out_proj (arXiv 2405.21060, section 7; the norm follows the gate).

    ``x, B, C = split(silu(causal_conv1d(xBC)))``, ``y = ssd_scan(x, softplus(dt + dt_bias), A, B, C, D)``,
    ``rms_norm(y * silu(z)) * norm_weight``. Scan order is left to right, or right to left with ``reverse``; the last
    ``suffix`` tokens come last in both. Decays, states and sums are float32 at least, also under autocast.

    Args:
        projected: (batch, length, 2 d_inner + 2 d_state + heads): z, x, B, C and dt, as in_proj gives them.
        conv_weight: (d_inner + 2 d_state, width), over x, B and C.
        conv_bias: (d_inner + 2 d_state,).
        dt_bias: (heads,), added to dt before softplus.
        A: (heads,), negative decay rates.
        D: (heads,), the skip.
        norm_weight: (d_inner,).
        history: (batch, width - 1, d_inner + 2 d_state), what the convolution meets before the first token, in scan
            order; zeros if None.
        initial_state: (batch, heads, d_inner / heads, d_state); zeros if None.
        reverse: scan right to left.
        suffix: how many trailing tokens are scanned last, left to right.
        eps: added to the mean square.
        final_state: whether the state after the last token is wanted.
        implementation: see :func:`patchscale.ops.dispatch.choose_implementation`.

    Returns:
        (batch, length, d_inner) in the dtype of ``projected``, and the state after the last token, shaped as
        ``initial_state``, float32 at least, or None.

    Raises:
        UserError: shapes that do not fit, or an unknown implementation.
    """
    d_inner, heads = norm_weight.shape[0], A.shape[0]
    if projected.ndim != 3:
        raise UserError(f"projected has shape {tuple(projected.shape)}, expected (batch, length, channels)")
    batch, length, channels = projected.shape
    conv_dim = conv_weight.shape[0]
    d_state = (conv_dim - d_inner) // 2
    if d_inner % heads or channels != d_inner + conv_dim + heads or d_inner + 2 * d_state != conv_dim:
        raise UserError(
            f"projected has {channels} channels, conv_weight {conv_dim}, norm_weight {d_inner} and A {heads}; expected "
            "d_inner + 2 d_state in conv_weight, and d_inner and one a head more in projected"
        )
    expected = {
        "conv_bias": (conv_bias, (conv_dim,)),
        "dt_bias": (dt_bias, (heads,)),
        "D": (D, (heads,)),
        "history": (history, (batch, conv_weight.shape[1] - 1, conv_dim)),
        "initial_state": (initial_state, (batch, heads, d_inner // heads, d_state)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not 0 <= suffix <= length:
        raise UserError(f"suffix is {suffix}, expected 0 to the length, {length}")

    tensors = (projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, history, initial_state)
    sizes = {"headdim": d_inner // heads, "d_state": d_state}
    chosen = choose_implementation(implementation, projected.device, projected.dtype, **sizes).implementation
    if chosen == "triton":
        from patchscale.ops.triton.mixer import mix_tokens as triton_mix

        out, state = triton_mix(*tensors, reverse, suffix, eps, final_state)
    elif chosen == "reference":
        out, state = mix_tokens_reference(*tensors, reverse, suffix, eps)
    else:
        differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        out, state, _, _ = _mix_tokens(*tensors, reverse, suffix, eps, DEFAULT_CHUNK_SIZE, final_state, differentiated)
    return out, state if final_state else None


@torch.library.custom_op("patchscale::mix_tokens", mutates_args=())
def _mix_tokens(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    history: Tensor | None,
    initial_state: Tensor | None,
    reverse: bool,
    suffix: int,
    eps: float,
    chunk_size: int,
    want_final: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out, the final state, and with ``keep`` the scan's output and the states at chunk boundaries (else empty)."""
    batch, length, _ = projected.shape
    sizes = _Sizes(conv_weight, A, norm_weight)
    work = work_dtype(projected)
    plan, groups = cut(projected, sizes.heads, sizes.headdim, reverse, suffix, chunk_size)
    stateless = is_stateless(plan.chunks, initial_state, want_final)
    out = projected.new_empty(batch, length, sizes.d_inner)
    kept_chunks = plan.chunks if keep and not stateless else 0
    final_state, ys, states = (
        projected.new_empty(shape, dtype=work)
        for shape in _kept_shapes(projected, sizes, kept_chunks, want_final, keep)
    )
    with torch.autocast(projected.device.type, enabled=False):
        stream = _Stream(sizes, conv_weight, conv_bias, dt_bias, A, D, norm_weight, eps, work)
        for group in groups:
            z, xBC, dt = sizes.split(projected[group])
            scan = chunked.Scan(stream.step_sizes(dt), stream.A, plan, sizes.headdim, sizes.d_state, stateless)
            if initial_state is not None:
                scan.begin(initial_state[group].to(work))
            before = stream.history(history, group, xBC)
            zs, xBCs, outs = (t.split(plan.block_tokens, 1) for t in (z, xBC, out[group]))
            kept_ys = ys[group].split(plan.block_tokens, 1) if keep else None
            kept_states = states[group].split(plan.block_chunks, 1) if kept_chunks else None
            for i, block in enumerate(plan.blocks):
                window = stream.window(xBCs[block.place], before, block.reverse)
                before = tokens_before_next(xBCs[block.place], before, block.reverse)
                x, B, C = sizes.split_conv(F.silu(stream.convolve(window, block.reverse), inplace=True))
                y = stream.room("y", x.shape[:2]) if kept_ys is None else kept_ys[block.place]
                block_states = None if kept_states is None else kept_states[block.place]
                pass_on = want_final or i + 1 < len(plan.blocks)
                scan.forward(i, x, B, C, y.unflatten(2, sizes.by_head), block_states, pass_on)
                _, gated, scale = stream.gate(y, x, zs[block.place])
                torch.mul(gated.mul_(scale), stream.norm_weight, out=outs[block.place])
            if want_final:
                final_state[group] = scan.final_state()
    return out, final_state, ys, states


class _Sizes:
    """The dimensions of a mixer, and how its channels are divided."""

    def __init__(self, conv_weight: Tensor, A: Tensor, norm_weight: Tensor) -> None:
        self.conv_dim, self.width = conv_weight.shape
        self.d_inner, self.heads = norm_weight.shape[0], A.shape[0]
        self.headdim, self.d_state = self.d_inner // self.heads, (self.conv_dim - self.d_inner) // 2
        self.by_head = self.heads, self.headdim

    def split(self, projected: Tensor) -> tuple[Tensor, ...]:
        """z, xBC and dt."""
        return projected.split([self.d_inner, self.conv_dim, self.heads], dim=-1)

    def split_conv(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x by head, B and C."""
        x, B, C = xBC.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        return x.unflatten(-1, self.by_head), B, C


def _kept_shapes(projected: Tensor, sizes: _Sizes, chunks: int, want_final: bool, keep: bool) -> list[tuple[int, ...]]:
    """Of the final state, of the scan's output and of the states; empty where not wanted."""
    batch, length, _ = projected.shape
    return [
        (batch, sizes.heads, sizes.headdim, sizes.d_state) if want_final else (0,),
        (batch, length, sizes.d_inner) if keep else (0,),
        (batch, chunks, sizes.d_state, sizes.d_inner),
    ]


class _Stream:
    """The parts of a mixer that work on one block of tokens, in the working precision."""

    def __init__(
        self,
        sizes: _Sizes,
        conv_weight: Tensor,
        conv_bias: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        norm_weight: Tensor,
        eps: float,
        work: torch.dtype,
    ) -> None:
        self.sizes, self.eps = sizes, eps
        self.taps = conv_weight.to(work)
        self.flipped_taps = self.taps.flip(1)
        self.conv_bias, self.dt_bias, self.A = conv_bias.to(work), dt_bias.to(work), A.to(work)
        self.norm_weight = norm_weight.to(work)
        self.D = D.to(work)
        self.rooms: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def room(self, name: str, tokens: tuple[int, ...], channels: int | None = None) -> Tensor:
        """(*tokens, d_inner or channels), the same memory whenever asked: what was just in use is in the cache."""
        key = (name, tuple(tokens))
        if key not in self.rooms:
            self.rooms[key] = self.norm_weight.new_empty(*tokens, channels or self.sizes.d_inner)
        return self.rooms[key]

    def step_sizes(self, dt: Tensor) -> Tensor:
        return F.softplus(dt.to(self.A.dtype) + self.dt_bias)

    def history(self, history: Tensor | None, group: slice, xBC: Tensor) -> Tensor:
        if history is None:
            return xBC.new_zeros(xBC.shape[0], self.sizes.width - 1, self.sizes.conv_dim)
        return history[group].to(xBC.dtype)

    def window(self, block: Tensor, before: Tensor, reverse: bool) -> Tensor:
        length = before.shape[1] + block.shape[1]
        return window_of(block, before, reverse, self.room("window", (block.shape[0], length), self.sizes.conv_dim))

    def convolve(self, window: Tensor, reverse: bool) -> Tensor:
        return convolve(window, self.flipped_taps if reverse else self.taps, self.conv_bias)

    def gate(self, y: Tensor, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With the skip y + D x: silu(z), its product with silu(z), and one over that product's root mean square."""
        silu = torch.ops.aten.silu.out(z.to(y.dtype), out=self.room("silu", y.shape[:2]))
        gated = self.room("gated", y.shape[:2])
        torch.addcmul(y.view(x.shape), x, self.D[:, None], out=gated.view(x.shape))
        gated.mul_(silu)
        norm = torch.linalg.vector_norm(gated, dim=-1, keepdim=True)
        return silu, gated, norm.square_().div_(self.sizes.d_inner).add_(self.eps).rsqrt_()

    def gate_backward(self, dout: Tensor, y: Tensor, x: Tensor, z: Tensor, dz: Tensor) -> tuple[Tensor, Tensor]:
        """Write the gradient of z; returns those of y, the skip included, and of norm_weight."""
        silu, gated, scale = self.gate(y, x, z)
        products = torch.mul(dout, gated, out=self.room("products", y.shape[:2])).flatten(0, 1)
        dnorm_weight = torch.mv(products.t(), scale.flatten())
        along = torch.mv(products, self.norm_weight).view(scale.shape).mul_(scale.pow(3)).div_(-self.sizes.d_inner)
        dgated = torch.mul(dout, self.norm_weight, out=products.view(y.shape)).mul_(scale)
        dgated.addcmul_(gated, along)
        skipped = torch.addcmul(y.view(x.shape), x, self.D[:, None], out=gated.view(x.shape)).view(y.shape)
        dsilu = skipped.mul_(dgated)
        dz.copy_(torch.ops.aten.silu_backward.grad_input(dsilu, z.to(dsilu.dtype), grad_input=dsilu))
        return dgated.mul_(silu), dnorm_weight


@_mix_tokens.register_fake
def _(
    projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, history, initial_state,
    reverse, suffix, eps, chunk_size, want_final, keep,
):  # fmt: skip
    sizes, work = _Sizes(conv_weight, A, norm_weight), work_dtype(projected)
    chunks = len(chunk_bounds(projected.shape[1], reverse, suffix, chunk_size))
    kept_chunks = chunks if keep and not is_stateless(chunks, initial_state, want_final) else 0
    kept = [projected.new_empty(s, dtype=work) for s in _kept_shapes(projected, sizes, kept_chunks, want_final, keep)]
    return projected.new_empty(*projected.shape[:2], sizes.d_inner), *kept


@torch.library.custom_op("patchscale::mix_tokens_backward", mutates_args=())
def _mix_tokens_backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    history: Tensor | None,
    initial_state: Tensor | None,
    final_state: Tensor,
    ys: Tensor,
    states: Tensor,
    reverse: bool,
    suffix: int,
    eps: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first nine tensors of the forward, each in its dtype (empty for an absent one)."""
    sizes, work = _Sizes(conv_weight, A, norm_weight), work_dtype(projected)
    plan, groups = cut(projected, sizes.heads, sizes.headdim, reverse, suffix, chunk_size)
    stateless = is_stateless(plan.chunks, initial_state, final_state.ndim > 1)
    dprojected = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=work, device=projected.device)

    dtaps, dconv_bias = zeros(sizes.conv_dim, sizes.width), zeros(sizes.conv_dim)
    ddt_bias, dA = zeros(sizes.heads), zeros(sizes.heads)
    dnorm_weight, dD = zeros(sizes.d_inner), zeros(sizes.d_inner)
    dhistory = zeros(*chunked.gradient_shape(history))
    dinitial = zeros(*chunked.gradient_shape(initial_state))
    with torch.autocast(projected.device.type, enabled=False):
        stream = _Stream(sizes, conv_weight, conv_bias, dt_bias, A, D, norm_weight, eps, work)
        for group in groups:
            z, xBC, dt = sizes.split(projected[group])
            dz, dxBC, ddt = sizes.split(dprojected[group])
            scan = chunked.Scan(stream.step_sizes(dt), stream.A, plan, sizes.headdim, sizes.d_state, stateless)
            scan.begin_backward(None if grad_final is None else grad_final[group].to(work))
            zs, xBCs, dzs, dxBCs = (t.split(plan.block_tokens, 1) for t in (z, xBC, dz, dxBC))
            kept_ys, douts = (t[group].split(plan.block_tokens, 1) for t in (ys, grad_out))
            kept_states = None if stateless else states[group].split(plan.block_chunks, 1)
            befores = [stream.history(history, group, xBC)]
            for block in plan.blocks:
                befores.append(tokens_before_next(xBCs[block.place], befores[-1], block.reverse))
            dafter = torch.zeros_like(
                befores[0], dtype=work
            )  # of a block's last tokens, from the next one's convolution
            next_state = None if grad_final is None else final_state[group].permute(0, 3, 1, 2).flatten(2)
            for i, block in reversed([*enumerate(plan.blocks)]):
                window = stream.window(xBCs[block.place], befores[i], block.reverse)
                pre = stream.convolve(window, block.reverse)
                rooms = [stream.room(name, pre.shape[:2], sizes.conv_dim) for name in ("act", "dact")]
                x, B, C = sizes.split_conv(torch.ops.aten.silu.out(pre, out=rooms[0]))
                y, dout = kept_ys[block.place], douts[block.place].to(work)
                dy, dweight = stream.gate_backward(dout, y, x, zs[block.place], dzs[block.place])
                dnorm_weight += dweight
                dact = rooms[1]
                dx, dB, dC = sizes.split_conv(dact)
                dy, y = dy.view(x.shape), y.unflatten(2, sizes.by_head)
                block_states = None if kept_states is None else kept_states[block.place]
                dB_dC = scan.backward(i, x, B, C, y, dy, block_states, next_state, dx)
                for gradient, value in zip((dB, dC), dB_dC, strict=True):
                    gradient.copy_(value)
                next_state = None if block_states is None else block_states[:, block.in_scan_order[0]]
                dx.addcmul_(dy, stream.D[:, None])
                dD += (
                    torch.mul(dy, x, out=stream.room("silu", dout.shape[:2]).view(x.shape))
                    .flatten(0, 1)
                    .flatten(1)
                    .sum(0)
                )
                dpre = torch.ops.aten.silu_backward.grad_input(dact, pre, grad_input=dact)
                taps = stream.flipped_taps if block.reverse else stream.taps
                dwindow, dblock_taps, dblock_bias = convolve_backward(dpre, window, taps)
                dtaps += dblock_taps.flip(1) if block.reverse else dblock_taps
                dconv_bias += dblock_bias
                dblock, dafter = gradients_of_window(dwindow, dafter, block.reverse)
                dxBCs[block.place].copy_(dblock)
            dsteps, dA_group, dinitial_group = scan.end_backward()
            dA += dA_group
            if history is not None:
                dhistory[group] = dafter
            if initial_state is not None:
                dinitial[group] = dinitial_group
            dsteps *= torch.sigmoid(dt.to(work) + stream.dt_bias)
            ddt_bias += dsteps.sum((0, 1))
            ddt.copy_(dsteps)
    return (
        dprojected,
        dtaps.to(conv_weight.dtype),
        dconv_bias.to(conv_bias.dtype),
        ddt_bias.to(dt_bias.dtype),
        dA.to(A.dtype),
        dD.view(sizes.by_head).sum(1).to(D.dtype),
        dnorm_weight.to(norm_weight.dtype),
        dhistory if history is None else dhistory.to(history.dtype),
        dinitial if initial_state is None else dinitial.to(initial_state.dtype),
    )


@_mix_tokens_backward.register_fake
def _(
    grad_out, grad_final, projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, history, initial_state,
    final_state, ys, states, reverse, suffix, eps, chunk_size,
):  # fmt: skip
    present = projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight
    work = work_dtype(projected)
    return (
        *(t.new_empty(t.shape) for t in present),
        *(
            projected.new_empty(chunked.gradient_shape(t), dtype=work if t is None else t.dtype)
            for t in (history, initial_state)
        ),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.reverse, ctx.suffix, ctx.eps, ctx.chunk_size, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.shape = output[0].shape


def _backward(ctx, grad_out, grad_final, grad_ys, grad_states):
    saved = ctx.saved_tensors
    tensors, kept = saved[:-3], saved[-3:]
    grad_out = tensors[0].new_zeros(ctx.shape) if grad_out is None else grad_out
    grad_final = grad_final if kept[0].ndim > 1 else None
    options = ctx.reverse, ctx.suffix, ctx.eps, ctx.chunk_size
    grads = _mix_tokens_backward(grad_out, grad_final, *tensors, *kept, *options)
    return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), *[None] * 6


_mix_tokens.register_autograd(_backward, setup_context=_setup_context)


def _scan_flops(projected_shape, conv_shape, A_shape, norm_shape, *options) -> tuple[int, int, int]:
    batch, length, _ = projected_shape
    d_inner, heads = norm_shape[0], A_shape[0]
    d_state = (conv_shape[0] - d_inner) // 2
    return chunked.matrix_flops((batch, length, heads, d_inner // heads), d_state, *options)


@register_flop_formula(torch.ops.patchscale.mix_tokens)
def _forward_flops(projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, *args, out_shape=None, **kw) -> int:
    _, initial, reverse, suffix, _, chunk_size, want_final, _ = args
    options = reverse, suffix, chunk_size, initial, want_final
    products, inside, states = _scan_flops(projected, conv_weight, A, norm_weight, *options)
    return products + inside + 2 * states


@register_flop_formula(torch.ops.patchscale.mix_tokens_backward)
def _backward_flops(
    grad_out, grad_final, projected, conv_weight, conv_bias, dt_bias, A, D, norm_weight, *args, out_shape=None, **kw
) -> int:
    _, initial, final, _, _, reverse, suffix, _, chunk_size = args
    options = reverse, suffix, chunk_size, initial, len(final) > 1
    products, inside, states = _scan_flops(projected, conv_weight, A, norm_weight, *options)
    return 3 * products + 2 * inside + 4 * states


def workspace_bytes(
    batch: int,
    length: int,
    d_inner: int,
    heads: int,
    d_state: int,
    itemsize: int,
    backward: bool,
    stateless: bool,
) -> int:
    """Memory that the plain implementation needs while it runs, beside what it is given and gives; within a tenth.

    Args:
        batch: samples.
        length: tokens.
        d_inner: channels of x.
        heads: of the scan.
        d_state: state size.
        itemsize: bytes of a number in the working precision.
        backward: of the backward pass.
        stateless: neither initial nor final states; see :func:`patchscale.ops.chunks.is_stateless`.
    """
    conv_dim = d_inner + 2 * d_state
    size, n = min(DEFAULT_CHUNK_SIZE, length), 0 if stateless else d_state
    samples, chunks = group_and_block(batch, length, d_inner, DEFAULT_CHUNK_SIZE)
    whole = max(0, round(length / size) - 1)
    last = length - size * whole
    # Buffers stay for every length of a block: the usual one, one of what chunks are left, and the last chunk's.
    usual = size * min(chunks, whole)
    blocks = min(length, usual + (size * (whole % chunks) if whole > chunks else 0) + last)
    buffers = 2 * d_inner + d_inner * n // size + 2 * d_state + size  # y, rows of x and of states, B, C and products
    rooms = 2 * d_inner + conv_dim  # silu and gated, and the convolution's window
    passing = conv_dim  # its result
    if backward:
        buffers += 2 * d_inner + d_inner * n // size + n + size + (n + size) ** 2 // size
        rooms += d_inner + 2 * conv_dim  # products, act and dact
        passing += 2 * conv_dim
    decays = 8 * (2 + 3) + 2 * itemsize * backward  # two sums in float64; five factors, and two gradients
    per_token = decays * heads * length + itemsize * ((buffers + rooms) * blocks + passing * max(usual, last))
    return samples * (per_token + itemsize * (1 + 2 * backward) * d_inner * n)
