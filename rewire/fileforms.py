"""What a file is, by its first bytes and its members; what rewire can't read gets one line."""

from __future__ import annotations

import zipfile
from pathlib import Path

from rewire.errors import BadFile

_CLASS_AND_WEIGHTS = (
    "Give the model's class by name and its weights: torch.save(model.state_dict(), path), "
    "then --arch package.module:callable."
)
_FIRST_BYTES = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself. Run git lfs pull."),
    (b"\x89HDF", f"an HDF5 file (Keras?). {_CLASS_AND_WEIGHTS}"),
    (b"\x93NUMPY", f"a NumPy array. {_CLASS_AND_WEIGHTS}"),
    (b"GGUF", f"a GGUF file. {_CLASS_AND_WEIGHTS}"),
    (b"\x1f\x8b", "compressed with gzip. Unpack it first."),
    (b"BZh", "compressed with bzip2. Unpack it first."),
    (b"7z\xbc\xaf", "compressed with 7-Zip. Unpack it first."),
)
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF"  # the magic number of torch before 1.6


def form_of(path: Path) -> str:
    """How `path` is to be read: "torch" or "safetensors".

    Raises:
        BadFile: It can't be; the message says what it is and what to do.
    """
    if path.is_dir():
        raise BadFile(
            f"{path}: a directory. Give a file in it, or transformers/{path} where it holds "
            "a config.json."
        )
    try:
        with open(path, "rb") as stream:
            start = stream.read(512)
    except FileNotFoundError as error:
        raise BadFile(f"{path}: no such file. The working directory is {Path.cwd()}.") from error
    except OSError as error:
        raise BadFile(f"{path}: can't be read ({error.strerror}).") from error
    if start.startswith(b"PK"):
        return _archive_form(path)
    if start.startswith(_OLD_TORCH):
        return "torch"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 30:
        return "safetensors"
    raise BadFile(f"{path}: {_stranger(path, start)}")


def _archive_form(path: Path) -> str:
    """The form of a zip archive."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2] or name for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise BadFile(
            f"{path}: a zip archive that ends too early ({size} bytes). Copy or download it again."
        ) from error
    if "constants.pkl" in members:
        raise BadFile(
            f"{path}: a TorchScript archive: its module is compiled code. {_CLASS_AND_WEIGHTS}"
        )
    if "archive_format" in members or "serialized_exported_program.json" in members:
        raise BadFile(
            f"{path}: an exported program (torch.export): a fixed graph. {_CLASS_AND_WEIGHTS}"
        )
    if "data.pkl" not in members:
        raise BadFile(f"{path}: a zip archive of something else; it has no data.pkl of torch.save.")
    return "torch"


def _stranger(path: Path, start: bytes) -> str:
    """What a file is that rewire can't read."""
    if not start:
        return "empty (0 bytes). Write or copy it again."
    for first, words in _FIRST_BYTES:
        if start.startswith(first):
            return words
    if start[:1] == b"\x08" and (path.suffix == ".onnx" or start[2:3] in (b"\x12", b"\x3a")):
        return f"an ONNX graph. {_CLASS_AND_WEIGHTS}"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return (
            f"a Python pickle (protocol {start[1]}), not written by torch.save; nothing in it was "
            "run. Write the model with torch.save(model, path)."
        )
    return _text(start)


def _text(start: bytes) -> str:
    head = start.lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page (HTML), perhaps an error page of a download. Download the file again."
    if _is_utf8(start):
        return "a text file. Give a file of torch.save or safetensors."
    return (
        f"of no form known here (it begins with {start[:8].hex(' ')}). Give a file of torch.save."
    )


def _is_utf8(start: bytes) -> bool:
    try:
        start[:500].decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > 490  # a character cut at the end
    return b"\x00" not in start
