"""`optimize(dtype=torch.bfloat16)`: faster, with parameters, inputs and outputs as they are."""

import pytest
import torch

import segfast
from segfast._optimize.gain import Gain
from segfast.ops._choice import choices
from tests.optimize.measured_network import Net
from tests.optimize.measured_network import image as _image
from tests.optimize.measured_network import net as _net

pytestmark = pytest.mark.measures


class TestBFloat16:
    def test_inputs_outputs_and_parameters_stay(self, wins, model_takes):
        wins("onednn")
        model_takes(3, 2, 1)
        net, x = _net(), _image()
        fast = segfast.optimize(net, x, dtype=torch.bfloat16)
        with torch.no_grad():
            expected, actual = net(x), fast(x)
        assert actual.dtype == torch.float32
        assert {p.dtype for p in fast.parameters()} == {torch.float32}
        error = (actual - expected).abs().max() / expected.abs().max()
        assert 1e-5 < error < 0.03  # of bfloat16, and no more
        assert segfast.report(fast).gain.error == pytest.approx(error.item(), rel=1e-3)
        assert "in bfloat16, where outputs changed by" in str(segfast.report(fast))
        calls = [call for call in choices().measured if call.dtype == torch.bfloat16]
        assert len(calls) == 4

    def test_gradients_are_computed_as_given(self, wins, model_takes):
        wins("onednn")
        model_takes(3, 2, 1)
        net, x = _net(), _image()
        fast = segfast.optimize(net, x, dtype=torch.bfloat16)
        torch.testing.assert_close(fast(x), net(x))  # gradients are enabled

    def test_where_it_is_slower_the_model_computes_as_given(self, wins, monkeypatch):
        wins("onednn")
        gains = iter([False, True])
        found = []

        def gain(model, plain, inputs, dtype, train, fused):
            found.append(dtype)
            name = None if dtype is None else "bfloat16"
            return Gain(2, 3, "as given", 1, next(gains), name, 0.01 if name else 0.0)

        monkeypatch.setattr("segfast._optimize.optimize.gain", gain)
        net, x = _net(), _image()
        fast = segfast.optimize(net, x, dtype=torch.bfloat16)
        assert found == [torch.bfloat16, None]
        with torch.no_grad():
            torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
        assert "Not faster" in str(segfast.report(fast))

    def test_restore_undoes_it(self, wins, model_takes):
        wins("onednn")
        model_takes(3, 2, 1)
        net, x = _net(), _image()
        plain = segfast.restore(segfast.optimize(net, x, dtype=torch.bfloat16))
        assert type(plain) is Net
        with torch.no_grad():
            assert torch.equal(plain(x), net(x))

    def test_of_a_model_that_is_one_convolution_of_atens(self, wins, model_takes):
        wins("aten")
        model_takes(3, 2, 1)
        net, x = torch.nn.Conv2d(3, 4, 3).eval(), _image()
        fast = segfast.optimize(net, x, dtype=torch.bfloat16)
        with torch.no_grad():
            expected, actual = net(x), fast(x)
        assert actual.dtype == torch.float32 and not torch.equal(actual, expected)
        assert torch.equal(actual, actual.bfloat16().float())
        assert segfast.report(fast).gain.dtype == "bfloat16"
        assert type(segfast.restore(fast)) is torch.nn.Conv2d

    def test_dicts_and_other_outputs(self, wins, model_takes):
        wins("onednn")
        model_takes(3, 2, 1)

        class Both(Net):
            def forward(self, image):
                out = super().forward(image)
                return {"out": out, "labels": out.argmax(1), "size": 3}

        torch.manual_seed(0)
        fast = segfast.optimize(Both().eval(), {"image": _image()}, dtype=torch.bfloat16)
        with torch.no_grad():
            result = fast(image=_image())
        assert result["out"].dtype == torch.float32
        assert result["labels"].dtype == torch.int64
        assert result["size"] == 3
