# Each target is a plain script, for machines without make.
.PHONY: demo serve test model

demo:
	@tools/demo.sh

serve:
	@tools/serve.sh

test:
	@tools/test.sh

model:
	@tools/setup_venv.sh && .venv/bin/python tools/fetch_smollm2.py
