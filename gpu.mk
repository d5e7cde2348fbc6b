# The GPU run and its parts. Works on a bare machine: .venv's Python where there is one, else python3.
PY := $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
OUT ?= out/gpu
RUN_GPU = $(PY) -m benchmarks.gpu --out $(OUT)

.PHONY: gpu gpu-first gpu-second gpu-layers gpu-full record

gpu: ## on a GPU: both of the next two, twelve minutes; into OUT=out/gpu
	$(RUN_GPU)

gpu-first: ## on a GPU, six minutes: prove the kernels, then the headline rows, ours beside every peer
	$(RUN_GPU) first

gpu-second: ## on a GPU, six minutes: choose what runs each call of three models, then measure these
	$(RUN_GPU) second

gpu-layers: ## on a GPU: all cases of FAMILY=conv_transpose2d (or another), every direction
	$(RUN_GPU) layers --budget 3600 $(if $(FAMILY),--family $(FAMILY))

gpu-full: ## on a GPU: prove in every dtype, then the long checks: fuzz, large tensors, graphs, the sanitizer
	$(RUN_GPU) full --budget 1200

record: ## file what a GPU run brought back: make record FROM=folder
	@test -n "$(FROM)" || { echo "usage: make record FROM=folder" >&2; exit 2; }
	$(PY) -m benchmarks.record $(FROM)
