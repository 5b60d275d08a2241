"""Linear layers in oneDNN, on whatever processor the tests run."""

import copy
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from patchscale.models.backbone import _PRODUCTS
from patchscale.ops import linear as module
from patchscale.ops.linear import PRODUCTS, Linear, convert_linear, linear, mkl_is_slow


class Called(TorchDispatchMode):
    """How often oneDNN is called."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in PRODUCTS
        return func(*args, **kwargs or {})


@pytest.fixture(scope="module", autouse=True)
def slow_mkl():
    if not PRODUCTS:
        pytest.skip("this PyTorch has no oneDNN")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "mkl_is_slow", lambda: True)
        patch.setattr(module, "_FEWEST_MULTIPLICATIONS", 1)
        yield


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def gradients(function, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    inside=st.integers(1, 70),
    out=st.integers(1, 70),
    bias=st.booleans(),
)
def test_values_and_gradients_are_those_of_float64(shape, inside, out, bias, assert_near):
    torch.manual_seed(0)
    inputs = leaves(torch.randn(*shape, inside), torch.randn(out, inside), *[torch.randn(out)] * bias)
    grad = torch.randn(*shape, out)
    exact = gradients(F.linear, leaves(*(t.double() for t in inputs)), grad.double())
    for actual, expected in zip(gradients(linear, inputs, grad), exact, strict=True):
        assert_near(actual, expected, 1e-5)


@pytest.mark.parametrize("rows", [2048, 2049, 5000])
@pytest.mark.parametrize(("inside", "out"), [(64, 160), (160, 64)])
def test_rows_that_are_summed_in_parts(rows, inside, out, assert_near):
    torch.manual_seed(0)
    inputs = leaves(torch.randn(rows, inside), torch.randn(out, inside))
    grad = torch.randn(rows, out)
    exact = gradients(F.linear, leaves(*(t.double() for t in inputs)), grad.double())
    with Called() as called:
        found = gradients(linear, inputs, grad)
    assert called.products == 2 + -(-rows // 2048)
    for actual, expected in zip(found, exact, strict=True):
        assert_near(actual, expected, 1e-5)


def test_parts_of_a_sum_are_not_held():
    class Alive(TorchDispatchMode):
        most, products = 0, weakref.WeakSet()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if func in PRODUCTS:
                self.products.add(out.untyped_storage())
                self.most = max(self.most, len(self.products))
            return out

    weight = nn.Parameter(torch.randn(40, 32))
    out = linear(torch.randn(9 * 2048, 32), weight)
    with Alive() as alive:
        out.backward(torch.ones_like(out))
    assert alive.most == 2


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, ::2],
        lambda t: t.transpose(0, 1),
        lambda t: t[..., 8:40],
        lambda t: t[:1].expand(3, -1, -1),
        lambda t: t.flip(1)[:, 3:],
    ],
)
def test_views(view, assert_near):
    torch.manual_seed(0)
    x = view(torch.randn(4, 50, 48))
    weight = torch.randn(x.shape[-1], 24).t()
    with Called() as called:
        out = linear(x, weight)
    assert called.products == 1
    assert_near(out, F.linear(x.double(), weight.double()), 1e-5)


def test_an_expanded_gradient(assert_near):
    torch.manual_seed(0)
    x, weight = leaves(torch.randn(100, 32), torch.randn(40, 32))
    linear(x, weight).sum().backward()
    assert_near(weight.grad, x.detach().sum(0).expand(40, 32), 1e-5)
    assert_near(x.grad, weight.detach().sum(0).expand(100, 32), 1e-5)


def test_only_the_gradients_that_are_wanted():
    x, weight = torch.randn(100, 32), nn.Parameter(torch.randn(40, 32))
    with Called() as called:
        linear(x, weight).sum().backward()
    assert called.products == 2


def test_gradients_of_gradients(assert_near):
    torch.manual_seed(0)
    found = []
    for function in (linear, F.linear):
        x, weight, bias = leaves(*(t.clone() for t in (torch.ones(60, 8).cumsum(0) / 60, torch.eye(8), torch.ones(8))))
        first = torch.autograd.grad(function(x, weight, bias).square().sum(), (x, weight), create_graph=True)
        found.append(torch.autograd.grad(sum(g.pow(3).sum() for g in first), (x, weight, bias)))
    for actual, expected in zip(*found, strict=True):
        assert_near(actual, expected, 1e-5)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(32), torch.randn(8, 32)),
        (torch.randn(0, 32), torch.randn(8, 32)),
        (torch.randn(64, 32, dtype=torch.float64), torch.randn(8, 32, dtype=torch.float64)),
        (torch.randn(64, 32, dtype=torch.bfloat16), torch.randn(8, 32, dtype=torch.bfloat16)),
        (torch.randn(64, 32, device="meta"), torch.randn(8, 32, device="meta")),
        (torch.randn(64, 0), torch.randn(8, 0)),
        (torch.randn(64, 32), torch.randn(0, 32)),
    ],
)
def test_what_onednn_is_not_for_is_pytorch_s(x, weight):
    with Called() as called:
        out = linear(x, weight)
    assert called.products == 0
    assert out.shape == (*x.shape[:-1], weight.shape[0])
    assert out.dtype == x.dtype


def test_small_products_are_pytorch_s(monkeypatch):
    monkeypatch.setattr(module, "_FEWEST_MULTIPLICATIONS", 2**14)
    for rows, expected in ((63, 0), (64, 1)):
        with Called() as called:
            linear(torch.randn(rows, 32), torch.randn(8, 32))
        assert called.products == expected


class Gaps(TorchDispatchMode):
    """Whether a product's second factor was one whose rows, or columns, do not follow each other."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            weight = args[1]
            self.found.append(not (weight.is_contiguous() or weight.t().is_contiguous()))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("slices", ["x", "weight", "grad"])
