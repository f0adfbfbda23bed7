"""Keys, their limits, and the file that they come from."""

from __future__ import annotations

import re

import pytest
import yaml

from fastserve_mega.cli import main
from fastserve_mega.server.api_keys import ApiKeys
from fastserve_mega.server.errors import ApiError
from fastserve_mega.system.api_keys import hash_secret, read_key_file


def entry(secret, **more):
    return {"name": secret, "sha256": hash_secret(secret), **more}


class File:
    """A file of keys, and a clock."""

    def __init__(self, directory):
        self.path = directory / "keys.yaml"
        self.now = 100.0

    def write(self, *entries):
        self.path.write_text(yaml.safe_dump({"keys": list(entries)}))

    def open(self):
        return ApiKeys(self.path, lambda: self.now)


@pytest.fixture
def file(tmp_path):
    return File(tmp_path)


def refused(call):
    with pytest.raises(ApiError) as caught:
        call()
    return caught.value


def test_the_command_makes_a_key_that_the_file_takes(capsys, file):
    assert main(["api-key", "alice"]) == 0
    printed = capsys.readouterr().out
    (secret,) = re.findall(r"fsm-\S+", printed)
    file.path.write_text("keys:\n" + printed[printed.index("  - name") :])
    assert secret not in file.path.read_text()
    assert file.open().find(secret).key.name == "alice"
    assert file.open().find(secret + "x") is None
    assert main(["api-key", "al ice"]) == 2
    assert "the name of a key must be 1 to 64 letters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("one\ntwo\n", "the top level must be a mapping"),
        ("keys: []", "keys"),
        ("keys: [{name: a}]", "sha256"),
        ("keys: [{name: a, sha256: abc}]", "sha256"),
        (
            "keys: [{name: a, sha256: " + "a" * 64 + ", weight: 0}]",
            r"weight must be at least 0.001",
        ),
        ("keys: [{name: a, sha256: " + "a" * 64 + ", rpm: 1}]", "unknown field 'keys.0..rpm'"),
        (yaml.safe_dump({"keys": [entry("a"), entry("a")]}), "two keys have the name a"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_sentence(file, text, complaint):
    file.path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        read_key_file(file.path)
    assert "keys.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_changed_file_is_read_again_and_a_bad_one_refused(file, caplog):
    file.write(entry("a", requests_per_minute=1), entry("b"))
    keys = file.open()
    keys.find("a").admit(1, 1)
    file.write(entry("a", requests_per_minute=1, weight=3.0), entry("c"))
    assert keys.find("c") is None, "looked at too often"
    file.now += 1.0
    assert keys.find("c") is not None
    assert keys.find("b") is None
    assert keys.find("a").key.weight == 3.0
    assert 'key="b"' not in keys.render()
    assert refused(lambda: keys.find("a").admit(1, 1)).status == 429, "limits were forgotten"
    file.path.write_text("keys: 3")
    file.now += 1.0
    assert keys.find("c") is not None
    file.now += 1.0
    assert keys.find("c") is not None
    (warning,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warning.startswith("the API keys stay as they were: ")
    file.path.unlink()
    file.now += 1.0
    assert keys.find("c") is not None


def test_requests_come_again_after_the_time_that_was_told(file):
    file.write(entry("a", requests_per_minute=6))
    holder = file.open().find("a")
    for _ in range(6):
        holder.admit(1, 1)
    error = refused(lambda: holder.admit(1, 1))
    assert error.headers == {"Retry-After": "10"}
    file.now += 10.0
    holder.admit(1, 1)
    assert refused(lambda: holder.admit(1, 1)).headers == {"Retry-After": "10"}


def test_tokens_are_counted_at_the_end_and_may_overdraw(file):
    file.write(entry("a", tokens_per_minute=60))
    holder = file.open().find("a")
    admitted = holder.admit(20, 1)
    admitted.end(100)
    admitted.end(100)  # the same end, told twice
    error = refused(lambda: holder.admit(1, 1))
    assert error.headers == {"Retry-After": "61"}
    file.now += 61.0
    holder.admit(1, 1)


def test_answers_at_once_are_limited(file):
    file.write(entry("a", concurrency=2))
    holder = file.open().find("a")
    first = holder.admit(1, 2)
    assert refused(lambda: holder.admit(1, 1)).status == 429
    assert refused(lambda: holder.admit(1, 3)).status == 400
    first.end(5)
    holder.admit(1, 2)


def test_a_key_may_be_for_work_in_the_background_only(file):
    file.write(entry("batch", most_urgent_priority=4), entry("any"))
    keys = file.open()
    assert keys.find("batch").priority_of(None) == 4
    assert keys.find("batch").priority_of(9) == 9
    assert refused(lambda: keys.find("batch").priority_of(0)).status == 403
    assert keys.find("any").priority_of(None) == 0
    assert keys.find("any").priority_of(-9) == -9
