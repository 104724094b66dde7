import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_stability.tuab.sampling import BalancedSampler

some_labels = st.lists(st.integers(0, 2), min_size=1, max_size=60).map(np.array)


@given(labels=some_labels, seed=st.integers(0, 99))
def test_each_class_comes_equally_often_and_so_do_the_windows_of_a_class(labels, seed):
    torch.manual_seed(seed)
    sampler = BalancedSampler(labels)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == len(labels)
    counts = np.bincount(drawn, minlength=len(labels))
    of_class = [counts[labels == label] for label in np.unique(labels)]
    assert max(c.sum() for c in of_class) - min(c.sum() for c in of_class) <= 1
    assert all(c.max() - c.min() <= 1 for c in of_class)


def test_epochs_differ_and_are_repeated_by_the_same_seed():
    labels = np.array([0] * 70 + [1] * 30)
    sampler = BalancedSampler(labels)
    torch.manual_seed(0)
    epochs = [list(sampler), list(sampler)]
    assert epochs[0] != epochs[1]
    # what is left out of the larger class, and what comes once more of the smaller one, is drawn anew too
    assert set(epochs[0]) != set(epochs[1])
    torch.manual_seed(0)
    assert [list(sampler), list(BalancedSampler(labels))] == epochs
    classes = labels[epochs[0]]
    assert 30 < (classes[1:] != classes[:-1]).sum() < 70  # in random order, not class by class


def test_of_windows_that_do_not_divide_no_class_is_preferred():
    more = [labels[list(BalancedSampler(labels))].mean() > 0.5 for labels in [np.array([0, 0, 0, 1, 1])] * 40]
    assert 8 < sum(more) < 32


@settings(deadline=None)
@given(labels=some_labels, batch_size=st.integers(1, 7), seed=st.integers(0, 9), data=st.data())
def test_the_state_of_a_loader_says_where_it_is_to_the_window(labels, batch_size, seed, data):
    dataset = TensorDataset(torch.arange(len(labels)))

    def loader():
        return StatefulDataLoader(dataset, batch_size=batch_size, sampler=BalancedSampler(labels))

    torch.manual_seed(seed)
    ours = loader()
    seen = data.draw(st.integers(0, len(ours)))
    batches = iter(ours)
    for _ in range(seen):
        next(batches)
    state = ours.state_dict()
    rest = [batch[0].tolist() for batch in batches]
    following = [batch[0].tolist() for batch in ours]
    torch.manual_seed(seed + 100)
    resumed = loader()
    resumed.load_state_dict(state)
    assert [batch[0].tolist() for batch in resumed] == rest
    assert len(rest) == len(ours) - seen
    assert len(following) == len(list(resumed)) == len(ours)  # a whole epoch comes after it
