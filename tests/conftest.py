"""Settings of every test."""

from hypothesis import settings

# How long an example takes says something about the machine only.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
