"""``auto``: what was measured on this machine, where it is kept, and what it makes ``auto`` take.

``environment``: what a measurement is valid for. ``measurements``: what was measured, as plain data. ``cache``: the
files it is kept in. ``choice``: what ``auto`` took, and why. ``race``: timing backends against each other. ``tuner``:
all of it on a model. ``outlook``, ``report``, ``cli``: for people.
"""
