import pytest

from fastserve_mega.system import host_memory
from fastserve_mega.worker.memory import check_host_memory

GB = 2**30


def test_ranks_that_fit_are_let_through():
    check_host_memory({"weights": 2 * GB, "KV": GB}, 2, 6 * GB)
    check_host_memory({"weights": 2 * GB}, 2, None)


def test_all_ranks_of_the_host_count():
    with pytest.raises(
        ValueError, match=r"5\.00 GB .* 6\.00 GB .* 2 ranks takes 2\.00 for weights"
    ):
        check_host_memory({"weights": 2 * GB, "KV": GB, "nothing": 0}, 2, 5 * GB)


def test_of_memory_that_is_page_locked_it_only_warns(caplog):
    check_host_memory({"KV": 3 * GB}, 2, 5 * GB, is_final=False)
    assert "the host has 5.00 GB of memory left, but 6.00 GB are needed" in caplog.text


def test_the_smallest_limit_counts(tmp_path, monkeypatch):
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (groups / "job/step").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")
    (proc / "self/cgroup").write_text("1:cpu:/x\n0::/job/step\n")
    for group, limit in (("job/step", "max"), ("job", str(4 * GB))):
        (groups / group / "memory.max").write_text(limit)
        (groups / group / "memory.current").write_text(str(2 * GB))
        (groups / group / "memory.stat").write_text(f"anon 5\ninactive_file {GB}\n")
    monkeypatch.setattr(host_memory, "_PROC", proc)
    monkeypatch.setattr(host_memory, "_CGROUPS", groups)
    assert host_memory.host_memory() == (4 * GB, 3 * GB)
    (groups / "job/memory.max").write_text("max")
    assert host_memory.host_memory() == (16 * GB, 8 * GB)
    (proc / "meminfo").write_text("")
    assert host_memory.host_memory() is None
