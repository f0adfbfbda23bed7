"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from fake_coordinator import start_fake_coordinator
from hypothesis import HealthCheck, settings

from fastserve_mega.client.testing import FakeCoordinator
from fastserve_mega.launcher.processes import mpirun_files

# How much is tried of each property: `--hypothesis-profile=long` (make test-long) for the rest. The
# short runs draw the same each time: what fails then is what was changed. The long ones search.
for name, examples in (("short", 40), ("long", 400)):
    settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=name == "short",
        suppress_health_check=list(HealthCheck),
    )
settings.load_profile("short")

# Read when torch is imported, here and in the processes that tests start. Threads that wait for
# each other inside every operation crawl when a core is busy: 50 times as long has been measured.
os.environ["OMP_NUM_THREADS"] = "1"
# Read when Triton is first imported, by Megatron for example.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'narrator' %}{{ raise_exception('no narrator please') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU, torch warns of much that is not ours."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports travel between processes as UTF-8, which has no place for a lone surrogate."""
    report = yield
    report.sections = [
        (title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections
    ]
    return report


@pytest.fixture(scope="module", autouse=True)
def files_of_mpirun() -> Iterator[None]:
    """Where mpirun finds nothing of those that other tests have killed."""
    with mpirun_files() as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a byte-level BPE tokenizer of some 350 tokens, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Characters of several bytes that repeat give tokens that begin or end inside a character.
    corpus = [
        "the quick brown fox jumps over the lazy dog",
        "日本語日本国",
        "🙂🙃🙂🙃",
        "naïve café",
    ]
    bpe.train_from_iterator(corpus * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    directory = tmp_path_factory.mktemp("tiny-tokenizer")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def fake_coordinator() -> Iterator[FakeCoordinator]:
    """A coordinator that answers each request with four tokens, unless told otherwise."""
    coordinator = start_fake_coordinator()
    yield coordinator
    coordinator.close()
