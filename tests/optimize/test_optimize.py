"""`segfast.optimize`, `restore` and `report` on the kinds of models people have."""

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import segfast
from segfast.nn._rules import all_rules


class Up(nn.Module):
    """A small decoder: an up-convolution, a skip, a convolution."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.out = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1)

    def forward(self, x):
        return self.out(self.up(F.relu(self.down(x))), output_size=[4 * n for n in x.shape[-2:]])


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 2, 2))

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, stride=2)


class NestedFunctional(Functional):
    def forward(self, x):
        def run():
            return F.conv_transpose2d(x, self.weight, stride=2)

        return run()


class OurFunctional(Functional):
    def forward(self, x):
        return segfast.functional.conv_transpose2d(x, self.weight, stride=2)


class Subclass(nn.ConvTranspose2d):
    def forward(self, input, output_size=None):
        return 2 * super().forward(input, output_size)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.fixture
def image():
    return torch.randn(2, 2, 5, 7)


def rows(model):
    return {row.name: row for row in segfast.report(model)}


def up(**options):
    return nn.ConvTranspose2d(2, 2, 2, stride=2, **options)


def test_output_and_gradients_are_the_same(image):
    model = Up()
    optimized = segfast.optimize(model)
    expected, actual = model(image), optimized(image)
    torch.testing.assert_close(actual, expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), optimized.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_the_optimized_layer_runs_our_operator(image):
    model = Up()
    assert segfast.explain(model, image) == []
    explanations = segfast.explain(segfast.optimize(model), image)
    assert [d.operation for d in explanations] == ["conv_transpose2d"] * 2


def test_a_copy_is_optimized_by_default():
    model = Up()
    optimized = segfast.optimize(model)
    assert type(model.up) is nn.ConvTranspose2d and type(optimized.up) is segfast.nn.ConvTranspose2d
    assert optimized.up.weight is not model.up.weight
    assert rows(model)["up"].replaced is False


def test_inplace_keeps_parameters_hooks_keys_mode_and_optimizer(image):
    model = Up().eval()
    keys = list(model.state_dict())
    weight = model.up.weight
    seen = []
    model.up.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert segfast.optimize(model, inplace=True) is model
    assert model.up.weight is weight and not model.up.training
    assert list(model.state_dict()) == keys
    before = weight.detach().clone()
    model(image).sum().backward()
    optimizer.step()
    assert seen == [segfast.nn.ConvTranspose2d]
    assert not torch.equal(model.up.weight, before)


def test_restore_leaves_nothing_behind(image):
    model = Up()
    kept = dict(vars(model.up))
    expected = model(image)
    segfast.optimize(model, inplace=True)
    assert segfast.restore(model) is model
    assert type(model.up) is type(model.out) is nn.ConvTranspose2d
    assert vars(model.up) == kept
    assert torch.equal(model(image), expected)


def test_restore_leaves_layers_built_as_ours():
    model = nn.Sequential(segfast.nn.ConvTranspose2d(2, 2, 2, activation="relu"), up())
    segfast.optimize(model, inplace=True)
    assert rows(model)["0"].reason == "segfast's own already" and not rows(model)["0"].replaced
    segfast.restore(model)
    assert type(model[0]) is segfast.nn.ConvTranspose2d and model[0].activation == "relu"
    assert type(model[1]) is nn.ConvTranspose2d


def test_restore_refuses_to_drop_an_activation_and_changes_nothing():
    model = segfast.optimize(nn.Sequential(up(), up()), inplace=True)
    model[1].activation = "relu"
    with pytest.raises(ValueError, match=r"layer '1' has activation='relu'"):
        segfast.restore(model)
    assert type(model[0]) is type(model[1]) is segfast.nn.ConvTranspose2d
    model[1].activation = None
    assert type(segfast.restore(model)[1]) is nn.ConvTranspose2d


def test_restore_refuses_a_layer_parametrized_since():
    model = segfast.optimize(nn.Sequential(up()), inplace=True)
    parametrize.register_parametrization(model[0], "weight", Doubled())
    with pytest.raises(ValueError, match="layer '0' became a ParametrizedConvTranspose2d"):
        segfast.restore(model)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(segfast.restore(model)[0]) is nn.ConvTranspose2d


def test_twice_is_once():
    model = segfast.optimize(segfast.optimize(Up(), inplace=True), inplace=True)
    assert segfast.report(model).replaced == ["up", "out"]
    assert type(segfast.restore(model).up) is nn.ConvTranspose2d


def test_one_layer_alone_is_a_model():
    layer = segfast.optimize(up())
    assert type(layer) is segfast.nn.ConvTranspose2d
    assert rows(layer)[""].replaced
    assert "(the model)" in str(segfast.report(layer))


def test_filter_fn_sees_names_and_the_callers_own_layers():
    model = Up()
    optimized = segfast.optimize(model, filter_fn=lambda name, module: module is not model.up)
    assert type(optimized.up) is nn.ConvTranspose2d and type(optimized.out) is segfast.nn.ConvTranspose2d
    assert rows(optimized)["up"].reason == "left out by filter_fn"
    again = segfast.optimize(optimized, filter_fn=lambda name, module: name == "up")
    assert [row.reason for row in segfast.report(again)] == ["replaced", "replaced"]
    assert type(segfast.restore(again).up) is nn.ConvTranspose2d


def test_a_filter_fn_that_raises_leaves_the_model_alone():
    model = nn.Sequential(up(), up())

    def fail_on_the_second(name, module):
        if name == "1":
            raise LookupError(name)
        return True

    with pytest.raises(LookupError):
        segfast.optimize(model, inplace=True, filter_fn=fail_on_the_second)
    assert type(model[0]) is nn.ConvTranspose2d


def test_a_shared_layer_is_replaced_once_and_listed_with_both_names(image):
    shared = up()
    model = nn.Sequential(shared, shared)
    optimized = segfast.optimize(model)
    assert optimized[0] is optimized[1] and type(optimized[0]) is segfast.nn.ConvTranspose2d
    (row,) = segfast.report(optimized)
    assert (row.name, row.shared) == ("0", ("1",))
    torch.testing.assert_close(optimized(image), model(image))


def with_instance_forward():
    layer = up()
    layer.forward = lambda x: x
    return layer


def with_tensor_subclass_weight():
    class Packed(torch.Tensor):
        pass

    layer = up()
    del layer.weight
    layer.weight = torch.randn(2, 2, 2, 2).as_subclass(Packed)
    return layer


def quantized():
    kind = type("ConvTranspose2d", (nn.Module,), {"__module__": "torch.ao.nn.quantized.modules.conv"})
    return kind()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Subclass(2, 2, 2), "a subclass of ConvTranspose2d"),
        (lambda: nn.ConvTranspose1d(2, 2, 2), "one-dimensional"),
        (lambda: nn.ConvTranspose3d(2, 2, 2), "three-dimensional"),
        (lambda: nn.LazyConvTranspose2d(2, 2), "lazy"),
        (lambda: parametrizations.weight_norm(up()), "parametrized (weight)"),
        (lambda: up(dtype=torch.float64), "no kernels for float64"),
        (lambda: up(dtype=torch.complex64), "no kernels for complex64"),
        (lambda: torch.jit.script(up()), "scripted"),
        (lambda: torch.jit.trace(up(), torch.randn(1, 2, 3, 3)), "scripted"),
        (with_instance_forward, "its forward was replaced on the instance"),
        (with_tensor_subclass_weight, "its weight is a Packed"),
        (quantized, "quantized"),
        (Functional, "its forward calls conv_transpose2d"),
        (NestedFunctional, "its forward calls conv_transpose2d"),
    ],
)
def test_left_alone_with_the_reason(make, reason):
    layer = make()
    model = nn.Sequential(layer)
    assert segfast.optimize(model, inplace=True)[0] is layer
    assert reason in rows(model)["0"].reason and not rows(model)["0"].replaced
    assert "replaced, or why not" in str(segfast.report(model)) and reason in str(segfast.report(model))


def test_our_own_functional_is_not_pointed_out():
    assert len(segfast.report(nn.Sequential(OurFunctional()))) == 0
    assert str(segfast.report(nn.ReLU())).startswith("No layer of a kind that segfast serves.")


def test_a_graph_that_calls_the_functional_is_pointed_out():
    exported = torch.export.export(Up(), (torch.randn(1, 2, 4, 4),)).module()
    assert "conv_transpose2d" in rows(exported)[""].reason
    traced = torch.fx.symbolic_trace(nn.Sequential(up(), nn.ReLU()))
    assert segfast.report(segfast.optimize(traced)).replaced == ["0"]


def test_old_weight_norm_keeps_working(image):
    # It is a forward pre-hook that sets a plain tensor; only its first state can be deep-copied.
    with pytest.warns(FutureWarning):
        model = nn.Sequential(torch.nn.utils.weight_norm(up()))
    expected = model(image)
    with pytest.raises(RuntimeError, match=r"cannot be deep-copied.*inplace=True"):
        segfast.optimize(model)
    segfast.optimize(model, inplace=True)
    assert rows(model)["0"].replaced
    torch.testing.assert_close(model(image), expected)


def test_a_lazy_layer_after_its_first_call(image):
    model = nn.Sequential(nn.LazyConvTranspose2d(2, 2))
    model(image)
    assert segfast.report(segfast.optimize(model)).replaced == ["0"]


@pytest.mark.parametrize("optimize_first", [True, False])
def test_compiled_model(image, optimize_first):
    model = Up().eval()
    expected = model(image)
    compiled = torch.compile(model, backend="eager")
    if optimize_first:
        segfast.optimize(model, inplace=True)
        torch.testing.assert_close(compiled(image), expected)
    else:
        torch.testing.assert_close(compiled(image), expected)
        optimized = segfast.optimize(compiled)
        assert segfast.report(optimized).replaced == ["_orig_mod.up", "_orig_mod.out"]
        torch.testing.assert_close(optimized(image), expected)
        assert type(model.up) is nn.ConvTranspose2d


def test_a_class_swap_is_seen_by_a_graph_compiled_before(image):
    model = Up().eval()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count)
    compiled(image)
    compiled(image)
    assert len(graphs) == 1
    segfast.optimize(model, inplace=True)
    torch.testing.assert_close(compiled(image), model(image))
    assert len(graphs) == 2


@pytest.fixture
def process_group(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_keeps_its_buckets(image, monkeypatch, process_group):
    monkeypatch.setattr(segfast._optimize.layouts, "_LAYOUT_DEVICES", ("cpu",))
    monkeypatch.setattr(segfast._optimize.layouts, "fusion_could_help", lambda tensor: True)
    monkeypatch.setattr(segfast._optimize.layouts, "taken_by_kernels", lambda run, tensors: list(tensors))
    wrapped = nn.parallel.DistributedDataParallel(Up())
    stride = wrapped.module.up.weight.stride()
    segfast.optimize(wrapped, image, inplace=True)
    assert segfast.report(wrapped).replaced == ["module.up", "module.out"]
    assert wrapped.module.up.weight.stride() == stride
    wrapped(image).sum().backward()
    assert wrapped.module.up.weight.grad is not None


def test_sharded_layers_are_left_alone(process_group):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(up(), nn.Sequential(up()))
    fully_shard(model[0])
    fully_shard(model)
    assert "sharded by itself" in rows(model)["0"].reason
    assert "its weight is a DTensor" in rows(model)["1.0"].reason


@pytest.mark.parametrize("roundtrip", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_an_optimized_model_is_copied_and_pickled(image, roundtrip):
    model = segfast.optimize(Up())
    again = roundtrip(model)
    assert segfast.report(again).replaced == ["up", "out"]
    torch.testing.assert_close(again(image), model(image))
    assert type(segfast.restore(again).up) is nn.ConvTranspose2d
    assert type(model.up) is segfast.nn.ConvTranspose2d


def test_checkpoints_go_both_ways(image):
    plain, file = Up(), io.BytesIO()
    optimized = segfast.optimize(Up())
    torch.save(optimized.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(plain(image), optimized(image))


class TestLayout:
    """Layouts of weights on a GPU whose kernels take them all, on the CPU."""

    @pytest.fixture(autouse=True)
    def on_the_cpu(self, monkeypatch):
        monkeypatch.setattr(segfast._optimize.layouts, "_LAYOUT_DEVICES", ("cpu",))
        monkeypatch.setattr(segfast._optimize.layouts, "fusion_could_help", lambda tensor: True)
        monkeypatch.setattr(segfast._optimize.layouts, "taken_by_kernels", lambda run, tensors: list(tensors))

    @staticmethod
    def is_channels_last(tensor):
        return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()

    def test_layers_that_are_ours_already_get_their_layout_too(self):
        model = segfast.nn.SeparableConv2d(4, 8, padding=1)
        assert model.conv_dw.weight.stride(0) != 1
        fast = segfast.optimize(model, torch.randn(1, 4, 5, 5))
        assert fast.conv_dw.weight.stride(0) == 1
        assert torch.equal(fast.conv_dw.weight, model.conv_dw.weight)
        assert segfast.restore(fast).conv_dw.weight.is_contiguous()

    def test_made_channels_last_and_back(self, image):
        model = Up()
        model(image).sum().backward()
        weight, values, expected = model.down.weight, model.down.weight.detach().clone(), model(image)
        segfast.optimize(model, image, inplace=True)
        assert model.down.weight is weight
        assert self.is_channels_last(weight) and self.is_channels_last(weight.grad)
        assert self.is_channels_last(model.up.weight)
        assert torch.equal(weight, values)
        torch.testing.assert_close(model(image), expected)
        segfast.restore(model)
        assert weight.is_contiguous() and model.up.weight.is_contiguous() and weight.grad.is_contiguous()

    def test_what_was_channels_last_stays_so(self, image):
        model = Up()
        model.down.to(memory_format=torch.channels_last)
        segfast.restore(segfast.optimize(model, image, inplace=True))
        assert self.is_channels_last(model.down.weight) and model.up.weight.is_contiguous()

    def test_optimizing_in_two_steps_is_undone_in_one(self, image):
        model = Up()
        segfast.optimize(model, image, inplace=True, filter_fn=lambda name, _: name == "up")
        segfast.optimize(model, image, inplace=True)
        assert self.is_channels_last(model.up.weight)
        segfast.restore(model)
        assert all(m.weight.is_contiguous() for m in (model.down, model.up, model.out))

    def test_a_tensor_made_contiguous_in_between(self):
        layer = up()
        layer.register_buffer("other", torch.randn(2, 2, 3, 3))
        x = torch.randn(1, layer.in_channels, 3, 3)
        segfast.optimize(layer, x, inplace=True)
        layer.other = layer.other.contiguous()
        model = nn.Sequential(layer, nn.ReLU())
        segfast.optimize(model, x, inplace=True)
        assert self.is_channels_last(layer.other)
        segfast.restore(model)
        assert layer.other.is_contiguous() and layer.weight.is_contiguous()

    def test_nothing_replaced_nothing_changed(self):
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv3d(2, 2, 2))
        segfast.optimize(nn.Sequential(model[0]), torch.randn(1, 2, 5, 5), inplace=True)
        assert model[0].weight.is_contiguous()

    def test_without_example_inputs_no_call_is_known(self):
        assert segfast.optimize(Up()).up.weight.is_contiguous()

    def test_five_dimensional_weights_do_not_disturb(self):
        model = nn.ModuleList([up(), nn.Conv3d(2, 2, 2)])
        model.forward = model[0].forward
        segfast.optimize(model, torch.randn(1, model[0].in_channels, 3, 3), inplace=True)
        assert self.is_channels_last(model[0].weight) and model[1].weight.is_contiguous()


def test_the_cpu_keeps_its_layout(image):
    assert segfast.optimize(Up(), image).up.weight.is_contiguous()


@pytest.mark.parametrize("known", [False, True], ids=["nothing proven", "only others proven"])
def test_weights_that_aten_takes_keep_their_layout(image, monkeypatch, known):
    """On a GPU, for which the CPU stands in: ATen would copy them at every call."""
    monkeypatch.setattr(segfast._optimize.layouts, "_LAYOUT_DEVICES", ("cpu",))
    if known:
        monkeypatch.setattr(segfast._optimize.layouts, "fusion_could_help", lambda tensor: True)
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, groups=2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), Up()
    )
    strides = [p.stride() for p in model.parameters()]
    for inputs in (None, image):
        fast = segfast.optimize(model, inputs)
        assert segfast.report(fast).replaced
        assert [p.stride() for p in fast.parameters()] == strides


@pytest.mark.interpreter
@pytest.mark.parametrize("example", [lambda x: x, lambda x: {"x": x}], ids=["tensor", "dict"])
def test_only_weights_that_kernels_take_change_layout(image, monkeypatch, example):
    monkeypatch.setattr(segfast._optimize.layouts, "_LAYOUT_DEVICES", ("cpu",))
    model = Up().eval()
    with segfast.backend("triton"):
        fast = segfast.optimize(model, example(image))
    weights = {name: p for name, p in fast.named_parameters() if p.dim() == 4}
    laid_out = {name for name, weight in weights.items() if weight.stride(1) == 1}
    assert laid_out == {"up.weight", "out.weight"}  # the plain convolution is torch's own
    assert weights["down.weight"].is_contiguous()


@pytest.mark.parametrize("function", [segfast.optimize, segfast.restore, segfast.report])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        function(lambda x: x)


def test_bad_arguments_of_optimize():
    with pytest.raises(TypeError, match="scripted"):
        segfast.optimize(torch.jit.script(up()))
    with pytest.raises(TypeError, match="filter_fn must be callable, got str"):
        segfast.optimize(up(), filter_fn="up")


def test_every_rule_keeps_the_class_swap_sound():
    for rule in all_rules():
        assert issubclass(rule.target, rule.source)
        assert rule.target.__dictoffset__ == rule.source.__dictoffset__
        neutral = functools.partial(getattr, rule.target)
        assert {key: neutral(key) for key in rule.attributes} == dict(rule.attributes)
