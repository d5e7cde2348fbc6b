"""Exports a block of a family's functionals, whose sizes stay open."""

import torch

import segfast
from tests.fused_conv import draw


def image(height: int = 5, width: int = 7, batch: int = 2) -> torch.Tensor:
    """[batch, 4, height, width]. No size equals another, or the channels: equal ones had to stay so."""
    return draw(batch, 4, height, width)


def assert_exports_with_dynamic_sizes(model: torch.nn.Module, backend: str, *operators: str) -> None:
    """With the kernels the program calls just these operators; on ATen, and decomposed, none of ours."""
    # Of a row of two a layer at stride 2 would leave one: a size of its own to torch.
    least = {"batch": 2, "height": 3, "width": 3}
    batch, height, width = (torch.export.Dim(n, min=k, max=64) for n, k in least.items())
    sizes = {"x": {0: batch, 2: height, 3: width}}

    def called(program: torch.export.ExportedProgram) -> list[str]:
        targets = [str(node.target) for node in program.graph.nodes]
        return sorted(target for target in targets if "segfast" in target)

    with segfast.backend(backend), torch.no_grad():
        program = torch.export.export(model, (image(),), dynamic_shapes=sizes)
        wanted = sorted(f"segfast.{name}.default" for name in operators)
        assert called(program) == (wanted if backend == "triton" else [])
        for size in ((5, 7), (6, 9)):
            x = image(*size, batch=3)
            torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=1e-5)
        decomposed = program.run_decompositions(segfast.decompositions())
        assert called(decomposed) == []
        torch.testing.assert_close(decomposed.module()(image(3, 4)), model(image(3, 4)), atol=1e-5, rtol=1e-5)
