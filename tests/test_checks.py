"""Checks of values that wait for the end of a block, with tensors that pass for those of a GPU."""

import pytest
import torch

from audiopress.compression.checks import check_values, deferred_checks


class OnGPU:
    """As much of a tensor of a GPU as a check looks at."""

    is_cuda = True

    def __init__(self, bad):
        self.bad = torch.tensor(bad)

    def any(self):
        return self.bad.any()


def check(bad, message):
    check_values(OnGPU(bad), lambda: ValueError(message))


def test_the_first_that_fails_is_told_of_at_the_end_of_the_outermost_block():
    reached = []

    def work():
        with deferred_checks():
            check([False, False], "first")
            with deferred_checks():
                check([False, True], "second")
            check([True], "third")
            reached.append("the end")

    with pytest.raises(ValueError, match="second"):
        work()
    assert reached
    with deferred_checks():
        check([False], "forgotten")  # nothing is left of the block before


def test_without_a_block_and_on_a_cpu_it_is_told_of_at_once():
    with pytest.raises(ValueError, match="now"):
        check([True], "now")
    with deferred_checks(), pytest.raises(ValueError, match="now"):
        check_values(torch.tensor([True]), lambda: ValueError("now"))


def test_bad_values_are_named_as_the_cause_of_what_they_break():
    def work(bad):
        with deferred_checks():
            check([bad], "NaN")
            raise IndexError("out of range")

    with pytest.raises(ValueError, match="NaN") as found:
        work(True)
    assert isinstance(found.value.__context__, IndexError)
    with pytest.raises(IndexError, match="out of range"):
        work(False)