@pytest.mark.parametrize(("inside", "out"), [(24, 40), (40, 24)])
def test_no_product_reads_over_gaps(inside, out, slices, assert_near):
    """oneDNN has no fast kernel for them: a layer that read some of another's channels took a second."""
    torch.manual_seed(0)
    shapes = {"x": (50, inside), "weight": (out, inside), "grad": (50, out)}
    given = {k: torch.randn(n, 2 * m)[:, :m] if k == slices else torch.randn(n, m) for k, (n, m) in shapes.items()}
    x, weight = leaves(given["x"], given["weight"])
    with Gaps() as gaps:
        found = gradients(linear, [x, weight], given["grad"])
    assert gaps.found == [False] * 3
    exact = gradients(F.linear, leaves(x.double(), weight.double()), given["grad"].double())
    for actual, expected in zip(found, exact, strict=True):
        assert_near(actual, expected, 1e-5)


def test_autocast_is_kept():
    with torch.autocast("cpu", torch.bfloat16), Called() as called:
        assert linear(torch.randn(64, 32), torch.randn(8, 32)).dtype == torch.bfloat16
    assert called.products == 0


def test_shapes_that_do_not_fit_are_pytorch_s_error():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear(torch.randn(64, 31), torch.randn(8, 32))


def test_flops_are_those_of_pytorch_s():
    x, weight, bias = leaves(torch.randn(5, 30, 32), torch.randn(8, 32), torch.randn(8))
    totals = []
    for function in (linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            function(x, weight, bias).sum().backward()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 3 * 2 * 5 * 30 * 32 * 8


def test_products_are_kept_where_the_rest_is_recomputed():
    layers = nn.Sequential(Linear(32, 40), nn.SiLU(), Linear(40, 32))
    x = torch.randn(64, 32, requires_grad=True)

    def calls(**options) -> int:
        with Called() as called:
            checkpoint(layers, x, use_reentrant=False, **options).sum().backward()
        return called.products

    kept = calls(context_fn=lambda: create_selective_checkpoint_contexts(_PRODUCTS))
    assert (kept, calls()) == (6, 8)


def test_other_libraries_layers():
    theirs = nn.TransformerEncoderLayer(32, 2, 48, 0.0, batch_first=True)
    ours = convert_linear(copy.deepcopy(theirs))
    assert type(ours.linear1) is Linear
    assert type(ours.self_attn.out_proj) is type(theirs.self_attn.out_proj)  # a subclass, with ways of its own
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(2, 30, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_compiled_it_is_pytorch_s_own():
    layer = Linear(32, 40)
    x = torch.randn(64, 32)
    targets = []

    def backend(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch.testing.assert_close(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x), rtol=1e-4, atol=1e-5)
    assert targets == [torch._C._nn.linear]


def test_function_transforms(assert_near):
    torch.manual_seed(0)
    x, weight, direction = torch.randn(3, 40, 32), torch.randn(24, 32), torch.randn(24, 32)
    residual = torch.einsum("bli,oi->blo", x, weight)
    of_samples = 2 * torch.einsum("blo,bli->boi", residual, x)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return linear(x, weight).square().sum()

    assert_near(torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x), of_samples, 1e-5)
    _, along = torch.func.jvp(lambda w: loss(w, x), (weight,), (direction,))
    assert_near(along, (of_samples.sum(0) * direction).sum(), 1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual, x)).tangent
    assert_near(tangent, along, 1e-5)


def test_torchscript_records_pytorch_s_own():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        traced = torch.jit.trace(Linear(32, 40), torch.randn(64, 32))
    assert "aten::linear" in str(traced.graph)


@pytest.mark.parametrize(
    ("processor", "slow"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_f": False}, False),
        ({"cpu_name": "Intel Xeon", "avx512_f": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_which_processors(monkeypatch, processor, slow):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert mkl_is_slow.__wrapped__() == slow


@pytest.mark.parametrize("shape", [(30,), (2, 30), (2, 3, 30)])
def test_the_result_may_be_written_over(shape, assert_near):
    x, weight, expected = torch.randn(*shape, 24), *2 * (nn.Parameter(torch.randn(40, 24)),)
    out = linear(x, weight)
    out += 1
    (found,) = torch.autograd.grad(F.relu(out, inplace=True).sum(), weight)
    (wanted,) = torch.autograd.grad(F.relu(F.linear(x, expected) + 1).sum(), expected)
    assert_near(found, wanted, 1e-5)


@pytest.mark.parametrize("layout", ["every second", "expanded", "one for all", "a row"])
def test_biases_of_any_layout(layout, assert_near):
    numbers = torch.randn(80)
    biases = {"every second": numbers[::2], "expanded": numbers[:1].expand(40), "one for all": numbers[:1]}
    bias = biases.get(layout, numbers[None, :40])
    x, weight = torch.randn(30, 24), torch.randn(40, 24)
    assert_near(linear(x, weight, bias), F.linear(x, weight, bias), 1e-6)
