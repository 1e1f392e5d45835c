"""Layers whose KV a GPU computes are reported when the GPU has passed them, in order, and never wait for each other."""

from callboard.actors.engine.layer_events import LayerEvents
from callboard.actors.engine.layer_groups import layer_groups


class Stream:
    """A GPU's stream of work, driven by hand: ``passed`` events are done."""

    def __init__(self):
        self.num_recorded = 0
        self.passed = 0
        self.waited_for = []

    def record(self):
        self.num_recorded += 1
        return Mark(self, self.num_recorded)


class Mark:
    def __init__(self, stream, number):
        self.stream, self.number = stream, number

    def query(self):
        return self.number <= self.stream.passed

    def synchronize(self):
        self.stream.waited_for.append(self.number)
        self.stream.passed = max(self.stream.passed, self.number)


def test_nothing_is_waited_for_while_layers_are_launched():
    stream, reported = Stream(), []
    events = LayerEvents(layer_groups(6, 3), lambda *layers: reported.append(layers), stream.record)
    for layer in range(6):
        events.launched(layer)
    assert (reported, stream.waited_for, stream.num_recorded) == ([], [], 3)
    events.finish()
    assert reported == [(0, 2), (2, 4), (4, 6)]
    assert stream.waited_for == [1, 2, 3]


def test_a_group_is_reported_as_soon_as_a_later_layer_finds_it_done():
    stream, reported = Stream(), []
    events = LayerEvents(layer_groups(4, 2), lambda *layers: reported.append(layers), stream.record)
    events.launched(0)
    events.launched(1)
    assert reported == []
    stream.passed = 1
    events.launched(2)
    assert reported == [(0, 2)]
    events.launched(3)
    events.finish()
    assert reported == [(0, 2), (2, 4)]
    assert stream.waited_for == [2]
