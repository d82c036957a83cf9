"""Bytes of tensors, each storage once."""

from dataclasses import dataclass

import torch

from speft_ds.training.memory import tensor_bytes


@dataclass
class Holder:
    tensor: torch.Tensor
    others: list


def test_every_storage_counts_once_and_excluded_ones_not_at_all():
    one, two = torch.zeros(100), torch.zeros(50, dtype=torch.int64)
    assert tensor_bytes([one, one[10:20], {"a": [two]}, "text", None]) == 400 + 400
    assert tensor_bytes([Holder(one, [two[:3], one])]) == 800
    assert tensor_bytes([Holder(one, [two])], exclude=[two]) == 400
    pattern = torch.sparse_csr_tensor(torch.arange(5), torch.arange(4), torch.zeros(4), size=(4, 4))
    assert tensor_bytes([pattern]) == 5 * 8 + 4 * 8 + 4 * 4
