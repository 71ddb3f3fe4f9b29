"""`python -m examples.tal`."""

from examples.tal.cli import app

app()
