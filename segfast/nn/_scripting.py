"""The error of layers that `torch.jit.script` cannot compile."""

from ._rules import RECORD


class Unscriptable:
    """Mixed into layers that choose at run time what computes them, for which TorchScript has no types."""

    def __prepare_scriptable__(self):
        """Called by `torch.jit.script` on every module in the one that is scripted, before it compiles any.

        Raises:
            RuntimeError: always.
        """
        name = type(self).__name__
        if "rule" in vars(self).get(RECORD, {}):
            raise RuntimeError(
                f"{name}: a layer that segfast.optimize replaced cannot be scripted; "
                "call segfast.restore(model) first"
            )
        raise RuntimeError(
            f"{name}: segfast's own layers and networks cannot be scripted; "
            "use torch.export.export or torch.jit.trace"
        )
