"""What a task's data must be."""

import pytest
from torch import zeros
from torch.utils.data import IterableDataset, TensorDataset

from moe_sampler.training.task import length


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


def test_data_have_a_length():
    assert length(TensorDataset(zeros(3, 2))) == 3
    with pytest.raises(TypeError, match="Endless has no length"):
        length(Endless())
