"""Handing tensors to the C++ kernels: what `call.hpp` calls a Call, and the states as it keeps them.

Shapes in comments: b = samples, h = heads, p = headdim, n = d_state. States are (b, panels, n, 64) there: see
`mixer.cpp`.
"""

import ctypes
import functools

import torch
from torch import Tensor

from patchscale.ops.decays import Decays
from patchscale.ops.native import PANEL
from patchscale.ops.native.library import library


class _Rows(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("batch", ctypes.c_int64), ("row", ctypes.c_int64)]


_NUMBERS = (
    "batch", "length", "body", "reverse", "heads", "headdim", "d_state", "taps", "chunks", "longest", "threads",
    "in_bfloat16", "has_initial", "has_final",
)  # fmt: skip


class _Call(ctypes.Structure):
    """Field by field the Call of `call.hpp`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("starts", "numbers")),
        *((name, _Rows) for name in ("x", "B", "C", "z")),
        *((name, ctypes.c_void_p) for name in ("conv_weight", "conv_bias", "history", "D", "norm_weight")),
        *((name, ctypes.c_void_p) for name in ("read", "write_dt", "enter", "enter_rest", "strong", "cs", "dt")),
        *((name, ctypes.c_void_p) for name in ("state", "states")),
        *((name, _Rows) for name in ("y", "out")),
        ("final_state", ctypes.c_void_p),
        *((name, _Rows) for name in ("dout", "dz", "dx", "dB", "dC")),
        *((name, ctypes.c_void_p) for name in ("along_x", "along_y", "along_states")),
        *((name, ctypes.c_void_p) for name in ("strong_ddt", "strong_dlog_decay")),
        *((name, ctypes.c_void_p) for name in ("dconv_weight", "dconv_bias", "dnorm_weight", "dD", "dhistory")),
        ("scratch", ctypes.c_void_p),
    ]


_ARE_ROWS = {field[0] for field in _Call._fields_ if field[1] is _Rows}


class Kernels:
    """The work on a group of samples, forward or backward."""

    def __init__(self, decays: Decays, headdim: int, d_state: int, taps: int = 0, eps: float = 0.0) -> None:
        """taps: of the convolution, 0 if there is none."""
        self.decays, self.plan = decays, decays.plan
        self.batch, length, self.heads = decays.dt.shape
        self.headdim, self.d_state, self.taps = headdim, d_state, taps
        self.panels = self.heads * headdim // PANEL
        self.threads = torch.get_num_threads()
        self.numbers = {
            "batch": self.batch,
            "length": length,
            "body": self.plan.body,
            "reverse": self.plan.reverse,
            "heads": self.heads,
            "headdim": headdim,
            "d_state": d_state,
            "taps": taps,
            "chunks": self.plan.chunks,
            "longest": self.plan.padded.shape[1],
            "threads": self.threads,
            "eps": eps,
        }
        self.decay_tensors = {
            "starts": self.plan.starts,
            "numbers": self.plan.order,
            "read": decays.read,
            "write_dt": decays.write_dt,
            "enter": decays.enter,
            "enter_rest": decays.enter_rest,
        }
        if decays.strong_in is not None:
            self.decay_tensors |= {"strong": decays.strong_in, "cs": decays.cs, "dt": decays.dt.contiguous()}

    def forward(
        self, initial_state: Tensor | None, want_final: bool, states: Tensor | None, **tensors: Tensor | None
    ) -> Tensor | None:
        """Write the tensors named in `call.hpp`; returns the state after the last token, (b, h, p, n), if wanted.

        initial_state: (b, h, p, n). states: (b, chunks, n, h p), to be kept for the backward, in an order of its own.
        """
        state = self._panels(initial_state)
        self._run(False, initial_state is not None, want_final, state=state, states=states, **tensors)
        if not want_final:
            return None
        return self._entered(self._heads(state), self.plan.chunks)

    def backward(
        self,
        grad_final: Tensor | None,
        final_state: Tensor | None,
        has_initial: bool,
        states: Tensor | None,
        **tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Write the tensors named in `call.hpp`; returns the gradients of dt, A and, (b, h, p, n), the initial state.

        grad_final, final_state: (b, h, p, n), None if nothing depends on the final state. The gradient of the initial
        state means nothing if there is none.
        """
        dstate = self._panels(grad_final)
        along_x, along_y = (self.decays.dt.new_empty(self.decays.dt.shape) for _ in range(2))
        along_states = self.decays.dt.new_zeros(self.batch, self.plan.chunks, self.heads)
        strong = {}
        if self.decays.strong_in is not None:
            strong = {name: torch.empty_like(along_x) for name in ("strong_ddt", "strong_dlog_decay")}
        self._run(
            True,
            has_initial,
            grad_final is not None,
            state=dstate,
            states=states,
            final_state=None if grad_final is None else self._panels(final_state),
            along_x=along_x,
            along_y=along_y,
            along_states=along_states,
            **strong,
            **tensors,
        )
        strong_gradients = []
        for block, heads in zip(self.plan.blocks, self.decays.strong, strict=True):
            if heads is not None:
                ddt, dlog_decay = (gradient[:, block.tokens, heads] for gradient in strong.values())
                strong_gradients.append((block.tokens, heads, ddt, dlog_decay))
        ddt, dA = self.decays.gradients(along_x, along_y, along_states, strong_gradients)
        return ddt, dA, self._entered(self._heads(dstate), int(self.plan.order[0]) if self.plan.chunks else 0)

    def by_worker(self, *shape: int) -> Tensor:
        """(threads, *shape), zeros: what every thread adds to, to be summed."""
        return self.decays.dt.new_zeros(self.threads, *shape)

    def _run(self, backward: bool, has_initial: bool, has_final: bool, **tensors: Tensor | None) -> None:
        call = _Call(**self.numbers, has_initial=has_initial, has_final=has_final)
        call.in_bfloat16 = tensors["x"].dtype == torch.bfloat16
        for name, tensor in (self.decay_tensors | tensors).items():
            if tensor is None:
                continue
            if name in _ARE_ROWS:
                assert tensor.numel() == 0 or tensor.stride(2) == 1, name
                setattr(call, name, _Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1)))
            else:
                assert tensor.is_contiguous(), name
                setattr(call, name, tensor.data_ptr())
        scratch = self.decays.dt.new_empty(kernels().patchscale_scratch(ctypes.byref(call), backward))
        call.scratch = scratch.data_ptr()
        (kernels().patchscale_backward if backward else kernels().patchscale_forward)(ctypes.byref(call))

    def _panels(self, state: Tensor | None) -> Tensor:
        """(b, h, p, n) -> (b, panels, n, 64), a copy; zeros for None."""
        if state is None:
            return self.decays.dt.new_zeros(self.batch, self.panels, self.d_state, PANEL)
        panels = state.reshape(self.batch, self.panels, PANEL, self.d_state).transpose(2, 3)
        return panels.to(self.decays.dt.dtype, copy=True, memory_format=torch.contiguous_format)

    def _heads(self, state: Tensor) -> Tensor:
        return state.transpose(2, 3).reshape(self.batch, self.heads, self.headdim, self.d_state)

    def _entered(self, state: Tensor, number: int) -> Tensor:
        """On its way into a chunk; their number: out of the last."""
        if self.decays.enter is None:
            return state
        for factors in (self.decays.enter, self.decays.enter_rest):
            if factors is not None:
                state = state * factors[:, number, :, None, None]
        return state


@functools.cache
def kernels() -> ctypes.CDLL:
    """The library with its functions' types."""
    loaded = library()
    loaded.patchscale_scratch.restype = loaded.patchscale_call_bytes.restype = ctypes.c_int64
    loaded.patchscale_scratch.argtypes = [ctypes.POINTER(_Call), ctypes.c_int64]
    for function in (loaded.patchscale_forward, loaded.patchscale_backward):
        function.argtypes, function.restype = [ctypes.POINTER(_Call)], None
    assert loaded.patchscale_call_bytes() == ctypes.sizeof(_Call)
    return loaded
