# The oldest and the newest torch and triton, beside the pinned ones of .venv: one sample of every family in each.
.PHONY: compat

compat: .venv/.installed-test ## one sample of every family under the oldest, the pinned and the newest torch and triton
	@status=0; \
	.ci/compat oldest || status=1; \
	.ci/compat pinned || status=1; \
	.ci/compat newest || status=1; \
	exit $$status
