# The GPU run and its parts. Works on a bare machine: .venv's Python where there is one, else python3.
PY := $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)
OUT ?= out/gpu
RUN_GPU = $(PY) -m benchmarks.gpu --out $(OUT)

.PHONY: gpu gpu-peers gpu-test gpu-tune gpu-bench gpu-full gpu-unseen record

gpu: ## on a GPU: prove, measure the peers, then ours beside them, tune; into OUT=out/gpu
	$(RUN_GPU)

gpu-peers: ## on a GPU: the device's ceilings and every case against the peers only
	$(RUN_GPU) --tier T1

gpu-test: ## on a GPU: every kernel against fp64; writes proven.json. FULL=1 adds the long checks
	$(RUN_GPU) --tier T0 $(if $(FULL),full)

gpu-tune: ## on a GPU: tile sizes beside cuDNN; writes configs.json
	$(RUN_GPU) --tier T4

gpu-bench: ## on a GPU: all cases of FAMILY=conv_transpose2d (or another), every direction
	$(RUN_GPU) --tier bench $(if $(FAMILY),--family $(FAMILY))

gpu-full: ## on a GPU: whole models, other dtypes, torch.compile
	$(RUN_GPU) --tier T5

gpu-unseen: ## on a GPU: backend "auto" beside ATen on 300 convolutions that are in no table
	$(RUN_GPU) --tier unseen

record: ## file what a GPU run brought back: make record FROM=folder
	@test -n "$(FROM)" || { echo "usage: make record FROM=folder" >&2; exit 2; }
	$(PY) -m benchmarks.record $(FROM)
