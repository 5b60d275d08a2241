"""The scan against its definition: values, gradients, and what must not change the result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from patchscale import UserError
from patchscale.ops import ssd_scan
from patchscale.ops.reference import scan_order, ssd_scan_reference

NAMES = ("x", "dt", "A", "B", "C", "D", "initial_state")
LENGTHS = (1, 2, 63, 64, 65, 127, 197)
property_test = settings(deadline=None, max_examples=30, database=None)


def draw(
    length: int,
    *,
    batch: int = 2,
    heads: int = 2,
    headdim: int = 4,
    d_state: int = 6,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs of a scan; x, B and C in ``dtype``, the others in float32 at least, as a mixer gives them."""
    generator = torch.Generator().manual_seed(seed)
    at_least_float32 = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(batch, length, heads, headdim).to(dtype),
        "dt": (0.3 * torch.rand(batch, length, heads, generator=generator, dtype=torch.float64)).to(at_least_float32),
        "A": -normal(heads).exp().to(at_least_float32),
        "B": normal(batch, length, d_state).to(dtype),
        "C": normal(batch, length, d_state).to(dtype),
        "D": normal(heads).to(at_least_float32),
        "initial_state": normal(batch, heads, headdim, d_state).to(at_least_float32),
    }


def scan_and_gradients(scan, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Outputs, and gradients of every input from fixed gradients of both outputs, by name."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    y, state = scan(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    grad_outputs = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (y, state)]
    # Rounded to bfloat16 for every dtype, so that a reference in float64 starts from the same numbers.
    grad_outputs = [g.bfloat16().to(t.dtype) for g, t in zip(grad_outputs, (y, state), strict=True)]
    gradients = torch.autograd.grad([y, state], list(leaves.values()), grad_outputs)
    return {"y": y, "final_state": state} | {f"grad of {k}": g for k, g in zip(leaves, gradients, strict=True)}


def truth(inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    return scan_and_gradients(ssd_scan_reference, {k: v.double() for k, v in inputs.items()}, **options)


def dense_scan(x, dt, A, B, C, D=None, initial_state=None):
    """The scan as one masked matrix: the product of all decays between two tokens, without a recurrence."""
    log = (dt * A).cumsum(1)  # (batch, length, heads)
    between = (log[:, :, None] - log[:, None]).masked_fill(
        torch.ones(x.shape[1], x.shape[1]).triu(1).bool()[None, :, :, None], -torch.inf
    )
    y = torch.einsum("btn,bsn,btsh,bsh,bshp->bthp", C, B, between.exp(), dt, x)
    to_end = (log[:, -1:] - log).exp()
    state = torch.einsum("bsh,bsh,bshp,bsn->bhpn", to_end, dt, x, B)
    if initial_state is not None:
        y = y + torch.einsum("btn,bhpn,bth->bthp", C, initial_state, log.exp())
        state = state + initial_state * log[:, -1].exp()[..., None, None]
    return (y if D is None else y + D[:, None] * x), state


@pytest.mark.parametrize("optional", [(), ("D",), ("initial_state",), ("D", "initial_state")])
@pytest.mark.parametrize("length", [1, 2, 50])
def test_reference_is_the_masked_matrix(length, optional, assert_near):
    inputs = {k: v for k, v in draw(length).items() if k not in ("D", "initial_state") or k in optional}
    expected = scan_and_gradients(dense_scan, inputs)
    for name, value in scan_and_gradients(ssd_scan_reference, inputs).items():
        assert_near(value, expected[name], 1e-12, name)


@pytest.mark.parametrize("suffix", [0, 1, 3, 9])
def test_reference_scans_reordered_tokens(suffix, assert_near):
    length = 9
    order = torch.cat([torch.arange(length - suffix).flip(0), torch.arange(length - suffix, length)])
    inputs = draw(length)
    moved = inputs | {k: inputs[k][:, order] for k in ("x", "dt", "B", "C")}
    expected, expected_state = dense_scan(**moved)
    y, state = ssd_scan_reference(**inputs, reverse=True, suffix=suffix)
    assert_near(y[:, order], expected, 1e-12)
    assert_near(state, expected_state, 1e-12)


def test_gradients_are_finite_differences():
    inputs = draw(5, batch=1, headdim=2, d_state=2)

    def scan(*tensors):
        return ssd_scan(
            **dict(zip(inputs, tensors, strict=True)), reverse=True, suffix=1, chunk_size=2, implementation="torch"
        )

    assert torch.autograd.gradcheck(scan, [t.requires_grad_() for t in inputs.values()])


# The worst case in float32 is the gradient of A: one number, the sum over all tokens of terms of either sign.
@pytest.mark.parametrize(
    ("dtype", "tolerance", "tolerance_A"),
    [(torch.float64, 1e-10, 1e-10), (torch.float32, 1e-5, 1e-4), (torch.bfloat16, 1e-2, 1e-4)],
)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients(length, reverse, dtype, tolerance, tolerance_A, assert_near):
    for batch, suffix in ((1, 3 if reverse else 0), (3, 1)):
        inputs = draw(length, batch=batch, dtype=dtype, seed=length)
        options = {"reverse": reverse, "suffix": min(suffix, length)}
        expected = truth(inputs, **options)
        for name, value in scan_and_gradients(ssd_scan, inputs, **options).items():
            assert_near(value, expected[name], tolerance_A if name == "grad of A" else tolerance, name)


def reference_in_parts(x, dt, A, B, C, D, initial_state, reverse, suffix):
    """The reference, some tokens after others: the gradients of one long loop would take minutes."""
    length = x.shape[1]
    order = torch.tensor(scan_order(length, reverse, suffix))
    parts = [t[:, order].split(256, 1) for t in (x, dt, B, C)]
    ys, state = [], initial_state
    for x_part, dt_part, B_part, C_part in zip(*parts, strict=True):
        y, state = ssd_scan_reference(x_part, dt_part, A, B_part, C_part, D, state)
        ys.append(y)
    return torch.cat(ys, 1)[:, order.argsort()], state


# One truth serves both precisions: its inputs are bfloat16 numbers.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [577, 3136, pytest.param(50176, marks=pytest.mark.slow)])
def test_long_sequences(length, reverse, assert_near):
    rounded = draw(length, batch=1, headdim=2, d_state=3, dtype=torch.bfloat16, seed=length)
    options = {"reverse": reverse, "suffix": 1}
    expected = scan_and_gradients(reference_in_parts, {k: v.double() for k, v in rounded.items()}, **options)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        inputs = rounded | {k: rounded[k].to(dtype) for k in ("x", "B", "C")}
        for name, value in scan_and_gradients(ssd_scan, inputs, **options).items():
            assert_near(value, expected[name], 1e-4 if name == "grad of A" else tolerance, name)


@pytest.mark.parametrize("given_ones", [(), ("D",), ("initial_state",)])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 64, 130])
def test_without_the_skip_or_an_initial_state(length, reverse, given_ones, assert_near):
    inputs = {k: v for k, v in draw(length).items() if k not in ("D", "initial_state") or k in given_ones}
    expected = truth(inputs, reverse=reverse)
    for name, value in scan_and_gradients(ssd_scan, inputs, reverse=reverse).items():
        assert_near(value, expected[name], 1e-10, name)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 50, 130])
