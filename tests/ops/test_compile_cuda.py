"""torch.compile(fullgraph=True) of functions and modules on CUDA tensors, without a GPU.

The tensors are fake: they have a device, sizes and no numbers. What asks the CUDA runtime or reads files of
proofs breaks the graph if Dynamo comes into it.
"""

import pytest
import torch
import triton
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import segfast
from segfast import functional as sf
from segfast.kernels import _device, operations, source_digest
from segfast.ops import _backend, _choice_files, _proofs
from segfast.ops._choice import Choice, Choices
from tests.operators import over_samples
from tests.ops.test_gpu import CALL

FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def draw(*shape, dtype=torch.bfloat16):
    with FAKE:
        return torch.empty(shape, dtype=dtype, device="cuda:0")


def on_gpu(module):
    """`module` with every parameter and buffer on the GPU, floating ones in bfloat16."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, t in tensors.items():
                if t is not None:
                    dtype = torch.bfloat16 if t.is_floating_point() else t.dtype
                    found = draw(*t.shape, dtype=dtype)
                    tensors[name] = (
                        nn.Parameter(found, requires_grad=False) if isinstance(t, nn.Parameter) else found
                    )
    return module


def part_of(tensor, key):
    """`tensor[key]`: the indexing of a torch without CUDA asks for the device."""
    dim = 0
    key = key if isinstance(key, tuple) else (key,)
    if Ellipsis in key:
        at = key.index(Ellipsis)
        named = sum(entry is not None for entry in key) - 1
        key = (*key[:at], *[slice(None)] * (tensor.dim() - named), *key[at + 1 :])
    for entry in key:
        if entry is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(entry, slice):
            tensor = torch.ops.aten.slice(tensor, dim, entry.start, entry.stop, entry.step or 1)
        else:
            tensor = tensor.select(dim, entry)
            continue
        dim += 1
    return tensor


def conv2d():
    x, weight, term = draw(2, 8, 9, 8), draw(6, 8, 3, 3), draw(6, dtype=torch.float32)
    yield lambda: sf.conv2d(x, weight, padding=2, dilation=2, scale=term, shift=term, activation="relu")
    wide = draw(6, 16, 1, 1)
    yield lambda: sf.conv2d([x, x], wide)
    yield lambda: sf.parallel_conv2d(x, [weight, weight], [1, 2])


def conv_transpose2d():
    x, weight, skip = draw(2, 8, 5, 4), draw(8, 3, 2, 2), draw(2, 4, 10, 8)
    yield lambda: sf.conv_transpose2d(x, weight, stride=2, activation="relu")
    yield lambda: sf.up_concat(x, skip, weight)


def separable_conv2d():
    x, weight, pointwise = draw(2, 8, 9, 8), draw(8, 1, 3, 3), draw(6, 8, 1, 1)
    yield lambda: sf.depthwise_conv2d(x, weight, padding=1, activation="relu")
    yield lambda: sf.depthwise_conv2d(x, weight, padding=1, return_statistics=True)
    yield lambda: sf.separable_conv2d(x, weight, pointwise, padding=1, depthwise_activation="relu")


def packed_pool2d():
    x, y, places = draw(2, 8, 9, 8), draw(2, 8, 5, 4), draw(2, 2, 5, 4, dtype=torch.uint8)
    yield lambda: sf.packed_max_pool2d(x, ceil_mode=True)
    yield lambda: sf.packed_max_unpool2d(y, places, (9, 8))


def segmentation_head():
    logits, target = draw(2, 5, 4, 3), draw(2, 13, 7, dtype=torch.int64)
    yield lambda: sf.upsample_cross_entropy(logits, target)
    yield lambda: sf.upsample_dice(logits, target)
    yield lambda: sf.upsample_argmax(logits, (13, 7))


def dense_crf():
    unary, image = draw(1, 3, 9, 10, dtype=torch.float32), draw(1, 3, 9, 10, dtype=torch.float32)
    for method in ("exact", "lattice"):
        yield lambda method=method: sf.mean_field(unary, image, iterations=2, method=method)
        yield lambda method=method: sf.gaussian_filter(unary, image, method=method)


def modules():
    x = draw(2, 8, 9, 8)
    for module in (
        segfast.nn.Conv2d(8, 6, 3),
        segfast.nn.Conv2d(8, 6, 3, dilation=2, activation="relu"),
        segfast.nn.ConvBNAct(8, 6),
        segfast.nn.ConvTranspose2d(8, 6, 2, stride=2, activation="relu"),
        segfast.nn.DepthwiseConv2d(8, 8, 3),
        segfast.nn.DepthwiseConv2d(8, 8, 3, activation="relu"),
        segfast.nn.SeparableConv2d(8, 6, 3),
        segfast.nn.InvertedResidual(8, 8, stride=1, expand_ratio=2),
        segfast.nn.UpsampleConv2d(8, 6, scale_factor=2),
        segfast.nn.UpsampleArgmax(scale_factor=2),
    ):
        # Not in train, neither ASPP nor BilinearUpsample: they call what wants a torch built with CUDA.
        on_gpu(module).eval()
        yield lambda module=module: module(x)
    loss, target = segfast.nn.UpsampleCrossEntropyLoss(), draw(2, 18, 16, dtype=torch.int64)
    yield lambda: loss(x, target)
    crf = on_gpu(segfast.nn.DenseCRF(8))
    image = draw(2, 3, 9, 8)
    yield lambda: crf(x, image)
    unet = on_gpu(segfast.models.UNet(3, 2, width=8, depth=2)).eval()
    photo = draw(1, 3, 16, 16)
    yield lambda: unet(photo)


@pytest.fixture(params=["nothing known", "all chosen", "triton"])
def gpu(request, monkeypatch, pretended_gpu):
    """An sm_90 of which nothing is known, or all proven and chosen, or whose kernels are asked for."""

    def runtime(answer):
        def ask(*args):
            torch._dynamo.graph_break()  # an error under fullgraph, and nothing outside of Dynamo
            return answer

        return ask

    known = request.param == "all chosen"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # or Dynamo looks for devices
    monkeypatch.setattr(FakeTensor, "__getitem__", part_of)
    monkeypatch.setattr(_device, "_query", runtime(("sm_90", pretended_gpu, 232448)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", runtime((9, 0)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", runtime(False))
    about = {"passed": known, "triton": triton.__version__}
    proofs = {
        f"{operation}.{dtype}": about | {"source": source_digest(operation)}
        for operation in operations()
        for dtype in ("bfloat16", "float32")
    }
    monkeypatch.setattr(_proofs, "_content", runtime({pretended_gpu: proofs}))
    monkeypatch.setattr(_choice_files, "read_gpu", runtime({CALL: Choice("triton", {})} if known else {}))
    monkeypatch.setattr(Choices, "of_any_size", runtime([Choice("triton", {})] if known else []))
    monkeypatch.setattr(_backend, "_gpu_reasons", {})
    torch._dynamo.reset()
    with segfast.backend("triton" if request.param == "triton" else "auto"):
        yield request.param
    torch._dynamo.reset()


@over_samples(globals(), modules)
def test_compiles_whole_on_cuda_tensors(gpu, family):
    for call in family():
        torch._dynamo.reset()
        graphs = []

        def keep(graph, inputs, graphs=graphs):
            graphs.append(graph)
            [output] = [node for node in graph.graph.nodes if node.op == "output"]
            return lambda *args: [node.meta["example_value"] for node in output.args[0]]

        torch.compile(call, backend=keep, fullgraph=True)()
        assert len(graphs) == 1
        if family not in (modules, dense_crf):  # whose own operators are there on ATen too
            ours = [node for node in graphs[0].graph.nodes if "segfast" in str(node.target)]
            assert bool(ours) == (gpu != "nothing known")
