"""Distributed checkpoints that Megatron's own code wrote, and what is wrong with some."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import warnings

import pytest
import torch
from generation import generate
from tiny_models import greedy, make_model, prompts

from fastserve_mega.models.architecture import load_architecture
from fastserve_mega.system.config import Config, KvCacheConfig, ModelConfig, ParallelConfig
from fastserve_mega.system.partition import partition_model
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.megatron.checkpoint import HuggingFaceCheckpoint
from fastserve_mega.worker.megatron.convert import convert
from fastserve_mega.worker.megatron.initialize import join_process_groups
from fastserve_mega.worker.megatron.megatron_runner import MegatronRunner
from fastserve_mega.worker.megatron.metadata_names import check_names
from fastserve_mega.worker.megatron.model import build_stage
from fastserve_mega.worker.topology import Topology

MAX_TOKENS = 8
FORMS = {
    "stacked": {},
    "per-layer": {"non_homogeneous_layers": True},
    "gate-and-up-apart": {"singleton_local_shards": True},
}
PADDED_VOCABULARY = 256


class Payload:
    """A pickle of it would make a file where it is read."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return (self.victim.touch, ())


@contextlib.contextmanager
def open_runner(directory):
    config = Config(
        model=ModelConfig(path=str(directory), dtype="float32"),
        parallel=ParallelConfig(device="cpu", threads_per_rank=1),
        kv_cache=KvCacheConfig(block_size=4, device_blocks=80),
    )
    runner = MegatronRunner(config, Topology(), "", 0)
    try:
        yield runner
    finally:
        runner.close()


def tokens_of(directory):
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    with open_runner(directory) as runner:
        return generate(runner, prompts(), params, block_size=4, chunk=7)


def save_as_megatron_does(source, directory, metadata):
    """With a padded vocabulary, an optimizer, and the trainer's arguments as a pickle."""
    # Not at the top: fastserve_mega.worker.megatron prepares the import.
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from fastserve_mega.worker.megatron.layer_spec import choose_layers

    architecture = load_architecture(source)
    partition = partition_model(architecture, ParallelConfig(), 0, 1)
    padded = dataclasses.replace(
        partition, padded_vocab_size=PADDED_VOCABULARY, vocab_rows=range(PADDED_VOCABULARY)
    )
    cpu = torch.device("cpu")
    groups = join_process_groups(ParallelConfig(device="cpu"), Topology(), cpu, "", 0)
    try:
        choice = choose_layers("local", architecture, cpu)
        stage = build_stage(architecture, padded, groups, choice, dtype=torch.float32, device=cpu)
        HuggingFaceCheckpoint(source, architecture, padded).load(stage, lambda num_bytes: None)
        state = stage.model.sharded_state_dict(metadata={"dp_cp_group": groups.tensor, **metadata})
        state["optimizer"] = ShardedTensor.from_rank_offsets("optimizer.state", torch.ones(3))
        state["args"] = argparse.Namespace(iteration=7)
        directory.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron's own
            dist_checkpointing.save(state, str(directory))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def huggingface(tmp_path_factory):
    directory = tmp_path_factory.mktemp("huggingface")
    model = make_model("llama", directory)
    return directory, [greedy(model, prompt, MAX_TOKENS) for prompt in prompts()]


@pytest.mark.parametrize("form", list(FORMS))
def test_what_megatron_writes_is_served(huggingface, tmp_path, monkeypatch, form):
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # Its writer wants CUDA and psutil, but not for what it writes.
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(filesystem_async, "_process_memory", lambda: 0)
    source, expected = huggingface
    iteration = tmp_path / "iter_0000007"
    save_as_megatron_does(source, iteration, FORMS[form])
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    shutil.copy(source / "config.json", tmp_path)
    victim = tmp_path / "executed"
    torch.save(Payload(victim), iteration / "common.pt")
    assert tokens_of(tmp_path) == expected
    convert(tmp_path, tmp_path / "back", "huggingface")
    assert tokens_of(tmp_path / "back") == expected
    assert not victim.exists()


@pytest.fixture
def damaged(huggingface, tmp_path):
    """A copy of a checkpoint, to be damaged."""
    directory = tmp_path / "megatron"
    convert(huggingface[0], directory, "torch_dist")
    return directory


def assert_refused(directory, message):
    with pytest.raises(ValueError, match=message), open_runner(directory):
        pass
    assert not torch.distributed.is_initialized()


def test_an_incomplete_checkpoint_is_refused(damaged):
    (file,) = damaged.glob("*.distcp")
    content = file.read_bytes()
    file.write_bytes(content[:-50])
    assert_refused(damaged, rf"{file.name} is cut short: 50 of its {len(content)} bytes")
    file.unlink()
    assert_refused(damaged, f"is incomplete: {file.name} is missing")
    (damaged / ".metadata").unlink()
    assert_refused(damaged, r"is incomplete: it has no \.metadata")
    (damaged / "metadata.json").write_text("[]")
    assert_refused(damaged, "metadata.json: not that of a Megatron checkpoint")
    (damaged / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert_refused(damaged, "format 'zarr' is not supported, only 'torch_dist'")
    (damaged / "metadata.json").unlink()
    assert_refused(damaged, "holds no weights")


def test_a_damaged_file_is_one_sentence(damaged):
    """Torch raises something here that `except Exception` does not catch."""
    (file,) = damaged.glob("*.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    assert_refused(damaged, "megatron fails: ")
    (damaged / ".metadata").write_bytes(b"\x80\x04].")  # an empty list
    assert_refused(damaged, r"\.metadata is not what torch writes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, r"shape \(3, .*config.json implies \(4, "),
        ({"attention_bias": True}, r"has no tensor decoder\.layers\..*\.bias"),
        ({"vocab_size": 400}, r"shape \(131, 32\), config.json implies \(400, 32\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(damaged, change, message):
    path = damaged / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert_refused(damaged, message)


def test_metadata_that_would_run_code_is_refused(damaged, tmp_path):
    import pickle

    victim = tmp_path / "executed"
    (damaged / ".metadata").write_bytes(pickle.dumps(Payload(victim)))
    assert_refused(damaged, r"\.metadata names 'builtins\.getattr', which no checkpoint has need")
    assert not victim.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n.",  # GLOBAL
        b"(S'true'\nios\nsystem\n.",  # INST
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93.",  # from the memory
        b"\x80\x04\x8c\x02os\x8c\x06systemN0\x93.",  # not on top when last seen
        b"\x82\x01.",  # EXT1
        b"no pickle",
        b"",
    ],
)
def test_every_way_to_name_a_function_is_seen(content):
    with pytest.raises(ValueError, match=r"names|torch writes|opcode|pickle"):
        check_names(content)


@pytest.mark.parametrize("output_format", ["torch_dist", "huggingface"])
def test_a_conversion_to_where_something_is_is_refused(damaged, huggingface, output_format):
    source = {"torch_dist": huggingface[0], "huggingface": damaged}[output_format]
    with pytest.raises(ValueError, match="exists and is not an empty directory"):
        convert(source, source, output_format)


def test_a_conversion_to_the_same_format_is_refused(damaged, huggingface, tmp_path):
    with pytest.raises(ValueError, match="has the format torch_dist already"):
        convert(damaged, tmp_path / "new", "torch_dist")
    with pytest.raises(ValueError, match="has the format huggingface already"):
        convert(huggingface[0], tmp_path / "new", "huggingface")
