"""The peers' ways of doing the same work. Each is imported when it is used, and left out where it cannot run."""

import functools
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block as VitBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchscale.bench.cases import (
    D_STATE,
    DTYPES,
    EXPAND,
    HEADDIM,
    MODULES,
    OURS,
    Candidate,
    Case,
    conv_inputs,
    made,
    of_module,
    ours,
    ours_block,
    ours_mixer,
    ours_model,
    scan_inputs,
)
from patchscale.bench.measure import Failed
from patchscale.errors import first_line
from patchscale.models.block import CONV_WIDTH, NORM_EPS, Mamba2Mixer
from patchscale.ops import native
from patchscale.ops.dispatch import ENVIRONMENT_VARIABLE
from patchscale.ops.linear import Linear, convert_linear, mkl_is_slow

# The chunk length that transformers and the published code use by default.
_THEIR_CHUNK = 256


class Peer(NamedTuple):
    """Whom this project is measured against."""

    module: str
    """What is imported."""
    install: str
    gpu_only: bool
    makes: dict[str, Callable[[Case], Candidate]]
    """How, for each subject that it can do."""
    remark: str
    """What a reader of the figures has to know."""


def missing(name: str, device: torch.device) -> str | None:
    """Why a peer cannot run here, in a few words; None if nothing speaks against it."""
    peer = PEERS[name]
    if peer.gpu_only and device.type != "cuda":
        return f"runs on an NVIDIA GPU alone, not on {device.type}"
    if importlib.util.find_spec(peer.module) is None:
        return f"{peer.module} is not installed ({peer.install})"
    return None


def candidate(name: str, case: Case) -> Candidate:
    """A peer's way of doing a case, or this project's.

    Raises:
        Failed: it cannot be imported.
    """
    return ours(case) if name == OURS else PEERS[name].makes[case.subject](case)


# transformers: plain PyTorch in chunks of 256.


@functools.cache
def _transformers() -> Any:
    try:
        from transformers.models.mamba2 import modeling_mamba2
        from transformers.utils import logging
    except Exception as e:
        raise Failed(f"cannot be imported: {first_line(e)}") from e
    logging.set_verbosity_error()
    return modeling_mamba2


