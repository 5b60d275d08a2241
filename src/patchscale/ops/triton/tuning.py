"""How large the blocks of the scan's kernels are, by precision and shape.

A table is shipped, and nothing is timed at the first call. Its numbers have not been timed either: they are starting
points, chosen by what the compiler says of registers and shared memory for compute capability 9.0. :func:`tune` times
the alternatives on the GPU at hand and keeps the winner in the user's cache, from where it is read from then on.
"""

import dataclasses
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from patchscale.errors import UserError

# Programs that keep a large GPU busy: two for each of 132 multiprocessors.
ENOUGH_PROGRAMS = 264


@dataclasses.dataclass(frozen=True)
class Config:
    """Tokens in a chunk, and of each kernel the warps and the loads that run ahead of its loop (Triton's stages)."""

    chunk: int = 64
    pass_headdim: int = 64  # of headdim, how much one program of the pass over states takes at most
    pass_warps: int = 4
    pass_stages: int = 3
    output_warps: int = 4
    output_stages: int = 2
    backward_warps: int = 4
    backward_stages: int = 1


# (precision, headdim, d_state); what is not named is computed by the rule of _start. Not timed yet.
_SHIPPED = {
    (torch.bfloat16, 64, 64): Config(),
    (torch.bfloat16, 64, 128): Config(pass_headdim=32),
    (torch.bfloat16, 128, 64): Config(),
    (torch.bfloat16, 128, 128): Config(pass_headdim=32),
    # float32 without tensor cores: for checking, not for speed.
    (torch.float32, 64, 64): Config(chunk=32, pass_headdim=32, pass_stages=2, output_stages=1),
}
# What tune tries, one field at a time.
_ALTERNATIVES: dict[str, tuple[int, ...]] = {
    "chunk": (32, 64, 128),
    "backward_warps": (4, 8),
    "backward_stages": (1, 2),
    "output_warps": (2, 4, 8),
    "output_stages": (1, 2, 3),
    "pass_headdim": (16, 32, 64),
    "pass_warps": (2, 4, 8),
    "pass_stages": (1, 2, 3, 4),
}

_known: dict[tuple[torch.dtype, int, int, torch.device], Config] = {}


def config(dtype: torch.dtype, headdim: int, d_state: int, device: torch.device) -> Config:
    """What was tuned on this GPU, else what is shipped. Reads the cache file once."""
    key = (dtype, headdim, d_state, device)
    if key not in _known:
        tuned = _read_cache().get(_name(*key)) if device.type == "cuda" else None
        _known[key] = tuned or _SHIPPED.get((dtype, headdim, d_state)) or _start(dtype, headdim, d_state)
    return _known[key]


def _start(dtype: torch.dtype, headdim: int, d_state: int) -> Config:
    """By size alone: tiles of 64 x 64 in bfloat16, fewer tokens for wide or float32 ones."""
    largest = max(headdim, d_state) * dtype.itemsize
    if largest <= 128:
        return Config()
    return Config(chunk=32 if largest <= 256 else 16, pass_headdim=32, pass_stages=2, output_stages=1)


@torch.compiler.assume_constant_result
def default_chunk_size(dtype: torch.dtype, headdim: int, d_state: int, device: torch.device) -> int:
    """Tokens in a chunk. Asked for outside the operators, so that a compiled or exported graph carries it."""
    return config(dtype, headdim, d_state, device).chunk


