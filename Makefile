# Each target is a plain script, for machines without make.
.PHONY: demo serve test model paper

demo:
	@tools/demo.sh

serve:
	@tools/serve.sh

test:
	@tools/test.sh

model:
	@tools/setup_venv.sh && .venv/bin/python tools/fetch_smollm2.py

# The paper's table, simulated: tens of minutes. `make paper ARGS=--quick` is one seed; with
# ARGS="--data DIRECTORY" Alpaca's lengths are those of alpaca_lengths.csv there.
paper:
	@tools/setup_venv.sh && .venv/bin/python -m fastserve_mega.experiments.paper $(ARGS)
