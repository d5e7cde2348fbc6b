"""Gaussian filtering on the permutohedral lattice (Adams, Baek and Davis 2010): splat, blur each axis, slice.

A point of D features lies in a simplex of D + 1 vertices, one of each remainder 0..D modulo D + 1. A vertex
is known by one int64 key: image, remainder and coordinates packed by the ranges they have in the batch, in
that order. No hash table: one stable sort of the keys of all points finds the vertices, numbers them and
lists what each receives, one binary search an axis finds neighbours, and every sum has a fixed order. No
size but the number of vertices is read back, and under CUDA-graph capture not even that one.

Values are rows of C channels, tables one row a vertex. The filter's kernels give a lane (a thread's place in
a tile) one channel of one row, so that any C loads whole cache lines and leaves few lanes idle.
"""

from .build import Permutohedral, build_permutohedral
from .filter import permutohedral_blur, permutohedral_slice

__all__ = ["Permutohedral", "build_permutohedral", "permutohedral_blur", "permutohedral_slice"]
