"""One instance of every class of distill/methods, for the tests that hold for all methods and for the README's table.

A new class is found by itself, with its own defaults; its test says so if it cannot run like that, and wants a line in
FIELDS.
"""

from dataclasses import fields

from distill import methods

FIELDS = {  # what a class needs other than its defaults, to run without images
    "DMD": {"distance": "huber"},
    "Regression": {"distance": "huber"},
    "Rewarded": {"weight": 0.0},
}
CLASSES = {name: getattr(methods, name) for name in methods.__all__}


def example(name, tap):
    """The method, reading features at the module `tap` if it reads any."""
    own = {"taps": (tap,)} if any(f.name == "taps" for f in fields(CLASSES[name])) else {}
    return CLASSES[name](**own | FIELDS.get(name, {}))