def _transformers_scan(case: Case) -> Candidate:
    scan = _transformers().mamba2_chunk_scan

    def function(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return scan(x, dt, A, B[:, :, None], C[:, :, None], chunk_size=_THEIR_CHUNK)

    return Candidate(function, scan_inputs(case), [], function)


def _transformers_conv(case: Case) -> Candidate:
    conv = _transformers().causal_conv1d_fn

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv(x.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)

    return Candidate(function, conv_inputs(case), [], function)


def _transformers_mixer(case: Case) -> Candidate:
    from transformers.models.mamba2 import Mamba2Config

    config = Mamba2Config(
        hidden_size=case.width,
        num_heads=case.heads,
        head_dim=HEADDIM,
        state_size=D_STATE,
        expand=EXPAND,
        conv_kernel=CONV_WIDTH,
        n_groups=1,
        num_hidden_layers=1,
        layer_norm_epsilon=NORM_EPS,
    )
    mixer = _transformers().Mamba2Mixer(config, layer_idx=0).to(case.device)
    mixer.load_state_dict(ours_mixer(case).state_dict())
    # It has no heading average: the functions are equal once it is put in front.
    return of_module(case, mixer, lambda u: mixer(torch.cat([u.mean(1, keepdim=True), u], 1))[:, 1:])


# vit: attention of equal width, its linear layers computed as this project's.


def _vit_block(case: Case) -> Candidate:
    block = made(case, lambda: VitBlock(case.width, case.width // HEADDIM, mlp_ratio=4.0, qkv_bias=True))
    return of_module(case, convert_linear(block), comparable=False)


def _deit(case: Case) -> Candidate:
    model = ours_model(case)
    vit = made(
        case,
        lambda: VisionTransformer(
            img_size=model.patch_embed.img_size,
            patch_size=model.patch_embed.patch_size,
            embed_dim=model.embed_dim,
            depth=len(model.layers),
            num_heads=model.embed_dim // HEADDIM,
        ),
    )
    return of_module(case, convert_linear(vit), comparable=False)


# native, default-linear, compiled, graphed, float8, products-kept: this project's own other forms.


def _native(case: Case) -> Candidate:
    if case.checkpointing:
        raise Failed("what is recomputed in the backward is not measured")
    sizes = {"d_state": D_STATE} | ({} if case.subject == "scan" else {"taps": CONV_WIDTH})
    obstacle = native.available(case.place) or native.unfit(DTYPES[case.dtype], sizes)
    if obstacle:
        raise Failed(obstacle)
    candidate = ours(case)

    def natively(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            before = os.environ.get(ENVIRONMENT_VARIABLE, "")
            os.environ[ENVIRONMENT_VARIABLE] = "native"
            try:
                return function(*inputs)
            finally:
                os.environ[ENVIRONMENT_VARIABLE] = before

        return run

    comparable = None if candidate.comparable is None else natively(candidate.comparable)
    return candidate._replace(function=natively(candidate.function), comparable=comparable)


def _default_linear(case: Case) -> Candidate:
    if case.device != "cpu" or case.dtype != "float32" or not mkl_is_slow():
        raise Failed("PyTorch's default is what this project takes here")
    module = MODULES[case.subject](case)
    for layer in module.modules():
        if type(layer) is Linear:
            layer.__class__ = nn.Linear  # type: ignore[assignment]
    return of_module(case, module)


def _compiled(case: Case, mode: str | None = None) -> Candidate:
    return of_module(case, _compile(case, MODULES[case.subject](case), mode))


def _compile(case: Case, module: nn.Module, mode: str | None = None) -> nn.Module:
    torch._dynamo.reset()  # else it makes sizes dynamic, and gives up after some
    for part in module.layers if case.checkpointing else [module]:  # type: ignore[union-attr]
        part.compile(mode=mode)
    return module


def _graphed(case: Case) -> Candidate:
    made = _compiled(case, "reduce-overhead")

    def as_one_step(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            # Else every compiled layer begins a step of its own, and takes back what the one before it gave.
            torch.compiler.cudagraph_mark_step_begin()
            return function(*inputs)

        return run

    comparable = None if made.comparable is None else as_one_step(made.comparable)
    return made._replace(function=as_one_step(made.function), comparable=comparable)


def _float8(case: Case) -> Candidate:
    module = MODULES[case.subject](case)
    to_float8(module)
    return of_module(case, _compile(case, module), comparable=False)


def to_float8(module: nn.Module) -> None:
    """Have torchao compute linear layers in float8, where both sides are multiples of 16, as the hardware wants.

    Raises:
        Failed: torchao cannot be imported.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except Exception as e:
        raise Failed(f"cannot be imported: {first_line(e)}") from e
    convert_to_float8_training(
        module,
        config=Float8LinearConfig(pad_inner_dim=True),  # the mean token is one row a sample
        module_filter_fn=lambda m, name: isinstance(m, nn.Linear) and not (m.in_features % 16 or m.out_features % 16),
    )


def _products_kept(case: Case) -> Candidate:
    if not case.checkpointing:
        raise Failed("a case in which nothing is recomputed")
    model = ours_model(case)
    candidate = of_module(case, model)
    model.set_grad_checkpointing(keep_products=True)
    return candidate


# mamba-ssm: the published code's kernels.


@functools.cache
def _mamba_ssm() -> Any:
    """The Triton kernels, also where the package's compiled part is missing."""
    try:
        try:
            import mamba_ssm  # noqa: F401
        except Exception:
            spec = importlib.util.find_spec("mamba_ssm")
            package = types.ModuleType("mamba_ssm")
            package.__path__ = list(spec.submodule_search_locations or ()) if spec is not None else []
            sys.modules["mamba_ssm"] = package
        return importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except Exception as e:
        raise Failed(f"cannot be imported: {first_line(e)}") from e


def _mamba_scan(case: Case) -> Candidate:
    scan = _mamba_ssm().mamba_chunk_scan_combined

    def function(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return scan(x, dt, A, B[:, :, None], C[:, :, None], chunk_size=_THEIR_CHUNK)

    return Candidate(function, scan_inputs(case), [], function)


class PublishedOrder(nn.Module):
    """A mixer as the published code runs it, on the weights of this project's.

    The mean token is put in front, patches are flipped where the block scans from the right, all goes through
    mamba-ssm's kernels, is flipped back, and the first output dropped. With causal-conv1d installed that is one fused
    call; without, PyTorch's convolution and the Triton scan and norm.
    """

    def __init__(self, mixer: Mamba2Mixer) -> None:
        super().__init__()
        self.mixer = mixer
        self.kernels = _mamba_ssm()
        self.fused = getattr(self.kernels, "causal_conv1d_fn", None) is not None

    def forward(self, u: Tensor) -> Tensor:
        """(batch, patches + 1, embed_dim) -> the same."""
        if self.mixer.reverse:
            u = torch.cat([u[:, :-1].flip(1), u[:, -1:]], 1)
        y = self._mix(torch.cat([u.mean(1, keepdim=True), u], 1))[:, 1:]
        return torch.cat([y[:, :-1].flip(1), y[:, -1:]], 1) if self.mixer.reverse else y

    def _mix(self, u: Tensor) -> Tensor:
        m = self.mixer
        A = -torch.exp(m.A_log.float())
        weight, bias = m.conv1d.weight, m.conv1d.get_parameter("bias")
        projected = m.in_proj(u)
        if self.fused:
            return self.kernels.mamba_split_conv1d_scan_combined(
                projected,
                weight.squeeze(1),
                bias,
                m.dt_bias,
                A,
                m.D,
                chunk_size=_THEIR_CHUNK,
                activation="silu",
                rmsnorm_weight=m.norm.weight,
                rmsnorm_eps=NORM_EPS,
                outproj_weight=m.out_proj.weight,
                headdim=m.headdim,
                ngroups=1,
                norm_before_gate=False,
            )
        z, xBC, dt = projected.split([m.d_inner, m.d_inner + 2 * m.d_state, m.nheads], dim=-1)
        xBC = F.conv1d(xBC.transpose(1, 2), weight, bias, padding=CONV_WIDTH - 1, groups=len(weight))
        xBC = F.silu(xBC[..., : u.shape[1]]).transpose(1, 2)
        x, B, C = xBC.split([m.d_inner, m.d_state, m.d_state], dim=-1)
        y = self.kernels.mamba_chunk_scan_combined(
            x.unflatten(-1, (m.nheads, m.headdim)),
            dt,
            A,
            B[:, :, None],
            C[:, :, None],
            chunk_size=_THEIR_CHUNK,
            D=m.D,
            dt_bias=m.dt_bias,
            dt_softplus=True,
        )
        y = self.kernels.rmsnorm_fn(y.flatten(2), m.norm.weight, None, z=z, eps=NORM_EPS, norm_before_gate=False)
        return m.out_proj(y)


def _published(case: Case) -> Candidate:
    if case.subject == "mixer":
        return of_module(case, PublishedOrder(ours_mixer(case)))
    if case.subject == "block":
        block: Any = ours_block(case)
        block.mixer = PublishedOrder(block.mixer)
        return of_module(case, block)
    model = ours_model(case)
    for layer in model.layers:
        layer.mixer = PublishedOrder(layer.mixer)
    return of_module(case, model)


# fla: the same recurrence under the name of simple gated linear attention.


def _fla_scan(case: Case) -> Candidate:
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except Exception as e:
        raise Failed(f"cannot be imported: {first_line(e)}") from e

    def function(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        q, k = (t[:, :, None].expand(-1, -1, x.shape[2], -1) for t in (C, B))
        return chunk_simple_gla(q, k, (x * dt[..., None]).to(x.dtype), dt * A, scale=1.0)[0]

    return Candidate(function, scan_inputs(case), [], function)


PEERS: dict[str, Peer] = {
    "transformers": Peer(
        "transformers",
        "pip install transformers",
        gpu_only=False,
        makes={"scan": _transformers_scan, "conv": _transformers_conv, "mixer": _transformers_mixer},
        remark="its mixer has no heading average, which is extra work here; outputs are compared with it put in front",
    ),
    "vit": Peer(
        "timm",
        "pip install timm",
        gpu_only=False,
        makes={"block": _vit_block, "model": _deit, "step": _deit},
        remark="another function: attention (scaled_dot_product_attention) of equal width and depth",
    ),
    "mamba-ssm": Peer(
        "mamba_ssm",
        "MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install --no-build-isolation mamba-ssm",
        gpu_only=True,
        makes={"scan": _mamba_scan, "mixer": _published, "block": _published, "model": _published, "step": _published},
        remark="the published order of work (mean in front, flips by copying) on its kernels",
    ),
    "fla": Peer(
        "fla",
        "pip install fla-core",
        gpu_only=True,
        makes={"scan": _fla_scan},
        remark="chunk_simple_gla; B and C are copied to every head for it, in its time",
    ),
    "native": Peer(
        "torch",
        "pip install torch",
        gpu_only=False,
        makes=dict.fromkeys(("scan", "mixer", "block", "model", "step"), _native),
        remark="this project with its kernels in C++ (PATCHSCALE_OPS=native)",
    ),
    "default-linear": Peer(
        "torch",
        "pip install torch",
        gpu_only=False,
        makes=dict.fromkeys(("mixer", "block", "model", "step"), _default_linear),
        remark="this project, float32 linear layers in the library that PyTorch takes by default",
    ),
    "compiled": Peer(
        "torch",
        "pip install torch",
        gpu_only=False,
        makes=dict.fromkeys(("mixer", "block", "model", "step"), _compiled),
        remark="this project through torch.compile",
    ),
    "graphed": Peer(
        "torch",
        "pip install torch",
        gpu_only=True,
        makes=dict.fromkeys(("mixer", "block", "model", "step"), _graphed),
        remark="this project through torch.compile(mode='reduce-overhead'), which captures CUDA graphs",
    ),
    "float8": Peer(
        "torchao",
        "pip install torchao",
        gpu_only=True,
        makes=dict.fromkeys(("block", "model", "step"), _float8),
        remark="this project compiled, its linear layers in float8 (torchao) where their sides are multiples of 16; "
        "another function, and not compared",
    ),
    "products-kept": Peer(
        "torch",
        "pip install torch",
        gpu_only=False,
        makes=dict.fromkeys(("model", "step"), _products_kept),
        remark="this project, checkpointed, the results of its linear layers kept",
    ),
}
# Without --peers, all but this project's own other forms.
DEFAULT_PEERS = tuple(
    name for name in PEERS if name not in ("native", "default-linear", "compiled", "graphed", "float8", "products-kept")
)
