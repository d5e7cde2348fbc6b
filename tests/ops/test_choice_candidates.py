"""Each candidate of a convolution computes what the call asks for, and leaves what it is given as it was."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as TF

from segfast.ops._call import CANDIDATES, Call, Candidate
from segfast.ops._epilogue import ACTIVATIONS

CONV2D = Call(
    operation="conv2d",
    dtype=torch.float32,
    channels_last=True,
    input=(1, 8, 12, 10),
    weight=(6, 8, 3, 3),
    stride=(1, 1),
    padding=(1, 1),
    output_padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    bias=True,
    residual=False,
    activation="relu",
    threads=1,
)
TRANSPOSED = CONV2D._replace(
    operation="conv_transpose2d", weight=(8, 6, 2, 2), stride=(2, 2), padding=(0, 0), activation=None
)
DEPTHWISE = CONV2D._replace(groups=8, weight=(8, 1, 3, 3))
DILATED = CONV2D._replace(dtype=torch.bfloat16, dilation=(6, 6), padding=(6, 6))
CALLS = {
    "plain": CONV2D,
    "nchw": CONV2D._replace(channels_last=False),
    "residual": CONV2D._replace(residual=True),
    "strided": CONV2D._replace(stride=(2, 2), padding=(0, 1)),
    "dilated": CONV2D._replace(dilation=(2, 2), padding=(2, 2)),
    "grouped": CONV2D._replace(groups=2, weight=(6, 4, 3, 3)),
    "depthwise": DEPTHWISE,
    "bfloat16 grouped residual": CONV2D._replace(
        dtype=torch.bfloat16, groups=2, weight=(6, 4, 3, 3), residual=True
    ),
    "depthwise dilated": DEPTHWISE._replace(dilation=(3, 3), padding=(3, 3)),
    "depthwise, dilation larger than the image": DEPTHWISE._replace(dilation=(14, 11), padding=(14, 11)),
    "depthwise, padding unlike dilation": DEPTHWISE._replace(dilation=(4, 2), padding=(1, 5)),
    "depthwise, dilated, residual": DEPTHWISE._replace(dilation=(6, 6), padding=(6, 6), residual=True),
    "depthwise 5x4": DEPTHWISE._replace(
        input=(2, 8, 13, 9), weight=(8, 1, 5, 4), dilation=(3, 2), padding=(7, 3), bias=False, activation=None
    ),
    "depthwise, in padding alone": DEPTHWISE._replace(
        input=(1, 8, 2, 2), weight=(8, 1, 2, 2), dilation=(5, 5), padding=(2, 2)
    ),
    "depthwise, several filters a channel": DEPTHWISE._replace(
        weight=(16, 1, 3, 3), dilation=(3, 3), padding=(3, 3)
    ),
    "bfloat16 depthwise dilated": DEPTHWISE._replace(
        dtype=torch.bfloat16, dilation=(6, 6), padding=(6, 6), residual=True
    ),
    "bfloat16 dilated": DILATED,
    "bfloat16 dilated, larger than the image": DILATED._replace(dilation=(13, 10), padding=(13, 10)),
    "bfloat16 dilated 4x5": DILATED._replace(
        input=(2, 8, 11, 14), weight=(6, 8, 4, 5), dilation=(5, 4), padding=(6, 9), bias=False, residual=True
    ),
    "1x1": CONV2D._replace(weight=(6, 8, 1, 1), padding=(0, 0)),
    "1x1 residual": CONV2D._replace(weight=(6, 8, 1, 1), padding=(0, 0), residual=True),
    "1x1 to many": CONV2D._replace(weight=(20, 8, 1, 1), padding=(0, 0), input=(2, 8, 5, 7), residual=True),
    "1x1 to one": CONV2D._replace(weight=(1, 8, 1, 1), padding=(0, 0), input=(2, 8, 5, 7), bias=False),
    "large": CONV2D._replace(input=(2, 32, 19, 23), weight=(40, 32, 3, 3)),
    "transposed": TRANSPOSED,
    "transposed residual": TRANSPOSED._replace(residual=True, activation="relu"),
    "transposed overlapping": TRANSPOSED._replace(weight=(8, 6, 4, 4), padding=(1, 1), output_padding=(1, 0)),
    "transposed to few": TRANSPOSED._replace(input=(2, 8, 5, 7), weight=(8, 2, 2, 2), residual=True),
    "transposed to one": TRANSPOSED._replace(weight=(8, 1, 3, 2), stride=(3, 2), bias=False),
    "bfloat16": CONV2D._replace(dtype=torch.bfloat16),
    "bfloat16 transposed": TRANSPOSED._replace(dtype=torch.bfloat16),
    "bfloat16 1x1": CONV2D._replace(dtype=torch.bfloat16, weight=(6, 8, 1, 1), padding=(0, 0)),
}


def _operands(call: Call) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    x = torch.randn(call.input).to(call.dtype).contiguous(memory_format=layout)
    shape = call.output()
    bias = torch.randn(shape[1]).to(call.dtype) if call.bias else None
    residual = torch.randn(shape).to(call.dtype) if call.residual else None
    return x, torch.randn(call.weight) / 8, bias, residual


def _expected(call: Call, x, weight, bias, residual, slope=0.2) -> Tensor:
    weight, bias = weight.to(call.dtype).double(), None if bias is None else bias.double()
    if call.transposed:
        geometry = (call.stride, call.padding, call.output_padding, call.groups, call.dilation)
        y = TF.conv_transpose2d(x.double(), weight, bias, *geometry)
    else:
        y = TF.conv2d(x.double(), weight, bias, call.stride, call.padding, call.dilation, call.groups)
    if residual is not None:
        y = y + residual.double()
    return ACTIVATIONS[call.activation](y, slope)


def _candidates():
    return [
        pytest.param(call, name, id=f"{which}-{name}")
        for which, call in CALLS.items()
        for name in CANDIDATES[call.operation]
    ]


@pytest.mark.compat
class TestCandidates:
    @pytest.mark.parametrize(("call", "name"), _candidates())
    def test_each_computes_the_call(self, call, name):
        candidate = CANDIDATES[call.operation][name]
        if not candidate.serves(call):
            pytest.skip("it does not serve this call")
        x, weight, bias, residual = _operands(call)
        given = [None if t is None else t.clone() for t in (x, weight, bias, residual)]
        y = candidate.run(call, x, candidate.prepare(weight, call), bias, residual, 0.2)
        expected = _expected(call, x, weight, bias, residual)
        assert y.dtype == call.dtype
        assert tuple(y.shape) == call.output()
        tolerance = 3 * torch.finfo(call.dtype).eps * expected.abs().max().item() * 4
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)
        for tensor, before in zip((x, weight, bias, residual), given, strict=True):
            assert tensor is None or torch.equal(tensor, before)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("residual", [False, True])
    @pytest.mark.parametrize("which", ["plain", "1x1", "transposed", "large", "depthwise dilated"])
    def test_every_activation(self, activation, residual, which):
        call = CALLS[which]._replace(activation=activation, residual=residual)
        x, weight, bias, residual = _operands(call)
        expected = _expected(call, x, weight, bias, residual)
        for name, candidate in CANDIDATES[call.operation].items():
            if candidate.serves(call):
                y = candidate.run(call, x, candidate.prepare(weight, call), bias, residual, 0.2)
                atol = 1e-5 * expected.abs().max().item()
                torch.testing.assert_close(y.double(), expected, rtol=0, atol=atol, msg=name)

    def test_a_call_knows_the_shape_of_its_result(self):
        for call in CALLS.values():
            x, weight, bias, residual = _operands(call._replace(residual=False))
            assert call.output() == tuple(_expected(call, x, weight, bias, residual).shape)

    def test_what_does_not_answer_is_no_candidate(self, monkeypatch):
        from segfast.ops import _onednn

        def missing(*args):
            raise AttributeError("no such operator")

        monkeypatch.setattr(_onednn, "CONV2D", _onednn.CONV2D._replace(run=missing))
        _onednn._answers.cache_clear()
        assert not CANDIDATES["conv2d"]["onednn"].serves(CONV2D)
        _onednn._answers.cache_clear()

    @pytest.mark.parametrize("call", [CONV2D, TRANSPOSED])
    def test_an_activation_onednn_does_not_know_is_not_served(self, call):
        assert not CANDIDATES[call.operation]["onednn"].serves(call._replace(activation="softplus"))


def test_three_functions_make_a_candidate():
    """Whose prepared weight is one for all images."""
    assert Candidate._fields == ("serves", "prepare", "run", "form", "layout")
    candidate = Candidate(bool, bool, bool)
    assert candidate.form(CONV2D) is candidate.layout is None