def test_without_the_final_state(length, reverse, implementation, assert_near):
    inputs = draw(length)
    y, state = ssd_scan(**inputs, reverse=reverse, suffix=1, final_state=False, implementation=implementation)
    assert state is None
    gradients = []
    for final_state in (False, True):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        y, _ = ssd_scan(**leaves, reverse=reverse, suffix=1, final_state=final_state, implementation=implementation)
        y.pow(2).sum().backward()
        gradients.append({"y": y} | {k: v.grad for k, v in leaves.items()})
    for name, value in gradients[0].items():
        assert_near(value, gradients[1][name], 1e-11, name)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output_alone(used, assert_near):
    inputs = draw(70)
    gradients = []
    for scan in (ssd_scan, ssd_scan_reference):
        leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        scan(**leaves, reverse=True, suffix=1)[used].pow(2).sum().backward()
        gradients.append({k: v.grad for k, v in leaves.items() if v.grad is not None})
    # The final state reads neither C nor D: the reference has no gradient for them, the operator may say zero.
    for name, actual in gradients[0].items():
        assert_near(actual, gradients[1].get(name, torch.zeros_like(actual)), 1e-10, name)
    assert gradients[1].keys() <= gradients[0].keys()


def test_dtypes_of_outputs_and_gradients():
    inputs = draw(5, dtype=torch.bfloat16)
    result = scan_and_gradients(ssd_scan, inputs)
    assert result["y"].dtype == torch.bfloat16
    assert result["final_state"].dtype == torch.float32
    for name, tensor in inputs.items():
        assert result[f"grad of {name}"].dtype == tensor.dtype
    assert ssd_scan(**draw(5))[1].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_state_in_float32(dtype, assert_near):
    inputs = draw(197, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        result = scan_and_gradients(ssd_scan, inputs)
    assert result["final_state"].dtype == torch.float32
    expected = truth(inputs)
    # A state that had been through bfloat16 once would be off by 1e-3.
    assert_near(result["final_state"], expected["final_state"], 1e-5)
    assert_near(result["grad of dt"], expected["grad of dt"], 1e-5)


@pytest.mark.parametrize("reverse", [False, True])
def test_non_contiguous_inputs(reverse, assert_near):
    inputs = draw(70)
    expected = scan_and_gradients(ssd_scan, inputs, reverse=reverse)
    strided = {k: torch.stack([v, v * 0 + torch.nan], dim=-1)[..., 0] for k, v in inputs.items()}
    strided["x"] = inputs["x"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    strided["B"], strided["C"] = torch.cat([inputs["B"], inputs["C"]], dim=-1).chunk(2, dim=-1)
    assert not any(v.is_contiguous() for k, v in strided.items() if k != "A" and k != "D")
    leaves = {k: v.requires_grad_() for k, v in strided.items()}
    y, state = ssd_scan(**leaves, reverse=reverse)
    assert_near(y, expected["y"], 1e-12)
    assert_near(state, expected["final_state"], 1e-12)
    # Gradients of the outputs that are expanded, not materialised.
    gradients = torch.autograd.grad(y.sum() + state.sum(), list(leaves.values()))
    plain = {k: v.detach().clone().requires_grad_() for k, v in inputs.items()}
    sums = ssd_scan_reference(**plain, reverse=reverse)
    for name, actual, wanted in zip(
        NAMES, gradients, torch.autograd.grad(sums[0].sum() + sums[1].sum(), list(plain.values())), strict=True
    ):
        assert_near(actual, wanted, 1e-10, name)


# A large batch is scanned a few samples at a time.
@pytest.mark.parametrize("samples", [1, 2])
def test_samples_of_a_large_batch_do_not_mix(samples, monkeypatch, assert_near):
    monkeypatch.setattr("patchscale.ops.chunks._BLOCK_ELEMENTS", samples * 64 * 2 * 4)
    inputs = draw(65, batch=3)
    expected = truth(inputs, reverse=True, suffix=1)
    for name, value in scan_and_gradients(ssd_scan, inputs, reverse=True, suffix=1).items():
        assert_near(value, expected[name], 1e-10, name)


def strongly_decaying(steps: Tensor) -> dict[str, Tensor]:
    inputs = draw(steps.shape[0], dtype=steps.dtype) | {"A": torch.tensor([-1.0, -0.5], dtype=steps.dtype)}
    return inputs | {"dt": steps[None, :, None].expand_as(inputs["dt"]).clone()}


# Over a chunk these sum to log-decays of -83 (whose exponential is hardly a normal number), -118 (the strongest that
# are cut into factors), and -192 and more, where exp(cs_t) / exp(cs_s) would be 0 / 0, or overflow.
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("step", [1.3, 1.85, 3.0, 30.0, 300.0])
def test_strong_decay(step, reverse, assert_near):
    inputs = strongly_decaying(torch.full((150,), step))
    expected = truth(inputs, reverse=reverse, suffix=1)
    result = scan_and_gradients(ssd_scan, inputs, reverse=reverse, suffix=1)
    assert result.pop("grad of A").isfinite().all()
    for name, value in result.items():
        assert_near(value, expected[name], 1e-5, name, zero=1e-30)  # decays under 1e-34 are held there


@pytest.mark.parametrize("reverse", [False, True])
def test_gradient_of_A_under_strong_decay(reverse, assert_near):
    inputs = strongly_decaying(torch.full((150,), 30.0))
    expected = truth(inputs, reverse=reverse, suffix=1)
    result = scan_and_gradients(ssd_scan, inputs, reverse=reverse, suffix=1)
    assert_near(result["grad of A"], expected["grad of A"], 1e-4)


# A token that decays by exp(-48) and more among others that hardly do: the sums that its gradient is a difference of
# are as large as theirs, and its step, which multiplies what is left of them, a thousand times larger.
@pytest.mark.parametrize(("step", "rate", "others"), [(3.0, 16.0, 0.05), (20.0, 5.0, 0.001), (100.0, 1.0, 0.001)])
def test_gradient_of_A_where_one_token_decays_strongly(step, rate, others, assert_near):
    inputs = draw(197, headdim=64, d_state=16, dtype=torch.float32)
    inputs["dt"] = torch.full_like(inputs["dt"], others)
    inputs["dt"][:, 70] = step
    inputs["A"] = torch.full_like(inputs["A"], -rate)
    expected = truth(inputs)
    for name, value in scan_and_gradients(ssd_scan, inputs).items():
        assert_near(value, expected[name], 1e-5, name)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_steps_of_zero_between_strong_decays(dtype, tolerance, reverse, assert_near):
    # Looser in float32, which keeps differences of running sums near -3000 to 2e-4 only.
    inputs = strongly_decaying(torch.tensor([0.0, 100.0, 0.01, 0.0], dtype=dtype)[torch.arange(150) % 4])
    expected = truth(inputs, reverse=reverse)
    result = scan_and_gradients(ssd_scan, inputs, reverse=reverse)
    gradient_of_A = result.pop("grad of A")
    for name, value in result.items():
        assert_near(value, expected[name], tolerance, name)
    # Here the gradient of A is 1e-3 of the terms that cancel in it.
    terms = (inputs["dt"] * expected["grad of dt"]).abs().sum()
    assert (gradient_of_A - expected["grad of A"]).abs().max() <= tolerance * terms


def test_all_steps_zero_keep_the_state(assert_near):
    inputs = draw(70, dtype=torch.float32)
    inputs["dt"] = torch.zeros_like(inputs["dt"])
    _, state = ssd_scan(**inputs)
    assert torch.equal(state, inputs["initial_state"])
    expected = truth(inputs)
    for name, value in scan_and_gradients(ssd_scan, inputs).items():
        assert_near(value, expected[name], 1e-5, name)


@pytest.fixture
def poisoned_memory():
    """Every tensor that torch leaves uninitialised is full of NaN."""
    torch.use_deterministic_algorithms(True)  # with it, torch.utils.deterministic.fill_uninitialized_memory, a default
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 65])
def test_every_element_is_written(length, reverse, poisoned_memory):
    assert torch.empty(3).isnan().all()
    for optional in ({}, {"D": None}, {"initial_state": None}):
        inputs = {k: v for k, v in draw(length).items() if k not in optional}
        for name, value in scan_and_gradients(ssd_scan, inputs, reverse=reverse, suffix=1).items():
            assert value.isfinite().all(), name


