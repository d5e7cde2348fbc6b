"""`segfast.optimize`, `report` and `restore`; the functions are in `optimize.py` and `report.py`.

A layer is replaced if it is eligible (`eligible.py`). Layers that follow one another (`sequences.py`, found
in a graph of the forward, `graph.py`), ASPPs and residual blocks are fused (`fuse.py`). What runs each call
is chosen by measuring (`measure.py`), in the layouts that pay (`layouts.py`), and the model is timed before
and after (`gain.py`); its outputs are compared (`verify.py`).
"""
