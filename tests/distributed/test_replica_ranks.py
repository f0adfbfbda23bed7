"""Real ranks of two replicas: the same tokens as transformers, whoever computes them."""

import socket

import pytest
import yaml
from tiny_models import greedy, make_model, prompts

from fastserve_mega.client import Client
from fastserve_mega.launcher import Deployment
from fastserve_mega.system.config_file import load_config
from fastserve_mega.types import SamplingParams

pytestmark = pytest.mark.distributed

MAX_TOKENS = 12


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_replicas_of_two_stages_answer_like_transformers(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = make_model("llama", tmp_path / "model")
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
                "parallel": {"data": 2, "pipeline": 2, "device": "cpu", "threads_per_rank": 1},
                "kv_cache": {"block_size": 4, "device_blocks": 80},
                "scheduler": {"max_batch_tokens": 7},
                "coordinator": {"client_endpoint": f"tcp://127.0.0.1:{free_port()}"},
            }
        )
    )
    config = load_config(path)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    with Deployment(config, ["--config", str(path)], http=False) as deployment:
        deployment.start()
        with Client(config.coordinator.client_endpoint) as client:
            running = [client.submit(prompt, params) for prompt in prompts() * 2]
            answers = [list(generation.wait().token_ids) for generation in running]
    assert answers == [greedy(model, prompt, MAX_TOKENS) for prompt in prompts()] * 2
