"""The examples run, and say what they promise."""

from __future__ import annotations

import re

import pytest

from examples.finetune.minimal import main


def test_finetune(capsys: pytest.CaptureFixture[str]) -> None:
    main(steps=2, batch=2, size=32)
    out = capsys.readouterr().out
    assert "24 residual modules" in out
    plain, rewired = (float(found) for found in re.findall(r"peak ([\d.]+) MB", out))
    assert rewired < plain / 2
