"""Batches: how rows are split over ranks, padded, and told apart where they are packed."""

from collections import Counter

import pytest
import torch

from speft_ds.data.collate import IGNORED, collate, split_global_batch
from speft_ds.data.dataset import Row, pack

CPU = torch.device("cpu")
ROWS = [
    Row([5, 6, 7, 8, 9], [0, 0, 1, 1, 1]),
    Row([10, 11, 5], [0, 1, 1]),
    Row([6] * 9, [0, 0, 0, 1, 1, 0, 0, 1, 1]),
    Row([12, 13, 14, 15], [0, 0, 0, 1]),
    Row([5, 6, 7, 8, 9, 10, 11], [0, 1, 1, 1, 1, 1, 1]),
]


def test_rows_are_padded_on_the_right_and_labels_are_where_the_loss_is():
    # A padding that is also a label takes no label away.
    batch = collate([ROWS[0], ROWS[1], Row([6, 7], [0, 0]), Row([7, 3], [0, 1])], 3, CPU)
    ids = [[5, 6, 7, 8, 9], [10, 11, 5, 3, 3], [6, 7, 3, 3, 3], [7, 3, 3, 3, 3]]
    no = IGNORED
    labels = [[no, no, 7, 8, 9], [no, 11, 5, no, no], [no] * 5, [no, 3, no, no, no]]
    assert batch["input_ids"].tolist() == ids and batch["labels"].tolist() == labels
    assert batch["predicting"].tolist() == [1, 2, 3, 5, 6, 15]
    assert batch["targets"].tolist() == [7, 8, 9, 11, 5, 3]
    assert set(batch) == {"input_ids", "labels", "lengths", "predicting", "targets", "num_logits"}
    assert batch["input_ids"].dtype == torch.int64


def test_positions_restart_at_each_packed_row_and_at_the_padding():
    batch = collate([pack(ROWS[:3]), pack(ROWS[3:]), ROWS[0]], 0, CPU)
    assert batch["position_ids"].tolist() == [
        [*range(5), *range(3), *range(9)],
        [*range(4), *range(7), *range(6)],
        [*range(5), *range(12)],
    ]
    assert batch["cu_seq_lens"].tolist() == [0, 5, 8, 17, 21, 28, 34, 39, 51]
    assert batch["cu_seq_lens"].dtype == torch.int32 and batch["max_length"] == 12
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [9, 7, 3]
    assert batch["labels"][0][:8].tolist() == [IGNORED, IGNORED, 7, 8, 9, IGNORED, 11, 5]


def test_a_single_row_is_one_stretch_of_tokens():
    batch = collate([ROWS[2]], 0, CPU)
    assert batch["cu_seq_lens"].tolist() == [0, 9] and batch["max_length"] == 9
    assert "position_ids" not in batch


def test_a_batch_to_classify_has_one_label_per_row():
    batch = collate([Row([5, 6, 2], [0] * 3, label=1), Row([7, 2], [0] * 2, label=0)], 0, CPU)
    assert batch["labels"].tolist() == [1, 0] and batch["input_ids"].tolist() == [[5, 6, 2], [7, 2, 0]]
    assert set(batch) == {"input_ids", "labels", "lengths"} and batch["lengths"].tolist() == [3, 2]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 2), (2, 2), (4, 1), (4, 2)])
def test_any_split_computes_the_same_rows(world_size, micro_batch):
    rows = [Row([0] * n, [False] * n) for n in (5, 3, 11, 6, 6, 9, 4, 7)]
    parts = [split_global_batch(rows, micro_batch, rank, world_size) for rank in range(world_size)]
    assert {len(part) for part in parts} == {8 // (world_size * micro_batch)}
    assert all(len(micro) == micro_batch for part in parts for micro in part)
    seen = Counter(len(row.ids) for part in parts for micro in part for row in micro)
    assert seen == Counter(len(row.ids) for row in rows)


def test_ranks_that_run_side_by_side_have_rows_of_about_one_length():
    rows = [Row([0] * n, [False] * n) for n in (2, 50, 3, 49, 4, 48, 5, 47)]
    parts = [split_global_batch(rows, 2, rank, 2) for rank in range(2)]
    lengths = [[sorted(len(row.ids) for row in micro) for micro in part] for part in parts]
    assert lengths == [[[48, 50], [3, 5]], [[47, 49], [2, 4]]]
