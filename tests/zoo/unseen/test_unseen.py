"""Labels of the unseen programs are well formed; whether the diagnosis agrees is published and not asserted."""

import pytest

from tests.zoo import catalogue
from tests.zoo.program import WHERE
from tests.zoo.unseen import FAILURES, HEALTHY


@pytest.mark.parametrize("name", FAILURES)
def test_an_unseen_failure_says_what_its_cause_is_and_where(name):
    expected = catalogue.program(name, 0).expected
    assert catalogue.held_out(name)
    assert set(expected.causes) <= set(WHERE)
    assert all(expected.fault(word) for word in expected.causes)


@pytest.mark.parametrize("name", HEALTHY)
def test_an_unseen_healthy_program_expects_nothing(name):
    assert catalogue.held_out(name)
    assert catalogue.program(name, 0).expected is None
