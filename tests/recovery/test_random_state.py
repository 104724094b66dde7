"""A captured random state gives the same numbers again, also where it was not read anew."""

import random

import numpy as np
import torch

from lightning_stability.recovery.random_state import RandomState


def numbers(normal: int = 1) -> tuple[object, ...]:
    return random.random(), np.random.rand(), tuple(np.random.randn(normal)), torch.rand(()).item()


def test_each_of_several_captures_gives_its_own_numbers_again():
    for made in (0, 1, 2, 3):  # normal numbers come in pairs: the second one of a pair leaves the words as they are
        states, first = [], []
        for _ in range(4):
            states.append(RandomState.capture())
            np.random.randn(made)
            states.append(RandomState.capture())
            first.append(numbers())
        for number in (3, 0, 2, 1):
            states[2 * number].restore()
            np.random.randn(made)
            assert numbers() == first[number]
            states[2 * number + 1].restore()
            assert numbers() == first[number]


def test_the_second_of_a_pair_of_normal_numbers_is_in_the_state():
    np.random.seed(0)
    np.random.randn()
    with_second = RandomState.capture()
    second = np.random.randn()
    without = RandomState.capture()
    after = np.random.randn()
    with_second.restore()
    assert np.random.randn() == second
    without.restore()
    assert np.random.randn() == after


def test_another_kind_of_generator_is_captured_too():
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        state = RandomState.capture()
        first = numbers()
        state.restore()
        assert numbers() == first
    finally:
        np.random.set_bit_generator(before)
