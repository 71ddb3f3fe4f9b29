"""`python -m examples.finetune`."""

from examples.finetune.cli import app

app(prog_name="python -m examples.finetune")
