import pytest

from fastserve_mega.worker.rendezvous import choose_slurm_store, first_slurm_host

STEP = {"SLURM_JOB_ID": "12345", "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[07-09]"}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("vm", "vm"),
        ("a1,b2", "a1"),
        ("node[03-05,9],login", "node03"),
        ("node-[10,12]", "node-10"),
        ("rack[1-2]n[001-016].site", "rack1n001.site"),
        ("10.0.0.[4-7]", "10.0.0.4"),
    ],
)
def test_the_first_host_of_a_list_of_slurm(hosts, first):
    assert first_slurm_host(hosts) == first


def test_tasks_of_slurm_meet_at_a_port_of_their_step():
    task, beside = dict(STEP), {**STEP, "SLURM_STEP_ID": "3"}
    choose_slurm_store(task)
    choose_slurm_store(beside)
    assert (task["MASTER_ADDR"], task["MASTER_PORT"]) == ("gpu07", "22547")
    assert beside["MASTER_PORT"] != task["MASTER_PORT"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**STEP, "SLURM_STEP_ID": ""},
        {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "gpu07"},  # a batch script, not a task
        {**STEP, "MASTER_ADDR": "head", "MASTER_PORT": "29500"},
    ],
)
def test_nothing_is_chosen_outside_a_step_or_against_what_is_set(environment):
    changed = dict(environment)
    choose_slurm_store(changed)
    assert changed == environment
