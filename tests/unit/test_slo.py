"""What a good answer is."""

from __future__ import annotations

import pytest

from fastserve_mega.slo import Slo, parse_slo


def test_an_answer_is_good_up_to_both_limits():
    slo = parse_slo("1,0.1")
    assert slo == Slo()
    assert slo.is_met(1.0, 0.1)
    assert not slo.is_met(1.01, 0.05)
    assert not slo.is_met(0.5, 0.11)
    assert slo.is_played(1.0)
    assert not slo.is_played(1.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1", "not of the form TTFT,TPOT in seconds: '1'"),
        ("1,x", "not of the form TTFT,TPOT in seconds: '1,x'"),
        ("0,1", "ttft_s of an SLO must be a positive number, got 0.0"),
        ("1,nan", "tpot_s of an SLO must be a positive number, got nan"),
    ],
)
def test_a_wrong_one_is_one_sentence(text, message):
    with pytest.raises(ValueError, match=message):
        parse_slo(text)