def test_for_the_backward_only_the_output_and_the_states_between_chunks_are_kept():
    heads, headdim, d_state = 2, 4, 6
    inputs = {k: v.requires_grad_() for k, v in draw(256).items() if k != "D"}
    stored = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.setdefault(t.data_ptr(), t), lambda t: t):
        y, _ = ssd_scan(**inputs, final_state=False, chunk_size=64)
    extra = [t for k, t in stored.items() if k not in {v.data_ptr() for v in inputs.values()} and t.numel()]
    assert sorted(t.numel() for t in extra) == sorted([y.numel(), 2 * 4 * d_state * heads * headdim])


def test_without_gradients_nothing_is_kept():
    _, _, states = torch.ops.patchscale.ssd_scan(*list(draw(256).values())[:5], None, False, 0, 64, False, False, False)
    assert states.numel() == 0


lengths = st.integers(1, 40)


@property_test
@given(lengths, st.integers(1, 50), st.booleans(), st.integers(0, 3))
def test_chunk_size_does_not_change_the_result(assert_near, length, chunk_size, reverse, suffix):
    inputs, options = draw(length), {"reverse": reverse, "suffix": min(suffix, length)}
    expected = scan_and_gradients(ssd_scan, inputs, **options, chunk_size=length)
    for name, value in scan_and_gradients(ssd_scan, inputs, **options, chunk_size=chunk_size).items():
        assert_near(value, expected[name], 1e-11, name)


