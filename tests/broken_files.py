"""Files that are not what rewire reads: each writer makes one, and what its error must say."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.function, self.args


def with_program(path: Path, program: bytes) -> None:
    """A file of `torch.save` whose pickle is `program`."""
    torch.save(1, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            is_pickle = name.endswith("/data.pkl")
            archive.writestr(name, b"\x80\x02" + program + b"." if is_pickle else data)


def torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)


def onnx(path: Path) -> None:
    path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.0.0:\x80\x01")


def truncated(path: Path) -> None:
    torch.save(nn.Linear(64, 64), path)
    os.truncate(path, path.stat().st_size // 2)


def damaged(path: Path) -> None:
    """One byte of the pickle is another."""
    torch.save(nn.Linear(4, 4), path)
    data = bytearray(path.read_bytes())
    place = data.index(b"torch.nn.modules.linear")
    data[place] ^= 0xFF
    path.write_bytes(data)


def old_pickle(path: Path) -> None:
    """What torch wrote before 1.6, with more than tensors in it."""
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False)


def gzip(path: Path) -> None:
    path.write_bytes(b"\x1f\x8b\x08\x00 and so on")


def zip_of_else(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes/readme.txt", "nothing")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "torchscript": (torchscript, "TorchScript"),
    "exported": (exported, "exported program"),
    "onnx": (onnx, "ONNX"),
    "truncated": (truncated, "ends too early"),
    "damaged": (damaged, "damaged"),
    "old_pickle": (old_pickle, "before 1.6"),
    "gzip": (gzip, "gzip"),
    "zip_of_else": (zip_of_else, "zip archive of something else"),
    "empty": (lambda path: path.write_bytes(b""), "empty (0 bytes)"),
    "directory": (lambda path: path.mkdir(), "a directory"),
    "missing": (lambda path: None, "no such file"),
    "text": (lambda path: path.write_text("weights go here\n"), "a text file"),
    "html": (lambda path: path.write_text("\n<!DOCTYPE html><title>404</title>"), "web page"),
    "lfs": (lambda path: path.write_text("version https://git-lfs\noid 1\n"), "git-lfs pointer"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps([1])), "Python pickle (protocol 4)"),
    "noise": (lambda path: path.write_bytes(bytes(range(255, 100, -1))), "of no form known here"),
    "number": (lambda path: torch.save(7, path), "neither a model nor a state_dict"),
}
