"""Nothing is pickled: a profile or a message cannot run code."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import fastserve_mega
from fastserve_mega.coordinator.profile_file import load_profile, save_profile
from fastserve_mega.scheduling.cost_model import DecodePoint, PrefillPoint, Profile

ROOT = Path(fastserve_mega.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py")) + sorted((ROOT.parent / "tools").glob("*.py"))
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNPICKLING_CALLS = {
    # yaml.load and friends make any object; these are their safe names' opposites.
    "yaml": {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "dump"},
    # Objects travel as pickles.
    "dist": {"all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"},
}
MPI_CALLS = {"send", "recv", "isend", "irecv", "bcast", "gather", "allgather", "scatter"}
"""Of a communicator; their names in capitals take buffers."""
COMMUNICATORS = {"world", "_world", "comm", "_comm", "COMM_WORLD"}
SOCKET_CALLS = {"send_pyobj", "recv_pyobj"}


def pickling(source: str) -> list[str]:
    """What in a source file would pickle or unpickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in PICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLERS:
            found.append(str(node.module))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found += _unsafe_call(node, node.func)
    return found


def _unsafe_call(call: ast.Call, function: ast.Attribute) -> list[str]:
    owner, name = ast.unparse(function.value), function.attr
    arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    unsafe = (
        name in SOCKET_CALLS
        or name in UNPICKLING_CALLS.get(owner.split(".")[-1], ())
        or (owner.split(".")[-1] in COMMUNICATORS and name in MPI_CALLS)
        or (owner == "torch" and name == "load" and arguments.get("weights_only") != "True")
        or (owner in ("np", "numpy") and arguments.get("allow_pickle", "False") != "False")
    )
    return [f"{owner}.{name}"] if unsafe else []


def test_nothing_is_pickled():
    found = {path: pickling(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert len(found) > 100
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "socket.recv_pyobj()",
        "self._world.bcast(value, root=0)",
        "yaml.load(text, Loader)",
        "torch.distributed.dist.all_gather_object(a, b)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_check_can_fail(source):
    assert len(pickling(source)) == 1


def test_a_profile_is_json(tmp_path):
    profile = Profile((PrefillPoint(1, 0.1),), (DecodePoint(1, 16, 0.05),))
    path = tmp_path / "profile.json"
    save_profile(profile, path)
    assert json.loads(path.read_text(encoding="utf-8"))["prefill"] == [
        {"tokens": 1, "seconds": 0.1}
    ]


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    import pickle

    path, victim = tmp_path / "profile.pkl", tmp_path / "executed"

    class Payload:
        def __reduce__(self):
            return (victim.touch, ())

    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"profile\.pkl"):
        load_profile(path)
    assert not victim.exists()
