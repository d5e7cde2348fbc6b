"""`segfast.optimize`: what may be replaced or fused, what is fastest here, and whether it is right."""
