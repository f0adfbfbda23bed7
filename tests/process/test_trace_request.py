"""The tool that counts what a request passes through."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import trace_request


def test_what_a_streamed_chat_request_passes_through_is_seen(model_directory):
    few = trace_request.trace_chat(model_directory, 2)
    many = trace_request.trace_chat(model_directory, 5)
    # Which functions there are besides depends on timing: whether somebody starves, for example.
    entered = {"server/service.py", "coordinator/coordinator.py", "worker/loop.py"}
    assert entered <= few.files
    assert entered <= many.files
    made = {name: (few.made()[name], count) for name, count in many.made().items()}
    assert made["coordinator.live_request.LiveRequest"] == (1, 1)
    assert made["scheduling.request.Request"] == (1, 1)
    assert made["plan.Plan"] == (4, 10)  # each is decoded by the rank once more
    assert "coordinator.coordinator.Coordinator" not in made
