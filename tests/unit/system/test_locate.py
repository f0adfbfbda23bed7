"""Names on the Hugging Face hub, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve_mega.system import locate
from fastserve_mega.system.config import Config, ModelConfig, ParallelConfig
from fastserve_mega.system.locate import resolve_model
from fastserve_mega.worker import rank as worker_rank
from fastserve_mega.worker.topology import Topology

NAME = "someone/Tiny-1.5B"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub's; and no network, whatever the machine has."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def fill(cache: Path, *names: str) -> Path:
    """What snapshot_download leaves behind."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name in names:
        (snapshot / name).write_text("{}")
    return snapshot


class Hub:
    """Stands in for snapshot_download: the cache as it is, and a repository that can be reached."""

    def __init__(self, cache: Path, *names: str) -> None:
        self.cache = cache
        self.names = names
        self.patterns: list[list[str]] = []

    def __call__(self, name, *, local_files_only=False, allow_patterns=None):
        if local_files_only:
            import huggingface_hub

            return huggingface_hub.snapshot_download(name, local_files_only=True)
        self.patterns.append(allow_patterns)
        wanted = [n for n in self.names if any(Path(n).match(p) for p in allow_patterns)]
        return str(fill(self.cache, *wanted))


def test_a_directory_is_taken_as_it_is(tmp_path, monkeypatch):
    model = ModelConfig(path=str(tmp_path))
    assert resolve_model(model, weights=True) is model
    # Also when it looks like a name, and when a path that cannot be a name is not there.
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (NAME, "/no/where", "./no/where", "~/no/where", "nowhere", "a/b/c"):
        model = ModelConfig(path=path)
        assert resolve_model(model, weights=True) is model


def test_a_cached_snapshot_needs_no_network(cache):
    snapshot = fill(cache, "config.json", "tokenizer.json", "model.safetensors")
    found = resolve_model(ModelConfig(path=NAME), weights=True)
    assert found.directory == snapshot
    assert found.name == ModelConfig(path=NAME).name == "Tiny-1.5B"
    assert resolve_model(ModelConfig(path=NAME, served_name="x"), weights=True).name == "x"


def test_one_sentence_when_the_hub_cannot_be_reached(cache):
    with pytest.raises(ValueError, match=f"'{NAME}' is neither a directory nor could it be") as it:
        resolve_model(ModelConfig(path=NAME), weights=True)
    assert "\n" not in str(it.value)


@pytest.mark.parametrize("weights", [False, True])
def test_only_what_is_needed_is_fetched(cache, weights):
    names = ("config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin")
    hub = Hub(cache, *names)
    found = resolve_model(ModelConfig(path=NAME), weights=weights, download=hub)
    assert {path.name for path in found.directory.iterdir()} == set(names[: 3 if weights else 2])
    resolve_model(ModelConfig(path=NAME), weights=weights, download=hub)
    assert len(hub.patterns) == 1


@pytest.mark.parametrize(
    "there",
    [
        ("config.json",),
        ("tokenizer.json", "model.safetensors"),
        ("config.json", "tokenizer.json"),
        ("config.json", "tokenizer.json", "model.safetensors.index.json", "one.safetensors"),
    ],
)
def test_an_incomplete_snapshot_is_completed(cache, there):
    snapshot = fill(cache, *there)
    index = snapshot / "model.safetensors.index.json"
    if index.exists():
        files = {"a": "one.safetensors", "b": "two.safetensors"}
        index.write_text(json.dumps({"weight_map": files}))
    hub = Hub(cache, "config.json", "tokenizer.json", "model.safetensors")
    resolve_model(ModelConfig(path=NAME), weights=True, download=hub)
    assert len(hub.patterns) == 1


class Ranks:
    """Records when this rank waits for the others."""

    def __init__(self, topology: Topology, happened: list[str]) -> None:
        self.topology = topology
        self.happened = happened

    def gather(self):
        self.happened.append("wait")


@pytest.mark.parametrize(
    ("local_rank", "expected"), [(0, ["look", "wait", "look"]), (1, ["wait", "look"])]
)
def test_one_rank_per_host_fetches_first(monkeypatch, tmp_path, local_rank, expected):
    happened: list[str] = []

    def resolve(model, *, weights):
        assert weights
        happened.append("look")
        return ModelConfig(path=str(tmp_path))

    monkeypatch.setattr(worker_rank, "resolve_model", resolve)
    config = Config(model=ModelConfig(path=NAME), parallel=ParallelConfig(tensor=2))
    topology = Topology(rank=2 + local_rank, world_size=4, local_rank=local_rank, local_size=2)
    resolved = worker_rank._resolve_model(config, Ranks(topology, happened), weights=True)
    assert happened == expected
    assert resolved.model.directory == tmp_path
    assert resolved.parallel == config.parallel


def test_a_name_has_one_slash_and_plain_characters():
    for name in ("Qwen/Qwen2.5-0.5B", "a/b", "HuggingFaceTB/SmolLM2-135M_x"):
        assert locate._HUB_NAME.fullmatch(name)
    for name in ("a", "/a/b", "a/b/", "../b", "./b", "~/b", "a/.b", "a b/c", ""):
        assert not locate._HUB_NAME.fullmatch(name)
