"""Parts of tensors, read without maps of the files."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from fastserve_mega.worker.megatron import safetensors_files
from fastserve_mega.worker.megatron.safetensors_files import SafetensorsFiles

ROWS, COLUMNS = 40, 3000


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "wide": torch.randn(ROWS, COLUMNS),
        "narrow": torch.randn(ROWS, 12),
        "brain": torch.randn(ROWS, COLUMNS).bfloat16(),
        "vector": torch.randn(ROWS).half(),
        "numbers": torch.arange(5),
    }


@pytest.fixture
def directory(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("name", ["wide", "narrow", "brain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("columns", [None, range(12), range(3, 11), range(5, 2500)])
def test_a_part_equals_the_slice(directory, tensors, name, dtype, columns):
    whole = tensors[name]
    if columns is not None and columns.stop > whole.shape[1]:
        return
    taken = columns or range(whole.shape[1])
    expected = whole[7:31, taken.start : taken.stop].to(dtype)
    with SafetensorsFiles(directory) as files:
        target = torch.full(expected.shape, torch.nan, dtype=dtype)
        files.read(name, target, range(7, 31), columns)
        transposed = torch.full(expected.shape[::-1], torch.nan, dtype=dtype)
        files.read(name, transposed.t(), range(7, 31), columns)
    assert torch.equal(target, expected)
    assert torch.equal(transposed.t(), expected)


def test_a_conversion_takes_a_small_buffer(directory, tensors, monkeypatch):
    monkeypatch.setattr(
        "fastserve_mega.worker.megatron.safetensors_files._STAGING_BYTES", 3 * COLUMNS * 4
    )
    target = torch.empty(ROWS, COLUMNS, dtype=torch.float16)
    with SafetensorsFiles(directory) as files:
        files.read("wide", target, range(ROWS))
    assert torch.equal(target, tensors["wide"].half())


class OnDevice(torch.Tensor):
    """A copy to it may arrive late."""

    is_cuda, is_cpu = True, False
    late = ()

    def __getitem__(self, rows):
        part = super().__getitem__(rows)

        class Part:
            @staticmethod
            def copy_(staged, *, non_blocking):
                assert non_blocking
                self.late += ((part, staged),)

        return Part


def test_a_part_is_read_while_the_one_before_is_copied_to_a_device(directory, tensors, monkeypatch):
    monkeypatch.setattr(safetensors_files, "_STAGING_BYTES", 3 * COLUMNS * 4)
    locked = []
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def made(*arguments, make=make, pin_memory, **options):
            locked.append(pin_memory)
            return make(*arguments, **options)

        monkeypatch.setattr(torch, name, made)
    plain = torch.zeros(ROWS, COLUMNS)
    target = plain.as_subclass(OnDevice)
    with SafetensorsFiles(directory) as files:
        files.read("wide", target, range(ROWS))
    assert locked == [True] * 14
    for part, staged in target.late:
        torch.Tensor.copy_(part.as_subclass(torch.Tensor), staged)
    assert torch.equal(plain, tensors["wide"])


def test_vectors_and_names(directory, tensors):
    with SafetensorsFiles(directory) as files:
        assert set(files) == set(tensors)
        assert "wide" in files
        assert "else" not in files
        target = torch.empty(5)
        files.read("vector", target, range(10, 15))
        assert torch.equal(target, tensors["vector"][10:15].float())
        with pytest.raises(ValueError, match="has no tensor else"):
            _ = files["else"]
        with pytest.raises(ValueError, match="holds weights as I64; supported are F64, F32"):
            files.read("numbers", target, range(5))


def test_a_file_that_shrinks_while_it_is_read(directory):
    files = SafetensorsFiles(directory)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with files, pytest.raises(ValueError, match=r"model\.safetensors has become shorter"):
        files.read("wide", torch.empty(ROWS, COLUMNS), range(ROWS))


def _header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00", "not a safetensors file"),
        (b"\xff" * 20, "not a safetensors file"),
        ((100).to_bytes(8, "little"), "cut short: 100 of its 108 bytes are missing"),
        (b"version https://git-lfs.example/spec/v1", "is a pointer of Git LFS .* git lfs pull"),
        ((3).to_bytes(8, "little") + b"{]}", "its header is no JSON"),
        ((4).to_bytes(8, "little") + b"null", "its header is malformed"),
        (_header(a={"dtype": "F32"}), "its header is malformed"),
        (
            _header(a={"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}) + bytes(9),
            "cut short: 7 of its",
        ),
        (
            _header(a={"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 16]}) + bytes(16),
            r"16 bytes for a tensor F32 of shape \[2, 3\]",
        ),
    ],
)
def test_a_broken_file_is_refused_at_once(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        SafetensorsFiles(tmp_path)


def test_every_shard_is_looked_at(directory):
    (directory / "model.safetensors").rename(directory / "one")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"wide": "one", "b": "two"}}))
    (directory / "two").write_bytes((8).to_bytes(8, "little"))
    with pytest.raises(ValueError, match="two is cut short: 8 of its 16 bytes are missing"):
        SafetensorsFiles(directory)


def test_a_whole_file_needs_no_index(directory):
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"wide": "gone"}}')
    assert "wide" in SafetensorsFiles(directory)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("pytorch_model-00001-of-00002.bin", "pickled weights, .*save_pretrained"),
        ("model-00001-of-00002.safetensors", "a part, of which model.safetensors.index.json has"),
        ("adapter_model.safetensors", "an adapter, to be merged"),
        ("q4.gguf", "not supported"),
        ("notes.txt", "is there$"),
    ],
)
def test_weights_of_another_kind_are_named_with_what_to_do(tmp_path, name, advice):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"holds no weights: .*{advice}") as caught:
        SafetensorsFiles(tmp_path)
    assert (name in str(caught.value)) == (name != "notes.txt")


@pytest.mark.parametrize("change", [None, (0, 0), (-1, -1)])
def test_tensors_are_compared_by_their_values(tmp_path, monkeypatch, change):
    monkeypatch.setattr(safetensors_files, "_STAGING_BYTES", 100)
    one = torch.arange(60.0).reshape(12, 5)
    two = one.clone().to(torch.float64)
    if change:
        two[change] += 1
    save_file({"a": one, "b": two, "c": one[:, :4].contiguous()}, tmp_path / "model.safetensors")
    with SafetensorsFiles(tmp_path) as files:
        assert files.is_same("a", "b") == (change is None)
        assert not files.is_same("a", "c")
