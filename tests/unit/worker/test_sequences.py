import pytest

from fastserve_mega.messaging.rank_messages import SequenceStart, StepCommand
from fastserve_mega.plan import Plan, SequenceSlice
from fastserve_mega.types import SamplingParams
from fastserve_mega.worker.model_runner import PlanError, SequenceTable
from fastserve_mega.worker.topology import read_topology

START = SequenceStart("a", SamplingParams(), 7, 3)


def command(step_id, *slices, tokens=(), started=(), released=()):
    return StepCommand(Plan(step_id, slices, released=released), tuple(tokens), started)


def test_block_tables_follow_the_plans():
    table = SequenceTable()
    first = SequenceSlice("a", 0, 3, True, 0, (5, 6))
    (sequence,) = table.apply(command(4, first, tokens=[(1, 2, 3)], started=(START,)))
    assert (sequence.token_ids, sequence.context) == ((1, 2, 3), 3)
    assert list(sequence.block_table) == [5, 6]
    second = SequenceSlice("a", 3, 1, True, 2, (9,))
    (sequence,) = table.apply(command(5, second, tokens=[(8,)]))
    assert list(sequence.block_table) == [5, 6, 9]
    assert sequence.seed == 7
    # Preempted and admitted again: a whole new table.
    third = SequenceSlice("a", 0, 4, True, 0, (2,))
    (sequence,) = table.apply(command(6, third, tokens=[(1, 2, 3, 8)]))
    assert list(sequence.block_table) == [2]


def test_released_sequences_are_forgotten_before_new_ones_start():
    table = SequenceTable()
    piece = SequenceSlice("a", 0, 1, True, 0, (5,))
    table.apply(command(0, piece, tokens=[(1,)], started=(START,)))
    table.apply(command(1, piece, tokens=[(1,)], started=(START,), released=("a",)))
    assert len(table) == 1
    table.apply(command(2, released=("a",)))
    assert len(table) == 0


def test_a_gap_or_an_unknown_request_is_refused():
    table = SequenceTable()
    table.apply(command(0))
    with pytest.raises(PlanError, match="step 2 came, step 1 was expected"):
        table.apply(command(2))
    with pytest.raises(PlanError, match="unknown a"):
        SequenceTable().apply(command(0, SequenceSlice("a", 0, 1, True, 0, (5,)), tokens=[(1,)]))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            (3, 4, 1, 2),
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            (1, 2, 0, 1),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2, 1, 2)),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"},
            (5, 8, 1, 8),
        ),
        # A batch script, before srun.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, (0, 1, 0, 1)),
        # mpirun inside a task of Slurm.
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "2",
                "SLURM_STEP_ID": "0",
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
            },
            (1, 2, 1, 2),
        ),
        # torchrun started by mpirun, once per host.
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "TORCHELASTIC_RUN_ID": "none",
                "RANK": "3",
                "WORLD_SIZE": "4",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2",
            },
            (3, 4, 1, 2),
        ),
    ],
)
def test_every_launcher_tells_the_rank(environment, expected):
    topology = read_topology(environment)
    assert (
        topology.rank,
        topology.world_size,
        topology.local_rank,
        topology.local_size,
    ) == expected


def test_contradicting_ranks_are_refused():
    with pytest.raises(ValueError, match="rank 2 of 2"):
        read_topology({"RANK": "2", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="RANK must be a number, got 'x'"):
        read_topology({"RANK": "x", "WORLD_SIZE": "2"})