def head_groups(chunks: int, heads: int) -> int:
    """In how many groups the heads of a chunk go to programs of their own; ``chunks`` counts those of all samples.

    One group computes C B^T once; with few chunks, several keep the GPU busy.
    """
    groups = min(heads, -(-ENOUGH_PROGRAMS // max(1, chunks)))
    return -(-heads // -(-heads // groups))  # no group empty


def headdim_block(config: Config, programs: int, headdim: int) -> int:
    """How much of headdim a program of the pass over states takes: less if the heads of all samples are few."""
    block = min(config.pass_headdim, headdim)
    while block > 16 and programs * (headdim // block) < ENOUGH_PROGRAMS:
        block //= 2
    return block


def cache_file() -> Path:
    """In the user's cache folder, by the rules of the XDG base directory specification."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(folder) if os.path.isabs(folder) else Path.home() / ".cache"
    return base / "patchscale" / "triton.json"


def _name(dtype: torch.dtype, headdim: int, d_state: int, device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)}, {dtype}, headdim {headdim}, d_state {d_state}"


def _read_cache() -> dict[str, Config]:
    """What was tuned on this machine; nothing, with a warning, if the file does not read as that."""
    file = cache_file()
    try:
        found = {name: Config(**fields) for name, fields in json.loads(file.read_text()).items()}
        if not all(isinstance(v, int) and 0 < v <= 256 for c in found.values() for v in dataclasses.astuple(c)):
            raise ValueError("a field that is not a whole number from 1 to 256")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{file} is not a file of tuned kernels and is not used: {error}", stacklevel=2)
        return {}
    return found


def _write_cache(name: str, winner: Config) -> None:
    file = cache_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = {k: dataclasses.asdict(v) for k, v in (_read_cache() | {name: winner}).items()}
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as temporary:
        json.dump(entries, temporary, indent=1)
        temporary.flush()
        os.fsync(temporary.fileno())
    os.replace(temporary.name, file)


def tune(
    headdim: int = 64,
    d_state: int = 64,
    *,
    dtype: torch.dtype = torch.bfloat16,
    heads: int = 24,
    batch: int = 8,
    length: int = 3137,
    device: torch.device | str = "cuda",
) -> Config:
    """Time forward and backward of the mixer for one field after the other, and keep the fastest in the cache file.

    Raises:
        UserError: no GPU that the kernels run on.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UserError(f"tuning times kernels on an NVIDIA GPU, and there is none as {str(device)!r}")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    key = (dtype, headdim, d_state, device)
    best = config(*key)
    shape = (batch, length, heads)

    def milliseconds(candidate: Config) -> float:
        _known[key] = candidate
        try:
            return _milliseconds(shape, *key)
        except Exception as error:  # too large for the shared memory, or what else a compiler may not like
            warnings.warn(f"{candidate} does not run: {error}", stacklevel=3)
            return float("inf")

    try:
        fastest = milliseconds(best)
        for field, values in _ALTERNATIVES.items():
            for value in values:
                candidate = dataclasses.replace(best, **{field: value})
                if candidate != best and (time := milliseconds(candidate)) < fastest:
                    best, fastest = candidate, time
    finally:
        _known[key] = best
    _write_cache(_name(*key), best)
    return best


def _milliseconds(
    shape: tuple[int, int, int], dtype: torch.dtype, headdim: int, d_state: int, device: torch.device
) -> float:
    """Median time of the mixer's forward and backward at (batch, length, heads)."""
    from triton.testing import do_bench

    from patchscale.ops.triton.mixer import mix_tokens

    batch, length, heads = shape
    d_inner = heads * headdim
    conv_dim = d_inner + 2 * d_state
    projected = torch.randn(batch, length, d_inner + conv_dim + heads, dtype=dtype, device=device)
    shapes = ((conv_dim, 4), (conv_dim,), (heads,), (heads,), (heads,), (d_inner,))
    conv_weight, conv_bias, dt_bias, A, D, norm_weight = (torch.rand(s, device=device) for s in shapes)
    tensors = [projected, conv_weight, conv_bias, dt_bias - 4, -1 - 15 * A, D, norm_weight]
    tensors = [t.requires_grad_() for t in tensors]
    gradient = torch.randn(batch, length, d_inner, dtype=dtype, device=device)
    arguments: tuple[Any, ...] = (*tensors, None, None, True, 1, 1e-5, False)

    def step() -> None:
        out, _ = mix_tokens(*arguments)
        torch.autograd.grad(out, tensors, gradient)

    return do_bench(step, return_mode="median")
