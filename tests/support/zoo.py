"""One instance of every class of distill/methods, for the tests that hold for all methods and for the table of methods.

A class is found by itself, with its own defaults. What one needs beyond them, a class to forget say, is here.
"""

from dataclasses import fields

from distill import methods

ARGUMENTS = {
    "SFD": {"forget": (1,), "override": (0,)},
    "RCM": {"warmup": 0},  # before its end the fake score rests
    "Sprint": {"guidance": 1.5},  # a range is told to the network
    "TSM": {"guidance": 2.0},  # without, a student that starts as its teacher stays there
}
CLASSES = {name: getattr(methods, name) for name in methods.__all__}


def example(name, tap=None):
    """The method; it reads features at the module `tap`, if it reads any."""
    own = {f.name: (tap,) for f in fields(CLASSES[name]) if tap and f.name.endswith("taps")}
    return CLASSES[name](**own, **ARGUMENTS.get(name, {}))
