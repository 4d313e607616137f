"""Bytes of tensors that are alive."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from satune.agents.live import LiveBytes


def through(live: LiveBytes) -> list[int]:
    with live:
        found = [live.now]
        a = torch.ones(250)  # 1,000 bytes
        view = a[10:]
        found.append(live.now)
        b = a * 2
        found.append(live.now)
        del b
        found.append(live.now)
        c = (a.double() + 1).sum()  # 2,000 bytes twice, and 8 that stay
        found.append(live.now)
        del a
        found.append(live.now)
        del view, c
        return [*found, live.now]


def test_what_is_alive_is_counted_once_and_forgotten() -> None:
    live = LiveBytes()
    assert through(live) == [0, 1000, 2000, 1000, 1008, 1008, 0]
    assert live.peak == 1000 + 2000 + 2000


def test_fake_tensors_count_as_real_ones() -> None:
    live = LiveBytes()
    with FakeTensorMode():
        assert through(live) == [0, 1000, 2000, 1000, 1008, 1008, 0]
    assert live.peak == 5000


def test_gradients_and_tensors_of_before_are_counted() -> None:
    weights = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        live.count([weights, weights.detach()])
        assert live.now == 4000
        (weights * weights).sum().backward()
        assert live.now == 8000
