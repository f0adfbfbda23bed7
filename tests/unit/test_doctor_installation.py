"""What doctor says of packages that are missing, broken or too old."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from fastserve_mega.doctor import (
    installation,
)
from fastserve_mega.system.config import (
    Config,
    ModelConfig,
    ParallelConfig,
)
from fastserve_mega.worker.native.library import InstructionSet, NativeError

CONFIG = Config(model=ModelConfig(path="/nowhere/model"))


def statuses(findings):
    return [finding.status for finding in findings]


@pytest.fixture
def fake_packages(tmp_path, monkeypatch):
    """A directory whose packages this process and its probes find first."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")

    def add(name, source, version=None):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
        if version:
            info = tmp_path / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")

    return add


def test_the_apex_of_pypi_is_not_nvidias(fake_packages):
    fake_packages("apex", "", "0.9.10")
    (finding,) = installation.check_apex()
    assert finding.status == "warning"
    assert "0.9.10 of PyPI" in finding.found
    assert "pip uninstall apex" in finding.remedy


def test_nvidias_apex_is_found(fake_packages, tmp_path):
    fake_packages("apex", "", "0.1")
    (tmp_path / "apex" / "normalization").mkdir()
    (finding,) = installation.check_apex()
    assert (finding.status, finding.found) == ("ok", "NVIDIA's, without fused kernels")


def test_the_native_step(monkeypatch):
    def missing():
        raise NativeError("it was not built")

    monkeypatch.setattr(installation, "load_library", missing)
    (finding,) = installation.check_native_step()
    assert (finding.status, finding.subject) == ("ok", "native step")
    assert finding.found.startswith("not there: it was not built; optional")
    library = SimpleNamespace(best_instruction_set=InstructionSet.AVX2)
    monkeypatch.setattr(installation, "load_library", lambda: library)
    (finding,) = installation.check_native_step()
    assert finding.found == "built; uses AVX2 here"


def test_a_torch_that_cannot_be_loaded(fake_packages):
    fake_packages("torch", "raise OSError('libcudart.so.12: cannot open shared object file')")
    (finding,) = installation.check_torch(None)
    assert finding.status == "problem"
    assert "libcudart.so.12" in finding.found
    assert "pip install torch" in finding.remedy


def fake_torch(devices, cuda):
    answer = {"version": "2.6", "cuda": cuda, "devices": [{"name": d} for d in devices]}
    return f"print({json.dumps(json.dumps(answer))})\nraise SystemExit(0)"


@pytest.mark.parametrize(
    ("parallel", "torch", "status", "found"),
    [
        ({"device": "cuda"}, ([], None), "problem", "parallel.device is cuda"),
        ({}, ([], "12.4"), "warning", "ranks will compute on the CPU"),
        ({"tensor": 4}, (["H100"] * 2, "12.4"), "problem", "2 x H100; 4 ranks"),
        ({"tensor": 4}, (["H100"] * 4, "12.4"), "ok", "4 x H100"),
    ],
)
def test_too_few_devices(fake_packages, parallel, torch, status, found):
    fake_packages("torch", fake_torch(*torch))
    config = Config(model=CONFIG.model, parallel=ParallelConfig(**parallel))
    version, finding = installation.check_torch(config)
    assert version.status == "ok"
    assert finding.status == status
    assert found in finding.found


def test_libraries_that_are_missing_or_too_old(monkeypatch):
    lines = ["msgspec>=999", "no-such-library>=2", "rich", 'also-not-there; extra == "speed"']
    monkeypatch.setattr(installation.metadata, "requires", lambda _: lines)
    monkeypatch.setattr(
        installation.metadata,
        "metadata",
        lambda _: type("M", (), {"get_all": lambda *_: ["speed"]}),
    )
    old, missing, extra = installation.check_libraries()
    assert "msgspec>=999 is needed" in old.found
    assert missing.remedy == "pip install 'no-such-library>=2'"
    assert statuses([old, missing, extra]) == ["problem", "problem", "ok"]
    assert "also-not-there; optional: pip install 'fastserve_mega[speed]'" in extra.found


def test_this_mpi():
    findings = list(installation.check_mpi(None))
    assert statuses(findings) == ["ok", "ok"], findings


def test_an_mpirun_of_another_kind(monkeypatch, tmp_path):
    script = tmp_path / "mpirun"
    script.write_text('#!/bin/sh\n"$@"\n"$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(installation, "mpirun_command", lambda _: [str(script)])
    *_, finding = installation.check_mpi(
        Config(model=CONFIG.model, parallel=ParallelConfig(pipeline=2))
    )
    assert finding.status == "problem"
    assert "two ranks were each alone" in finding.found
    *_, finding = installation.check_mpi(CONFIG)
    assert finding.status == "warning"  # one rank needs no MPI


def test_an_mpi_that_crashes(fake_packages):
    fake_packages("mpi4py", "import os; os.abort()")
    (finding,) = installation.check_mpi(None)
    assert finding.status == "problem"
    assert "SIGABRT" in finding.found
