import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from fastserve_mega.text.tokenizer import TokenBytes, Tokenizer


@pytest.mark.parametrize("text", ["the fox", " naïve café ", "日本語 🙂🙃", "\n\t\x00é"])
def test_the_bytes_of_byte_level_tokens_make_the_text(tiny_tokenizer_dir, text):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    assert b"".join(tokenizer.token_bytes(t) for t in tokenizer.encode(text)) == text.encode()


def test_special_and_unknown_tokens(tiny_tokenizer_dir):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    assert tokenizer.token_bytes(2) == b"<|im_end|>"
    assert tokenizer.token_bytes(10_000) == b""


def test_pieces_of_sentencepiece():
    vocabulary = {"\u2581fox": 0, "<0xE6>": 1, "<0x97>": 2, "<0xA5>": 3, "x\u2581": 4, "<unk>": 5}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    token_bytes = TokenBytes(backend)
    assert [token_bytes(token) for token in range(5)] == [b" fox", b"\xe6", b"\x97", b"\xa5", b"x "]
