from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastserve_mega.text.tokenizer import Tokenizer

TEXT = "the café: 日本語 🙂"


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_dir)


def test_text_survives_the_round_trip(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_special_and_unknown_ids_are_skipped(tokenizer):
    ids = tokenizer.encode("fox")
    assert tokenizer.decode([1, *ids, tokenizer.vocab_size + 5, 2]) == "fox"


def test_ids_behind_a_gap_are_text_like_any_other(tiny_tokenizer_dir, tmp_path):
    directory = Path(shutil.copytree(tiny_tokenizer_dir, tmp_path / "gap"))
    path = directory / "tokenizer.json"
    backend = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = backend["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] += 50
    path.write_text(json.dumps(backend), encoding="utf-8")
    tokenizer = Tokenizer(directory)
    assert tokenizer.decode([vocabulary[last]]).encode() == tokenizer.token_bytes(vocabulary[last])
    assert tokenizer.decode([vocabulary[last] - 1, tokenizer.vocab_size]) == ""


def test_the_chat_template_ends_where_the_answer_begins(tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(1) == 2


def test_what_the_template_refuses_is_a_value_error(tokenizer):
    with pytest.raises(ValueError, match="no narrator please"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "once"}])


def test_a_lone_surrogate_is_a_value_error(tokenizer):
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("a\ud800b")


def test_a_long_text_gives_no_warning(tokenizer):
    assert len(tokenizer.encode("the quick brown fox " * 2000)) > 4096


def test_missing_and_empty_directories_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no usable tokenizer in"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": "{}"}, "there are no files of one"),
        ({"tokenizer.json": "{}"}, "tokenizer.json: Model missing"),
        ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"}, "git lfs pull"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json must hold a JSON object"),
        ({"tokenizer.model": "pieces"}, "pip install sentencepiece"),
    ],
)
def test_what_is_wrong_with_a_tokenizer_is_one_sentence(tmp_path, monkeypatch, files, message):
    monkeypatch.setattr("fastserve_mega.text.tokenizer.find_spec", lambda name: None)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_that_a_model_brings_along_is_neither_run_nor_asked_about(tmp_path, capfd):
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    with pytest.raises(ValueError, match="contains custom code"):
        Tokenizer(tmp_path)
    assert not (tmp_path / "was_run").exists()
    assert "[y/N]" not in capfd.readouterr().out


def test_loading_is_silent_and_does_without_torch(tiny_tokenizer_dir):
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from fastserve_mega.text.tokenizer import Tokenizer\n"
        f"print(Tokenizer({str(tiny_tokenizer_dir)!r}).decode([300]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr == ""
