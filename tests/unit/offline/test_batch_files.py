"""Wherever a batch is cut off, the next run finds what is done, and nothing else."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve_mega.offline.batch_files import AnswerFile, count_requests, read_requests

GOOD = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}


def write_lines(path, *lines):
    path.write_text("".join(f"{json.dumps(each)}\n" for each in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "GET"}, "method must be POST, got 'GET'"),
        ({"url": "/v1/models"}, "url must be one of .*, got '/v1/models'"),
        ({"body": {"stream": True}}, "stream must not be true"),
        ({"custom_id": 3}, "custom_id"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_sent(tmp_path, changes, message):
    path = write_lines(tmp_path / "in.jsonl", GOOD, GOOD | {"custom_id": "b"} | changes)
    with pytest.raises(ValueError, match=f"in.jsonl, line 2: .*{message}"):
        count_requests(path)


def test_no_two_lines_have_the_same_id(tmp_path):
    path = write_lines(tmp_path / "in.jsonl", GOOD, GOOD)
    with pytest.raises(ValueError, match="two lines have the custom_id 'a'"):
        count_requests(path)


def test_empty_lines_are_skipped(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(f"\n{json.dumps(GOOD)}\n\n", encoding="utf-8")
    assert [each.custom_id for each in read_requests(path)] == ["a"]


def test_another_file_is_not_taken_for_answers(tmp_path):
    path = write_lines(tmp_path / "out.jsonl", {"prompt": "mine"})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"out.jsonl, line 1: not an answer of a batch"):
        AnswerFile(path)
    assert path.read_bytes() == before


def test_two_batches_do_not_write_to_one_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with AnswerFile(path), pytest.raises(ValueError, match=r"out.jsonl: another batch is writing"):
        AnswerFile(path)
    with AnswerFile(path) as file:  # the lock has gone with the first one
        assert file.done == set()


@given(
    texts=st.lists(st.text(max_size=20), min_size=1, max_size=6),
    cuts=st.lists(st.floats(0, 1), max_size=5),
)
def test_cut_off_anywhere_each_line_is_answered_once(tmp_path_factory, texts, cuts):
    path = tmp_path_factory.mktemp("batch") / "out.jsonl"
    wanted = [f"{number}:{text}" for number, text in enumerate(texts)]

    def run():
        with AnswerFile(path) as file:
            for custom_id in wanted:
                if custom_id not in file.done:
                    file.add(custom_id, 200, "r", {"text": custom_id})

    for cut in cuts:
        run()
        data = path.read_bytes()
        path.write_bytes(data[: int(cut * len(data))])
    run()
    answers = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert sorted(each["custom_id"] for each in answers) == sorted(wanted)
    assert all(each["response"]["body"] == {"text": each["custom_id"]} for each in answers)