@property_test
@given(lengths, st.integers(1, 20), st.integers(0, 5))
def test_reverse_is_flip_scan_flip(assert_near, length, chunk_size, suffix):
    suffix = min(suffix, length)
    inputs = draw(length)

    def turn(tensor: Tensor) -> Tensor:
        body, tail = tensor[:, : length - suffix], tensor[:, length - suffix :]
        return torch.cat([body.flip(1), tail], dim=1)

    turned = inputs | {k: turn(inputs[k]) for k in ("x", "dt", "B", "C")}
    expected, expected_state = ssd_scan(**turned, chunk_size=chunk_size)
    y, state = ssd_scan(**inputs, reverse=True, suffix=suffix, chunk_size=chunk_size)
    assert_near(y, turn(expected), 1e-12)
    assert_near(state, expected_state, 1e-12)


@property_test
@given(st.integers(2, 40), st.data(), st.booleans())
def test_two_scans_with_the_state_passed_on_are_one(assert_near, length, data, reverse):
    cut = data.draw(st.integers(1, length - 1))
    inputs = draw(length)
    expected, expected_state = ssd_scan(**inputs, reverse=reverse)
    parts = [inputs | {k: inputs[k][:, span] for k in ("x", "dt", "B", "C")} for span in (slice(cut), slice(cut, None))]
    first, second = reversed(parts) if reverse else parts
    y_first, state = ssd_scan(**first, reverse=reverse, chunk_size=8)
    y_second, state = ssd_scan(**second | {"initial_state": state}, reverse=reverse, chunk_size=8)
    assert_near(torch.cat([y_second, y_first] if reverse else [y_first, y_second], dim=1), expected, 1e-11)
    assert_near(state, expected_state, 1e-11)


