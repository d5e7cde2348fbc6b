"""Layers computed together, in one operator where they can be, and as they always were where they cannot.

A fused layer is a convolution (`conv.py`) or a depthwise and a 1x1 one (`separable.py`) with the norm and
activation after it; `layers.py` reads them off a list of layers. `sequence.py` lets the first of such layers
compute all of them in somebody else's forward; `residual_block.py` and `aspp.py` compute whole blocks,
`aspp_swap.py` other people's ASPPs. The class of a module changes for it (`swap.py`), for a whole model too
(`whole_model.py`). `folding.py` makes norms a scale and a shift, or part of the filter; `ready.py` keeps what
a call on a CPU comes to; `eager.py` asks if anybody looks in between.
"""
