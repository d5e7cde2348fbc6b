# The kernels as a GPU runs them, without one: Triton's own IR of every launch, executed.
.PHONY: simulate

simulate: ## the device tests on a simulated GPU: bf16, TF32, accesses out of bounds, races; needs Python 3.12 or 3.13
	.ci/simulate
