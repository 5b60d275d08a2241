"""The fused mixer on Triton kernels against its definition, token by token, in float64."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from patchscale import UserError, ops
from patchscale.ops.reference import mix_tokens_reference
from patchscale.ops.triton.mixer import mix_tokens

NAMES = ("projected", "conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_weight", "history", "initial_state")
OPTIONAL = ("history", "initial_state")
# One number a head, summed over all tokens from terms of either sign: what is left when they cancel has fewer digits.
SUMS = ("grad of dt_bias", "grad of A", "grad of D")


def draw(
    length: int,
    *,
    batch: int = 1,
    heads: int = 2,
    headdim: int = 16,
    d_state: int = 16,
    width: int = 4,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    d_inner = heads * headdim
    conv_dim = d_inner + 2 * d_state
    shapes = {
        "projected": (batch, length, d_inner + conv_dim + heads),
        "conv_weight": (conv_dim, width),
        "conv_bias": (conv_dim,),
        "dt_bias": (heads,),
        "A": (heads,),
        "D": (heads,),
        "norm_weight": (d_inner,),
        "history": (batch, width - 1, conv_dim),
        "initial_state": (batch, heads, headdim, d_state),
    }
    inputs = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}
    inputs["dt_bias"] -= 2
    inputs["A"] = -inputs["A"].exp()
    return {k: v.to(device, dtype if k in ("projected", "history") else torch.float32) for k, v in inputs.items()}


def mix(*, reverse=False, suffix=0, want_final=True, **inputs):
    return mix_tokens(*(inputs.get(k) for k in NAMES), reverse, suffix, 1e-5, want_final)


def reference(*, reverse=False, suffix=0, **inputs):
    return mix_tokens_reference(*(inputs.get(k) for k in NAMES), reverse, suffix)


def and_gradients(operator, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    outputs = operator(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    grad_outputs = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in outputs]
    # Rounded to bfloat16 for every dtype, so that a reference in float64 starts from the same numbers.
    grad_outputs = [g.bfloat16().to(t.device, t.dtype) for g, t in zip(grad_outputs, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grad_outputs)
    result = {"out": outputs[0], "final_state": outputs[1]}
    return result | {f"grad of {k}": g for k, g in zip(leaves, gradients, strict=True)}


def truth(inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    return and_gradients(reference, {k: v.cpu().double() for k, v in inputs.items()}, **options)


def check(assert_near, inputs: dict[str, Tensor], of_sums: float | None = None, **options) -> None:
    """All outputs and gradients within 1e-5 in float32, 1e-2 in bfloat16; sums over tokens within ``of_sums``."""
    tolerance, of_sums = (1e-5, of_sums or 1e-5) if inputs["projected"].dtype == torch.float32 else (1e-2, 5e-2)
    expected = truth(inputs, **options)
    for name, value in and_gradients(mix, inputs, **options).items():
        assert_near(value.cpu(), expected[name], of_sums if name in SUMS else tolerance, name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("length", "suffix"), [(1, 0), (1, 1), (2, 1), (3, 3), (63, 1), (64, 0), (65, 1), (65, 3), (196, 0), (197, 1)]
)
def test_values_and_gradients_in_float32(length, suffix, reverse, device, assert_near):
    inputs = draw(length, batch=2 if length < 65 else 1, device=device, seed=length)
    check(assert_near, inputs, reverse=reverse, suffix=suffix)


@pytest.mark.parametrize(("length", "suffix", "reverse"), [(2, 1, True), (65, 0, False), (65, 3, True), (197, 1, True)])
def test_values_and_gradients_in_bfloat16(length, suffix, reverse, device, assert_near):
    inputs = draw(length, heads=3, dtype=torch.bfloat16, device=device, seed=length)
    check(assert_near, inputs, reverse=reverse, suffix=suffix)


# The kernels know of none: it is scanned before they scan the others.
@pytest.mark.parametrize("given", [NAMES, NAMES[:-2]])
@pytest.mark.parametrize("reverse", [False, True])
def test_heading_token(reverse, given, device, assert_near):
    inputs = {k: v for k, v in draw(67, device=device).items() if k in given}

    def public(**leaves):
        return ops.mix_tokens(
            **leaves, reverse=reverse, suffix=1, heading=True, final_state=True, implementation="triton"
        )

    found = and_gradients(public, inputs)
    cpu = {k: v.cpu().double() for k, v in inputs.items()}
    expected = and_gradients(mix_tokens_reference, cpu, reverse=reverse, suffix=1, heading=True)
    for name, value in found.items():
        assert_near(value.cpu(), expected[name], 1e-5, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_size_of_the_models(dtype, device, assert_near):
    check(assert_near, draw(66, headdim=64, d_state=64, dtype=dtype, device=device), reverse=True, suffix=1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sequences(dtype, device, assert_near):
    check(assert_near, draw(577, batch=2, heads=3, dtype=dtype, device=device), reverse=True, suffix=1)


@pytest.mark.parametrize(
    ("width", "d_state", "absent"),
    [(4, 32, OPTIONAL), (4, 16, ("history",)), (3, 16, ("initial_state",)), (2, 16, OPTIONAL), (1, 16, OPTIONAL)],
)
def test_without_history_or_initial_state(width, d_state, absent, device, assert_near):
    inputs = draw(20, width=width, d_state=d_state, device=device)
    some = {k: v for k, v in inputs.items() if k not in absent and v.numel()}
    check(assert_near, some, reverse=True, suffix=1)


# Up to a decay of exp(-30) a token; the heads differ, so that a mix is among them.
@pytest.mark.parametrize("rates", [[0.001, 0.001], [0.5, 1.0], [30.0, 30.0], [0.01, 30.0]])
def test_strong_and_weak_decay(rates, device, assert_near):
    inputs = draw(130, device=device)
    inputs["A"] = -torch.tensor(rates, device=device)
    inputs["dt_bias"] = torch.full((2,), 1.0, device=device)
    # Beyond exp(-30) little but rounding is left of the gradient of A.
    check(assert_near, inputs, of_sums=1e-4, reverse=True, suffix=1)


def test_no_decay_overflows(device, assert_near):
    inputs = draw(70, dtype=torch.bfloat16, device=device)
    inputs["A"] = torch.tensor([-1000.0, -1e30], device=device)
    inputs["dt_bias"] = torch.full((2,), 1.0, device=device)
    result, expected = and_gradients(mix, inputs), truth(inputs)
    for name, value in result.items():
        assert value.isfinite().all(), name
    for name in ("out", "final_state"):
        assert_near(result[name].cpu(), expected[name], 1e-2, name)


def test_two_halves_with_state_and_history_passed_on_are_one(device, assert_near):
    inputs = draw(70, device=device)
    expected, expected_state = mix(**inputs, reverse=True)
    right, left = (inputs["projected"][:, s] for s in (slice(40, None), slice(40)))
    out_right, state = mix(**inputs | {"projected": right}, reverse=True)
    history = right[:, :3, 32:96].flip(1)  # the last three tokens that were scanned
    out_left, state = mix(**inputs | {"projected": left, "history": history, "initial_state": state}, reverse=True)
    assert_near(torch.cat([out_left, out_right], 1), expected, 1e-6)
    assert_near(state, expected_state, 1e-6)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(used, device, assert_near):
    inputs = draw(9, device=device)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    mix(**leaves, reverse=True, suffix=1)[used].pow(2).sum().backward()
    expected = {k: v.detach().cpu().double().requires_grad_() for k, v in inputs.items()}
    reference(**expected, reverse=True, suffix=1)[used].pow(2).sum().backward()
    for name, leaf in leaves.items():
        truth = expected[name].grad
        assert_near(leaf.grad.cpu(), torch.zeros(leaf.shape) if truth is None else truth, 1e-5, name)


def test_non_contiguous_inputs(device, assert_near):
    inputs = draw(9, batch=2, device=device)
    expected = and_gradients(mix, inputs)
    strided = {k: torch.stack([v, v * 0 + torch.nan], dim=-1)[..., 0] for k, v in inputs.items()}
    for name, value in and_gradients(mix, strided).items():
        assert_near(value, expected[name], 1e-6, name)
    # Rows that lie apart are read where they are.
    wide = torch.full((9, 2, 101), torch.nan, device=device)[..., 1:99].transpose(0, 1)
    for name, value in and_gradients(mix, inputs | {"projected": wide.copy_(inputs["projected"])}).items():
        assert_near(value, expected[name], 1e-6, name)
    # What .sum().backward() sends back: one number, expanded.
    leaf = inputs["projected"].clone().requires_grad_()
    mix(**inputs | {"projected": leaf})[0].sum().backward()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("length", [1, 65])
def test_every_element_is_written(length, device):
    torch.use_deterministic_algorithms(True)  # fills what torch leaves uninitialised with NaN
    try:
        assert torch.empty(3, device=device).isnan().all()
        result = and_gradients(mix, draw(length, device=device), reverse=True, suffix=1)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in result.items():
        assert value.isfinite().all(), name


def test_equal_runs_give_equal_bits(device):
    inputs = draw(40, batch=2, dtype=torch.bfloat16, device=device)
    first, second = (and_gradients(mix, inputs, reverse=True, suffix=1) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# Token 257 starts more than 2^31 numbers after the first: offsets in 32 bits would be negative.
def test_offsets_are_64_bit(device, assert_near):
    inputs = draw(260, heads=1, dtype=torch.bfloat16, device=device)
    expected = and_gradients(mix, inputs, reverse=True, suffix=1)
    apart = 2**23 - 64
    try:
        memory = torch.empty(260 * apart, dtype=torch.bfloat16, device=device)  # of which little is touched
    except RuntimeError:
        pytest.skip("4.3 GB of address space are not to be had")
    inputs["projected"] = memory.view(1, 260, apart)[..., :65].copy_(inputs["projected"])
    assert apart * 257 > 2**31
    for name, value in and_gradients(mix, inputs, reverse=True, suffix=1).items():
        assert_near(value, expected[name], 1e-6, name)


def test_dtypes(device):
    result = and_gradients(mix, draw(5, dtype=torch.bfloat16, device=device))
    assert result["out"].dtype == result["grad of projected"].dtype == torch.bfloat16
    assert result["final_state"].dtype == result["grad of A"].dtype == torch.float32
    inputs = draw(5, dtype=torch.bfloat16, device=device)
    result = and_gradients(mix, {k: v.bfloat16() for k, v in inputs.items()})
    assert all(result[f"grad of {k}"].dtype == torch.bfloat16 for k in inputs)


@pytest.mark.parametrize(("absent", "want_final"), [((), True), (OPTIONAL, False)])
def test_custom_op_keeps_pytorchs_rules(absent, want_final, device):
    inputs = draw(5, dtype=torch.bfloat16, device=device)
    tensors = [None if k in absent else inputs[k].requires_grad_() for k in NAMES]
    arguments = (*tensors, True, 1, 1e-5, 16, want_final, True)
    torch.library.opcheck(torch.ops.patchscale.mix_tokens_triton.default, arguments)


def test_compiled_whole(device, assert_near):
    inputs = draw(20, device=device)
    expected = and_gradients(mix, inputs, reverse=True, suffix=1)
    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    for name, value in and_gradients(compiled, inputs, reverse=True, suffix=1).items():
        assert_near(value, expected[name], 1e-6, name)


class Mixer(torch.nn.Module):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return mix(**inputs, reverse=True, suffix=1, want_final=False)[0]


def test_exported(device):
    inputs = draw(20, device=device)
    program = torch.export.export(Mixer(), (inputs,))
    assert torch.equal(program.module()(inputs), Mixer()(inputs))


def test_checkpointed(device):
    inputs = draw(20, device=device)
    expected = and_gradients(mix, inputs)

    def checkpointed(**leaves):
        return checkpoint(mix, **leaves, use_reentrant=False)

    for name, value in and_gradients(checkpointed, inputs).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("length", [20, 150])
def test_flop_counter_sees_the_products_that_are_done(length, device, monkeypatch):
    if device.type == "cuda":
        pytest.skip("a GPU counts nothing")
    from triton.runtime.interpreter import InterpreterBuilder

    done = 0
    product = InterpreterBuilder.create_dot

    def counted(self, a, b, *rest):
        nonlocal done
        done += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return product(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    leaves = {k: v.requires_grad_() for k, v in draw(length, heads=3, d_state=32).items()}
    with FlopCounterMode(display=False) as forward:
        out, _ = mix(**leaves, reverse=True, suffix=1)
    assert forward.get_total_flops() == done > 0
    done = 0
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == done > 0


@pytest.mark.parametrize("shape", [(0, 9), (2, 0)])
def test_empty_in_empty_out(shape, device):
    inputs = {k: v for k, v in draw(9, device=device).items() if k not in OPTIONAL}
    projected = torch.zeros(*shape, 98, device=device, requires_grad=True)
    out, state = mix(**inputs | {"projected": projected})
    assert out.shape == (*shape, 32)
    assert state.shape == (shape[0], 2, 16, 16)
    assert not state.any()
    out.sum().backward()
    assert projected.grad.shape == projected.shape


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"headdim": 8}, "headdim is 8"),
        ({"headdim": 48}, "headdim is 48"),
        ({"d_state": 256}, "d_state is 256"),
        ({"width": 5}, "5 taps"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(sizes, words, device):
    with pytest.raises(UserError, match=words):
        mix(**draw(9, **sizes, device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_in_a_cuda_graph(device):
    inputs = draw(197, batch=4, heads=4, headdim=64, d_state=64, dtype=torch.bfloat16, device=device)
    expected = mix(**inputs, reverse=True, suffix=1)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = mix(**inputs, reverse=True, suffix=1)[0]
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
