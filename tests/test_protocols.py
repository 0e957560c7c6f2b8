"""Protocols are satisfied by what an object does, however it comes by it."""

from __future__ import annotations

from typing import Protocol

import pytest

from moe_sampler import Expert, FlowPath
from moe_sampler._protocols import implements, missing_names
from moe_sampler.data.scenes import DemoScenes
from moe_sampler.expert_training.images import DrawnSource


class Wrapper:
    """What a proxy, a lazy object or a mock looks like."""

    def __init__(self, wrapped):
        self._wrapped = wrapped

    def __getattr__(self, name):
        return getattr(self._wrapped, name)


class Lines(Protocol):
    length: int

    def __len__(self) -> int: ...

    def draw(self) -> None: ...


class Circles(Lines, Protocol):
    def turn(self) -> None: ...


def test_names_are_those_of_all_protocols_above():
    assert missing_names(object(), Circles) == ["length", "draw", "turn"]
    assert missing_names([], Lines) == ["length", "draw"]


def test_a_wrapper_is_what_it_wraps():
    expert = Expert("x", Wrapper(FlowPath()), "flow_prediction")
    assert expert.path.at(0.5) == FlowPath().at(0.5)
    source = DemoScenes(2)
    assert implements(source, DrawnSource) and implements(Wrapper(source), DrawnSource)
    assert not implements([], DrawnSource)


def test_a_path_that_lacks_something_is_told_what():
    class Half:
        discrete = True
        at = timestep = level = FlowPath.at

    with pytest.raises(TypeError, match=r"x: path must be .*; Half has no initial_scale, grid$"):
        Expert("x", Half(), "sample")
