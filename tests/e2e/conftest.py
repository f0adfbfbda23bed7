import os
import socket
from pathlib import Path

import pytest

MODEL_DIRECTORY = (
    Path(os.environ.get("FASTSERVE_MEGA_CACHE", "~/.cache/fastserve_mega")).expanduser()
    / "smollm2-135m-instruct"
)
PROMPTS = Path(__file__).parents[1] / "data" / "mtbench_prompts.jsonl"


@pytest.fixture(scope="session")
def model_directory():
    if not (MODEL_DIRECTORY / "config.json").exists():
        pytest.skip(f"no model in {MODEL_DIRECTORY}: run `make model`")
    return MODEL_DIRECTORY


@pytest.fixture(scope="session")
def prompts_file():
    return PROMPTS


@pytest.fixture(scope="session")
def free_port():
    def pick():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return pick