@property_test
@given(st.integers(1, 30), st.integers(0, 5))
def test_suffix_is_a_second_scan_left_to_right(assert_near, length, suffix):
    suffix = min(suffix, length)
    inputs = draw(length)
    y, state = ssd_scan(**inputs, reverse=True, suffix=suffix, chunk_size=8)
    body, tail = (
        inputs | {k: inputs[k][:, span] for k in ("x", "dt", "B", "C")}
        for span in (slice(length - suffix), slice(length - suffix, None))
    )
    expected_state, pieces = inputs["initial_state"], []
    for part, reverse in ((body, True), (tail, False)):
        if part["x"].shape[1]:
            piece, expected_state = ssd_scan(**part | {"initial_state": expected_state}, reverse=reverse)
            pieces.append(piece)
    assert_near(y, torch.cat(pieces, dim=1), 1e-12)
    assert_near(state, expected_state, 1e-12)


@pytest.mark.parametrize("want_final", [True, False])
@pytest.mark.parametrize("absent", [(), ("initial_state",)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_custom_op_keeps_pytorchs_rules(dtype, absent, want_final):
    inputs = draw(9, batch=2, dtype=dtype)
    tensors = [None if k in absent else inputs[k].requires_grad_() for k in NAMES if k != "D"]
    torch.library.opcheck(torch.ops.patchscale.ssd_scan.default, (*tensors, True, 1, 4, False, want_final, True))


def test_custom_op_accepts_strided_tensors():
    # Transposed in memory: dense, so that "like this one" would keep the strides.
    inputs = {k: v.transpose(0, -1).contiguous().transpose(0, -1) for k, v in draw(9).items() if k != "D"}
    tensors = [v.requires_grad_() for v in inputs.values()]
    torch.library.opcheck(torch.ops.patchscale.ssd_scan.default, (*tensors, False, 0, 4, False, True, True))


def test_compiled_whole(assert_near):
    inputs = draw(70)
    compiled = torch.compile(ssd_scan, fullgraph=True, backend="aot_eager")
    expected = scan_and_gradients(ssd_scan, inputs, reverse=True, suffix=1)
    for name, value in scan_and_gradients(compiled, inputs, reverse=True, suffix=1).items():
        assert_near(value, expected[name], 1e-12, name)


@pytest.mark.parametrize("reverse", [False, True])
def test_flop_counter_sees_the_forward(reverse):
    batch, chunks, chunk, heads, headdim, d_state = 3, 2, 64, 4, 8, 16
    inputs = draw(chunks * chunk, batch=batch, heads=heads, headdim=headdim, d_state=d_state)
    with FlopCounterMode(display=False) as counter:
        ssd_scan(**inputs, reverse=reverse, chunk_size=chunk)
    per_chunk = (
        chunk * chunk * d_state  # C B^T, once for all heads
        + heads * chunk * chunk * headdim  # scores times x
        + 2 * heads * chunk * headdim * d_state  # the state read by every token, and written by every token
    )
    assert counter.get_total_flops() == 2 * batch * chunks * per_chunk


# Matrix products of the backward, counted in the code: B C^T again, dB and dC; dx and dscores; and with the state, dx,
# dB, dC and the gradient of the state before.
def test_flop_counter_sees_the_backward():
    batch, chunks, chunk, heads, headdim, d_state = 3, 8, 64, 4, 8, 16
    inputs = {
        k: v.requires_grad_()
        for k, v in draw(chunks * chunk, batch=batch, heads=heads, headdim=headdim, d_state=d_state).items()
    }
    y, _ = ssd_scan(**inputs, chunk_size=chunk)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    square, passes = chunk * chunk, heads * chunk * headdim * d_state
    per_chunk = 3 * square * d_state + 2 * heads * square * headdim + 4 * passes
    assert counter.get_total_flops() == 2 * batch * chunks * per_chunk


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("x", (2, 5, 8), "(batch, length, heads, headdim)"),
        ("dt", (2, 5, 3), "(2, 5, 2)"),
        ("dt", (2, 4, 2), "(2, 5, 2)"),
        ("A", (3,), "(2,)"),
        ("A", (1,), "(2,)"),
        ("B", (2, 4, 6), "(2, 5, 6)"),
        ("B", (1, 5, 6), "(2, 5, 6)"),
        ("C", (2, 5, 7), "(2, 5, 6)"),
        ("D", (1,), "(2,)"),
        ("initial_state", (2, 2, 6, 4), "(2, 2, 4, 6)"),
        ("initial_state", (1, 2, 4, 6), "(2, 2, 4, 6)"),
    ],
)
@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_tensors_that_do_not_fit_are_named(name, shape, expected, implementation):
    inputs = draw(5) | {name: torch.zeros(shape, dtype=torch.float64)}
    with pytest.raises(UserError) as error:
        ssd_scan(**inputs, implementation=implementation)
    message = str(error.value)
    assert message.startswith(f"{name} has shape {shape}")
    assert expected in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"suffix": 6}, "suffix is 6"),
        ({"suffix": -1}, "suffix is -1"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"implementation": "triton!"}, "'triton!'"),
    ],
)
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(UserError, match=words):
        ssd_scan(**draw(5), **options)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_an_empty_sequence_keeps_the_state(implementation):
    inputs = draw(0)
    y, state = ssd_scan(**inputs, implementation=implementation)
    assert y.shape == inputs["x"].shape
    assert torch.equal(state, inputs["initial_state"])


def test_an_empty_batch_is_an_empty_result():
    y, state = ssd_scan(**draw(5, batch=0))
    assert y.shape == (0, 5, 2, 4)
    assert state.shape == (0, 2, 4, 6)


def test_tangents_are_refused_but_by_the_reference(assert_near):
    inputs = draw(20)
    direction = torch.randn_like(inputs["x"])

    def y(x, implementation):
        return ssd_scan(**inputs | {"x": x}, implementation=implementation)[0]

    with pytest.raises(UserError, match="ssd_scan has no forward-mode derivative"):
        torch.func.jvp(lambda x: y(x, "torch"), (inputs["x"],), (direction,))
    _, tangent = torch.func.jvp(lambda x: y(x, "reference"), (inputs["x"],), (direction,))
    without_skip = {k: v for k, v in inputs.items() if k not in ("x", "initial_state")}
    assert_near(tangent, ssd_scan(direction, **without_skip)[0], 1e-10)  # the scan is linear in x
