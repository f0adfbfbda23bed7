# Each target is a plain script, for machines without make.
.PHONY: compat demo serve test test-long coverage test-install test-browser test-kernels check-launch model paper native-sanitize bench-guard

demo:
	@tools/demo.sh

serve:
	@tools/serve.sh

# Some 5 minutes on two cores.
test:
	@tools/test.sh

# With the slow tests and many more random examples.
test-long:
	@tools/test.sh --long

coverage:
	@tools/coverage.sh

# Clients (openai, anthropic, LangChain, LiteLLM, lm-eval) and agents against the server, in environments
# of their own. `make compat ARGS=litellm` is one of them.
compat:
	@tools/compat.sh $(ARGS)

# The wheel in a fresh environment of each Python at hand: 2 GB of packages for each.
# `make test-install ARGS=3.12` is one of them.
test-install:
	@tools/test_install.sh $(ARGS)

# The GPU kernels in Triton's interpreter, and compiled for an H100; needs no GPU.
test-kernels:
	@tools/test_kernels.sh

# The live view in Chromium.
test-browser:
	@tools/test_browser.sh

model:
	@tools/setup_venv.sh && .venv/bin/python tools/fetch_smollm2.py

# The paper's table, simulated: tens of minutes. `make paper ARGS=--quick` is one seed; with
# ARGS="--data DIRECTORY" Alpaca's lengths are those of alpaca_lengths.csv there.
paper:
	@tools/setup_venv.sh && .venv/bin/python -m fastserve_mega.experiments.paper $(ARGS)

# The C++ step under the address, undefined-behaviour and thread sanitizers.
native-sanitize:
	@tools/native_sanitize.sh

# Files of launch/, with promtool, kustomize, hadolint and others where they are installed.
check-launch:
	@tools/check_launch.sh

# Whether a step became slower since the last tag; `make bench-guard ARGS="--since HEAD~20"`.
bench-guard:
	@tools/setup_venv.sh && .venv/bin/python tools/bench_guard.py \
	    --model ~/.cache/fastserve_mega/smollm2-135m-instruct $(ARGS)
