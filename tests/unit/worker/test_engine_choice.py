"""Who computes the steps on a CPU, and what is said of it."""

from __future__ import annotations

import ctypes
import logging

import pytest
from runners import open_runner

from fastserve_mega.worker.megatron import engine_choice
from fastserve_mega.worker.megatron.native_engine import NativeEngine
from fastserve_mega.worker.native.library import (
    Library,
    NativeError,
    StageConfig,
    library_path,
)

needs_library = pytest.mark.skipif(
    not library_path().exists(), reason="the native step is not built (no compiler)"
)


@needs_library
def test_what_it_cannot_compute_torch_computes_and_one_line_says_so(made, caplog):
    directory, _ = made("mixtral")
    with caplog.at_level(logging.INFO), open_runner(directory):
        pass
    said = [each.getMessage() for each in caplog.records if "steps on the CPU" in each.message]
    assert said == ["steps on the CPU: torch (the native step has no mixture of experts)"]
    with (
        pytest.raises(ValueError, match="cpu_engine=native, but the native step has no mixture"),
        open_runner(directory, cpu_engine="native"),
    ):
        pass


@needs_library
@pytest.mark.parametrize(
    ("family", "engine", "reason"),
    [("mixtral", "auto", "the native step has no mixture"), ("llama", "torch", "torch was asked")],
)
def test_8_bit_weights_are_refused_where_torch_computes(made, family, engine, reason):
    refusal = f"model.quantization=int8 needs the native step, but {reason}"
    with (
        pytest.raises(ValueError, match=refusal),
        open_runner(made(family)[0], cpu_engine=engine, quantization="int8"),
    ):
        pass


def test_without_the_library_torch_computes(made, caplog, monkeypatch):
    def missing():
        raise NativeError("it was not built")

    monkeypatch.setattr(engine_choice, "load_library", missing)
    with caplog.at_level(logging.INFO), open_runner(made("llama")[0]) as runner:
        assert not isinstance(runner._engine, NativeEngine)
    assert "steps on the CPU: torch (native step: it was not built)" in caplog.text


@needs_library
def test_a_library_of_other_sources_is_not_used(monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = [*StageConfig._fields_, ("another", ctypes.c_int64)]

    assert Library(library_path()).create
    monkeypatch.setattr("fastserve_mega.worker.native.library.StageConfig", Longer)
    with pytest.raises(NativeError, match="is of another version: install again"):
        Library(library_path())
