"""Layers that are computed together: which, when, and with what of them folded into the filters."""
