import pytest
from fake_coordinator import start_fake_coordinator
from http_server import serving

from fastserve_mega.client.testing import answer
from fastserve_mega.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool | tojson }} <tool_call></tool_call>\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
ENDS = 2


@pytest.fixture(scope="session")
def tokenizer(tiny_tokenizer_dir, tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer_dir)
    tokenizer.chat_template = TEMPLATE
    directory = tmp_path_factory.mktemp("compat-tokenizer")
    tokenizer.save_pretrained(directory)
    return Tokenizer(directory)


@pytest.fixture(scope="session")
def running(tokenizer):
    coordinator = start_fake_coordinator(max_context=4096)
    with serving(coordinator, tokenizer) as url:
        yield coordinator, f"{url}/v1"
    coordinator.close()


@pytest.fixture
def url(running):
    return running[1]


@pytest.fixture
def says(running, tokenizer):
    """Sets the answer to every request; returns the coordinator."""
    coordinator, _ = running
    coordinator.reset()

    def says(text):
        coordinator.behaviour = answer([*tokenizer.encode(text), ENDS])
        return coordinator

    return says
