"""The operators against a dense float64 reference, and torch's own checks of operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vision_plugin import kernels
from vision_plugin.kernels import _operators

from .reference import KINDS, dense_batch_topk, dense_topk, inputs

ENCODER = ("x", "W_enc", "b_enc", "b_in")
shapes = st.tuples(st.integers(0, 9), st.integers(1, 13), st.integers(1, 300))


def _leaves(tensors):
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


def _assert_same_gradients(ours, theirs):
    for name, tensor in ours.items():
        expected = theirs[name].grad
        if expected is None:
            expected = torch.zeros_like(tensor)
        found = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(KINDS), st.booleans(), st.booleans(), st.data())
def test_topk_and_its_gradients_match_the_dense_reference(shape, kind, rescale, centre, data):
    batch, d_in, d_sae = shape
    k = data.draw(st.sampled_from([1, d_sae, data.draw(st.integers(1, d_sae))]))
    tensors = inputs(batch, d_in, d_sae, kind=kind)
    ours, theirs = _leaves(tensors), _leaves(tensors)
    scale = tensors["W_dec"].norm(dim=1) + 0.1 if rescale else None
    values, indices = kernels.topk_encode(
        ours["x"],
        ours["W_enc"],
        ours["b_enc"],
        k,
        b_in=ours["b_in"] if centre else None,
        scale=scale,
    )
    out = kernels.sparse_decode(values, indices, ours["W_dec"], ours["b_dec"])
    dense, expected_indices = dense_topk(
        theirs["x"], theirs["W_enc"], theirs["b_enc"], k, theirs["b_in"] if centre else None, scale
    )
    expected = dense @ theirs["W_dec"] + theirs["b_dec"]
    assert indices.dtype == torch.int32
    assert torch.equal(indices.long(), expected_indices)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    out.backward(cotangent)
    expected.backward(cotangent)
    _assert_same_gradients(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(KINDS), st.booleans(), st.floats(0.01, 20), st.booleans())
def test_batch_topk_and_matryoshka_match_the_dense_reference(shape, kind, rescale, k, padded):
    batch, d_in, d_sae = shape
    tensors = inputs(batch, d_in, d_sae, kind=kind)
    ours, theirs = _leaves(tensors), _leaves(tensors)
    scale = tensors["W_dec"].norm(dim=1) + 0.1 if rescale else None
    latents = kernels.batch_topk_encode(
        ours["x"], ours["W_enc"], ours["b_enc"], k, b_in=ours["b_in"], scale=scale, padded=padded
    )
    assert not (padded and batch) or latents.values.shape == (int(k * batch),)
    pre = (theirs["x"] - theirs["b_in"]) @ theirs["W_enc"] + theirs["b_enc"]
    dense = dense_batch_topk(pre, scale, int(k * batch))
    torch.testing.assert_close(latents.to_dense(), dense, rtol=1e-9, atol=1e-9)
    widths = sorted({max(1, d_sae // 3), max(1, d_sae // 2), d_sae})
    levels = kernels.matryoshka_decode(latents, ours["W_dec"], ours["b_dec"], widths)
    expected = torch.stack(
        [dense[:, :width] @ theirs["W_dec"][:width] + theirs["b_dec"] for width in widths]
    )
    torch.testing.assert_close(levels, expected, rtol=1e-9, atol=1e-9)
    cotangent = torch.linspace(-1, 1, levels.numel(), dtype=levels.dtype).view_as(levels)
    levels.backward(cotangent)
    expected.backward(cotangent)
    _assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d_sae", [4096, 4099])
def test_a_wide_dictionary_takes_the_route_over_tiles_and_selects_the_same(kind, d_sae):
    t = inputs(17, 5, d_sae, kind=kind)
    _, indices = kernels.topk_encode(t["x"], t["W_enc"], t["b_enc"], 7, b_in=t["b_in"])
    _, expected = dense_topk(t["x"], t["W_enc"], t["b_enc"], 7, t["b_in"], None)
    assert torch.equal(indices.long(), expected)
    latents = kernels.batch_topk_encode(t["x"], t["W_enc"], t["b_enc"], 7.3, b_in=t["b_in"])
    pre = (t["x"] - t["b_in"]) @ t["W_enc"] + t["b_enc"]
    torch.testing.assert_close(latents.to_dense(), dense_batch_topk(pre, None, int(7.3 * 17)))


def test_batches_larger_than_one_chunk_select_the_same(monkeypatch):
    from vision_plugin.kernels import _torch_backend

    t = inputs(23, 6, 200, kind="ties")
    whole = kernels.batch_topk_encode(t["x"], t["W_enc"], t["b_enc"], 3)
    values, indices = kernels.topk_encode(t["x"], t["W_enc"], t["b_enc"], 3)
    threshold = torch.full((200,), 0.5, dtype=torch.float64)
    above = kernels.threshold_encode(t["x"], t["W_enc"], t["b_enc"], threshold)
    monkeypatch.setattr(_torch_backend, "_CPU_ELEMENTS", 1000)
    parts = kernels.batch_topk_encode(t["x"], t["W_enc"], t["b_enc"], 3)
    assert torch.equal(parts.to_dense(), whole.to_dense())
    part_values, part_indices = kernels.topk_encode(t["x"], t["W_enc"], t["b_enc"], 3)
    assert torch.equal(part_values, values)
    assert torch.equal(part_indices, indices)
    part_above = kernels.threshold_encode(t["x"], t["W_enc"], t["b_enc"], threshold)
    assert torch.equal(part_above.to_dense(), above.to_dense())


@pytest.mark.parametrize("low", [-0.3, 0.0, 0.7])
def test_threshold_keeps_what_jumprelu_keeps(low):
    t = _leaves(inputs(9, 7, 50))
    threshold = torch.linspace(low, low + 1, 50, dtype=torch.float64)
    latents = kernels.threshold_encode(t["x"], t["W_enc"], t["b_enc"], threshold, b_in=t["b_in"])
    pre = (t["x"] - t["b_in"]) @ t["W_enc"] + t["b_enc"]
    expected = pre.relu() * (pre > threshold)
    torch.testing.assert_close(latents.to_dense(), expected)
    ours = torch.autograd.grad(latents.to_dense().pow(2).sum(), [t[name] for name in ENCODER])
    theirs = torch.autograd.grad(expected.pow(2).sum(), [t[name] for name in ENCODER])
    for found, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted)


def test_one_latent_that_every_row_selects_gets_its_whole_gradient():
    t = _leaves(inputs(1000, 3, 20))
    with torch.no_grad():
        t["b_enc"][7] += 1e3
    values, indices = kernels.topk_encode(t["x"], t["W_enc"], t["b_enc"], 1)
    assert (indices == 7).all()
    kernels.sparse_decode(values, indices, t["W_dec"]).sum().backward()
    torch.testing.assert_close(t["W_dec"].grad[7], values.sum().expand(3))
    assert t["W_dec"].grad.count_nonzero() == 3


def test_gradcheck_of_topk_and_batch_topk():
    t = _leaves(inputs(5, 4, 30))
    names = (*ENCODER, "W_dec", "b_dec")

    def topk(x, W_enc, b_enc, b_in, W_dec, b_dec):
        values, indices = kernels.topk_encode(x, W_enc, b_enc, 3, b_in=b_in, relu=False)
        return kernels.sparse_decode(values, indices, W_dec, b_dec)

    def batch_topk(x, W_enc, b_enc, b_in, W_dec, b_dec):
        latents = kernels.batch_topk_encode(x, W_enc, b_enc, 3, b_in=b_in)
        return kernels.matryoshka_decode(latents, W_dec, b_dec, [5, 11, 30])

    assert torch.autograd.gradcheck(topk, tuple(t[name] for name in names))
    assert torch.autograd.gradcheck(batch_topk, tuple(t[name] for name in names))


def test_opcheck_accepts_every_operator():
    t = inputs(6, 5, 40)
    encoder = [t[name].clone().requires_grad_() for name in ENCODER]
    scale = t["W_dec"].norm(dim=1)
    indices = torch.tensor([3, 1, 1, 39, 0], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    weights = torch.randn(5, dtype=torch.float64, requires_grad=True)
    by_row = torch.tensor([[3, 1], [1, 39], [0, 5]], dtype=torch.int32)
    row_weights = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    levels = torch.tensor([0, 2, 2, 3, 5], dtype=torch.int32)
    W_dec = t["W_dec"].clone().requires_grad_()
    b_dec = t["b_dec"].clone().requires_grad_()
    segments = torch.randn(3, 5, dtype=torch.float64)
    cases = [
        (_operators.encode_topk, (*encoder, scale, 4, True, None, "torch")),
        (_operators.encode_topk, (*encoder[:3], None, None, 4, False, None, "torch")),
        (_operators.encode_batch_topk, (*encoder, scale, 20, False, None, "torch")),
        (_operators.encode_batch_topk, (*encoder, scale, 200, True, None, "torch")),
        (_operators.encode_threshold, (*encoder, torch.zeros(40).double(), None, "torch")),
        (_operators.gather_sum, (W_dec, indices, offsets, weights, b_dec, "torch")),
        (_operators.gather_sum, (W_dec, by_row, None, row_weights, b_dec, "torch")),
        (_operators.level_sums, (W_dec, indices, levels, weights, b_dec, 2, "torch")),
        (_operators.pair_dot, (segments, t["W_dec"], indices, offsets, "torch")),
        (_operators.pair_dot, (segments, t["W_dec"], by_row, None, "torch")),
        (_operators.segment_sum, (weights.detach(), offsets, "torch")),
        (_operators.transpose, (indices, offsets, 40, "torch")),
        (_operators.transpose, (by_row, None, 40, "torch")),
    ]
    for operator, arguments in cases:
        torch.library.opcheck(operator, arguments)


def test_compiled_training_gives_the_eager_gradients():
    t = inputs(6, 5, 64)

    def loss(x, W_enc, b_enc, b_in, W_dec, b_dec):
        values, indices = kernels.topk_encode(
            x, W_enc, b_enc, 4, b_in=b_in, scale=W_dec.norm(dim=1)
        )
        return (kernels.sparse_decode(values, indices, W_dec, b_dec) - x).pow(2).sum()

    eager, compiled = _leaves(t), _leaves(t)
    loss(*eager.values()).backward()
    # aot_eager traces forward and backward as Inductor does, without a C++ compiler's minutes.
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled.values()).backward()
    for name in eager:
        torch.testing.assert_close(compiled[name].grad, eager[name].grad)


def test_autocast_runs_the_product_in_bfloat16_and_the_rest_in_float32(device):
    t = {name: tensor.float() for name, tensor in inputs(64, 32, 256).items()}
    ours = _leaves(t)
    with torch.autocast(device, dtype=torch.bfloat16):
        values, indices = kernels.topk_encode(ours["x"], ours["W_enc"], ours["b_enc"], 8)
        out = kernels.sparse_decode(values, indices, ours["W_dec"], ours["b_dec"])
    pre = (t["x"].bfloat16() @ t["W_enc"].bfloat16()).float() + t["b_enc"]
    assert values.dtype == out.dtype == torch.float32
    torch.testing.assert_close(values, pre.gather(1, indices.long()).relu())
    exact, _ = kernels.topk_encode(t["x"], t["W_enc"], t["b_enc"], 8)
    assert not torch.equal(values, exact), "the product did not run in autocast's dtype"
    out.sum().backward()
    assert ours["W_enc"].grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_runs_give_the_same_bits(dtype):
    kind = "random" if dtype == torch.float16 else "skewed"  # which would overflow float16
    t = {name: tensor.to(dtype) for name, tensor in inputs(300, 24, 512, kind=kind).items()}
    results = []
    for _ in range(2):
        leaves = _leaves(t)
        values, indices = kernels.topk_encode(leaves["x"], leaves["W_enc"], leaves["b_enc"], 9)
        out = kernels.sparse_decode(values, indices, leaves["W_dec"], leaves["b_dec"])
        out.float().pow(2).sum().backward()
        results.append([out, values, indices, *(leaf.grad for leaf in leaves.values())])
    for first, second in zip(*results, strict=True):
        assert first is second is None or torch.equal(first, second)


def test_half_precision_accumulates_in_float32():
    weight = torch.ones(4096, 2, dtype=torch.bfloat16)
    indices = torch.arange(4096)[None]
    values = torch.ones(1, 4096, dtype=torch.bfloat16)
    # Added up in bfloat16, ones stop counting at 256.
    assert kernels.sparse_decode(values, indices, weight).tolist() == [[4096.0, 4096.0]]


def test_inputs_need_not_be_contiguous():
    t = inputs(12, 8, 90)
    strided = {
        "x": t["x"].t().contiguous().t(),
        "W_enc": t["W_enc"].t().contiguous().t(),
        "b_enc": torch.stack([t["b_enc"]] * 2, dim=1)[:, 0],
        "W_dec": torch.cat([t["W_dec"], t["W_dec"]], dim=1)[:, :8],
    }
    results = []
    for source in (t, strided):
        leaves = {name: source[name].detach().requires_grad_() for name in strided}
        values, indices = kernels.topk_encode(leaves["x"], leaves["W_enc"], leaves["b_enc"], 5)
        out = kernels.sparse_decode(values.t().contiguous().t(), indices, leaves["W_dec"])
        results.append((out, *torch.autograd.grad(out.pow(2).sum(), list(leaves.values()))))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain)


def test_leading_axes_are_kept():
    t = inputs(6, 5, 40)
    x = t["x"].view(2, 3, 5)
    values, indices = kernels.topk_encode(x, t["W_enc"], t["b_enc"], 4)
    assert values.shape == indices.shape == (2, 3, 4)
    assert kernels.sparse_decode(values, indices, t["W_dec"]).shape == (2, 3, 5)


def test_no_dense_gradient_is_ever_made(monkeypatch):
    """Nothing of the size of [batch, d_sae] is allocated in the backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    batch, d_sae = 2000, 500
    t = _leaves(inputs(batch, 4, d_sae))
    values, indices = kernels.topk_encode(t["x"], t["W_enc"], t["b_enc"], 5, b_in=t["b_in"])
    loss = kernels.sparse_decode(values, indices, t["W_dec"], t["b_dec"]).sum()
    with Largest() as largest:
        loss.backward()
    assert 0 < largest.elements < batch * d_sae / 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k=0 is out of range"),
        ({"k": 41}, "W_enc has 40 latents"),
        ({"W_enc": torch.zeros(6, 40).double()}, "do not fit"),
        ({"b_enc": torch.zeros(39).double()}, r"b_enc must have shape \[40\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    t = inputs(3, 5, 40)
    arguments = {"x": t["x"], "W_enc": t["W_enc"], "b_enc": t["b_enc"], "k": 4} | change
    with pytest.raises(ValueError, match=message):
        kernels.topk_encode(**arguments)


def test_matryoshka_widths_must_end_at_the_dictionarys_width():
    t = inputs(3, 5, 40)
    latents = kernels.batch_topk_encode(t["x"], t["W_enc"], t["b_enc"], 4)
    with pytest.raises(ValueError, match="end at d_sae=40"):
        kernels.matryoshka_decode(latents, t["W_dec"], None, [10, 20])


def test_rows_of_one_length_decode_as_their_values_and_indices_are_now():
    values, indices = torch.rand(3, 2), torch.tensor([[0, 4], [1, 2], [3, 4]], dtype=torch.int32)
    W_dec = torch.randn(5, 6)
    latents = kernels.SparseLatents.from_topk(values, indices, d_sae=5)
    for change in ("none", "in place", "others", "strided", "gradients"):
        if change == "in place":
            latents.values.mul_(2)
        elif change == "others":
            latents.values, latents.indices = latents.values + 1, latents.indices.flip(0)
        elif change == "strided":
            latents = kernels.SparseLatents.from_topk(values.T.contiguous().T, indices, d_sae=5)
        elif change == "gradients":
            latents.values.requires_grad_()
        decoded = kernels.csr_decode(latents, W_dec)
        torch.testing.assert_close(decoded, latents.to_dense() @ W_dec)
    decoded.sum().backward()
    torch.testing.assert_close(latents.values.grad, W_dec.sum(1)[latents.indices])


def test_latents_convert_to_coo_and_drop_zeros():
    t = inputs(5, 6, 30, kind="negative")
    t["b_enc"][3] = 1e3
    values, indices = kernels.topk_encode(t["x"], t["W_enc"], t["b_enc"], 4)
    latents = kernels.SparseLatents.from_topk(values, indices, d_sae=30)
    pruned = latents.prune()
    assert pruned.indices.tolist() == [3] * 5
    assert pruned.offsets.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(latents.to_sparse_coo().to_dense(), latents.to_dense())
    assert torch.equal(pruned.to_dense(), latents.to_dense())


@pytest.mark.parametrize("chosen", [[], [7], [29, 0, 29, 3], list(range(30))])
def test_columns_of_sparse_latents_are_those_of_the_dense_ones(chosen: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(6, 30, generator=generator, device="cpu").relu()
    dense = dense.to(torch.get_default_device())
    dense[:, 3] = 0  # a latent that is never active
    dense[4] = 0  # and a row without any
    rows, indices = dense.nonzero(as_tuple=True)
    offsets = torch.searchsorted(rows, torch.arange(7), out_int32=True)
    latents = kernels.SparseLatents(dense[rows, indices], indices.int(), offsets, 30)
    for _ in range(2):
        assert torch.equal(latents.columns(torch.tensor(chosen)), dense[:, chosen])
    empty = kernels.SparseLatents(torch.zeros(0), torch.zeros(0).int(), torch.zeros(1).int(), 30)
    assert empty.columns(torch.tensor(chosen)).shape == (0, len(chosen))


@pytest.mark.parametrize("d_sae", [40, 4096])
@pytest.mark.parametrize("where", [[3], [0, 7, 39], list(range(40))])
def test_nan_is_selected_before_every_number_as_torch_does(d_sae, where):
    """SAELens's activations keep NaN: a selection that dropped it would train on in silence."""
    t = inputs(6, 5, d_sae)
    t["b_enc"][where] = torch.nan
    pre = t["x"] @ t["W_enc"] + t["b_enc"]

    values, indices = kernels.topk_encode(t["x"], t["W_enc"], t["b_enc"], 4)
    top = torch.zeros_like(pre).scatter(1, (best := pre.topk(4)).indices, best.values.relu())
    if len(where) <= 4:
        expected = top.gather(1, indices.long())
        torch.testing.assert_close(values, expected, equal_nan=True)
    assert int(values.isnan().sum()) == int(top.isnan().sum())

    flat = pre.relu().flatten()
    best = flat.topk(4 * 6)
    expected = torch.zeros_like(flat).scatter(0, best.indices, best.values).view_as(pre)
    found = kernels.batch_topk_encode(t["x"], t["W_enc"], t["b_enc"], 4).to_dense()
    assert int(found.isnan().sum()) == int(expected.isnan().sum())
    if len(where) * 6 <= 4 * 6:
        torch.testing.assert_close(found, expected, equal_nan=True)

    threshold = torch.linspace(-0.5, 0.5, d_sae, dtype=torch.float64)
    threshold[1] = torch.nan
    found = kernels.threshold_encode(t["x"], t["W_enc"], t["b_enc"], threshold).to_dense()
    torch.testing.assert_close(found, pre.relu() * (pre > threshold), equal_nan=True)


def test_nan_beside_a_tie_at_the_boundary_keeps_k_latents():
    t = inputs(4, 3, 40, kind="zeros")
    t["b_enc"][20] = torch.nan
    values, indices = kernels.topk_encode(t["x"], t["W_enc"], t["b_enc"], 3, b_in=t["b_in"])
    assert indices.tolist() == [[0, 1, 20]] * 4
    assert values.isnan().tolist() == [[False, False, True]] * 4


def _chunked(monkeypatch):
    from vision_plugin.kernels import _torch_backend

    monkeypatch.setattr(_torch_backend, "_CPU_ELEMENTS", 100)


def test_nan_survives_the_choice_among_chunks(monkeypatch):
    _chunked(monkeypatch)
    t = inputs(9, 5, 40)
    t["x"][4] = torch.nan
    found = kernels.batch_topk_encode(t["x"], t["W_enc"], t["b_enc"], 5).to_dense()
    assert found[4].isnan().all()


def _errors_of_the_host(device):
    if device != "cpu":
        pytest.skip("a GPU reports these as a fault of the device, after which it takes no calls")


@pytest.mark.parametrize("wrong", [-1, 40, 10**6])
def test_a_latent_that_the_decoder_has_not_is_an_error(wrong, device):
    _errors_of_the_host(device)
    t = inputs(2, 5, 40)
    indices = torch.tensor([[0, 1], [2, wrong]])
    values = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(IndexError, match=f"latent {wrong} is out of range: W_dec has 40 rows"):
        kernels.sparse_decode(values, indices, t["W_dec"])
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    latents = kernels.SparseLatents(values.flatten(), indices.flatten().int(), offsets, 40)
    with pytest.raises(IndexError, match=f"latent {wrong} is out of range"):
        kernels.csr_decode(latents, t["W_dec"])


@pytest.mark.parametrize("offsets", [[0, 2, 9], [1, 2, 4], [0, 3, 2], []])
def test_rows_that_are_not_places_of_the_values_are_an_error(offsets, device):
    _errors_of_the_host(device)
    t = inputs(2, 5, 40)
    places = torch.tensor(offsets, dtype=torch.int32)
    latents = kernels.SparseLatents(torch.ones(4).double(), torch.arange(4).int(), places, 40)
    with pytest.raises(ValueError, match="offsets"):
        kernels.csr_decode(latents, t["W_dec"])
    short = kernels.SparseLatents(torch.ones(3), torch.arange(4).int(), torch.tensor([0, 4]), 40)
    with pytest.raises(ValueError, match="4 indices need as many values, got 3"):
        kernels.csr_decode(short, t["W_dec"])


def _forward_mode(function, tensors, name):
    """The function's derivative along one input, by dual numbers."""
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        return function({**tensors, name: dual})


@pytest.mark.parametrize("name", ["x", "W_enc", "b_enc", "b_in", "W_dec"])
@pytest.mark.parametrize("kind", ["topk", "batch topk", "threshold"])
def test_forward_mode_is_refused_and_not_zero(name, kind):
    t = inputs(3, 5, 40)

    def step(t):
        arguments = (t["x"], t["W_enc"], t["b_enc"])
        if kind == "topk":
            values, indices = kernels.topk_encode(*arguments, 4, b_in=t["b_in"])
            return kernels.sparse_decode(values, indices, t["W_dec"], t["b_dec"])
        if kind == "batch topk":
            latents = kernels.batch_topk_encode(*arguments, 4, b_in=t["b_in"])
        else:
            latents = kernels.threshold_encode(*arguments, t["b_enc"].detach(), b_in=t["b_in"])
        return kernels.matryoshka_decode(latents, t["W_dec"], t["b_dec"], [9, 40])

    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        _forward_mode(step, t, name)
    with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
        torch.func.jvp(lambda v: step({**t, name: v}), (t[name],), (torch.ones_like(t[name]),))


def _encoders():
    def topk(x, W_enc, b_enc, W_dec):
        values, indices = kernels.topk_encode(x, W_enc, b_enc, 4)
        return kernels.sparse_decode(values, indices, W_dec)

    def batch_topk(x, W_enc, b_enc, W_dec):
        latents = kernels.batch_topk_encode(x, W_enc, b_enc, 3.5)
        return kernels.csr_decode(latents, W_dec)

    def matryoshka(x, W_enc, b_enc, W_dec):
        latents = kernels.batch_topk_encode(x, W_enc, b_enc, 4)
        return kernels.matryoshka_decode(latents, W_dec, None, [9, 40])

    def threshold(x, W_enc, b_enc, W_dec):
        latents = kernels.threshold_encode(x, W_enc, b_enc, torch.zeros_like(b_enc))
        return kernels.csr_decode(latents, W_dec)

    return {f.__name__: f for f in (topk, batch_topk, matryoshka, threshold)}


@pytest.mark.parametrize("name", _encoders())
def test_a_compiled_sparse_step_is_one_graph(name):
    step = _encoders()[name]
    t = inputs(6, 5, 40)
    eager, compiled = (
        {n: t[n].clone().requires_grad_() for n in ("x", "W_enc", "b_enc", "W_dec")} for _ in "ab"
    )
    expected = step(*eager.values())
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled.values())
    torch.testing.assert_close(found, expected)
    expected.pow(2).sum().backward()
    found.pow(2).sum().backward()
    for n in eager:
        torch.testing.assert_close(compiled[n].grad, eager[n].grad)


@pytest.mark.parametrize("name", _encoders())
def test_an_exported_sparse_step_takes_batches_of_any_size(name):
    step = _encoders()[name]

    class Step(torch.nn.Module):
        def forward(self, x, W_enc, b_enc, W_dec):
            return step(x, W_enc, b_enc, W_dec)

    t = inputs(6, 5, 40)
    weights = (t["W_enc"], t["b_enc"], t["W_dec"])
    batch = torch.export.Dim("batch", min=2, max=4096)
    exported = torch.export.export(
        Step(), (t["x"], *weights), dynamic_shapes=({0: batch}, None, None, None)
    )
    x = inputs(17, 5, 40, seed=1)["x"]
    torch.testing.assert_close(exported.module()(x, *weights), step(x, *weights))


def test_a_call_past_the_operator_gives_its_bits_and_leaves_modes_to_it():
    """Without gradients the function behind an operator runs at once, unless something watches."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    t = inputs(6, 5, 40)
    encoder = (t["x"], t["W_enc"], t["b_enc"])
    values, indices = kernels.topk_encode(*encoder, 4)
    operator = _operators.encode_topk(*encoder, None, None, 4, True, None, "auto")
    assert torch.equal(values, operator[0])
    assert torch.equal(indices, operator[1])
    out = kernels.sparse_decode(values, indices, t["W_dec"], t["b_dec"])
    arguments = (t["W_dec"], indices, None, values, t["b_dec"], "auto")
    assert torch.equal(out, _operators.gather_sum(*arguments))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in encoder]
        shapes = [tensor.shape for tensor in kernels.topk_encode(*fakes, 4)]
    assert shapes == [(6, 4), (6, 4)]
