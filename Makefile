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

# The paper's table, simulated: tens of minutes. `make paper ARGS=--quick` is one seed.
paper:
	@tools/setup_venv.sh && .venv/bin/python tools/paper.py --data ../shared/data $(ARGS)
