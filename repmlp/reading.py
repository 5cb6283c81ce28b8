"""Read files of weights without running code that they may hold."""

from __future__ import annotations

import collections
import pickle
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file


def read(path: Path | str) -> dict[str, Any]:
    """Read a .safetensors file, or one that torch.save wrote, onto the CPU without running code that it may hold.

    Objects of other classes than tensors and plain Python values, as training checkpoints hold, are not built: an inert
    placeholder stands for each.
    Raises FileNotFoundError, or ValueError where the file is truncated, or is no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path.absolute()}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise _not_whole(path, error) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a cut file fails in any of a dozen ways
        if not isinstance(error, pickle.UnpicklingError) or _is_torchscript(path):
            raise ValueError(f"{path} {_why_unreadable(path, error)}") from error
        try:
            content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_TensorsOnly)
        except Exception as again:
            raise ValueError(f"{path} {_why_unreadable(path, again)}") from again
    if not isinstance(content, Mapping):
        kind = "whole pickled object" if isinstance(content, _Inert) else type(content).__name__
        raise ValueError(f"{path} holds a {kind}, expected a state_dict: save model.state_dict()")
    return dict(content)


def metadata_of(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; {} for other files."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise _not_whole(path, error) from error


def _not_whole(path: Path, error: SafetensorError) -> ValueError:
    return ValueError(f"{path} is no whole safetensors file ({error}): fetch or write it again")


class _Inert:
    """Stands for an object of a class that is not built: it takes whatever a pickle does to it, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return _Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    add = append


class _TensorUnpickler(pickle.Unpickler):
    """Builds tensors, ordered dictionaries and plain values; any other name in a pickle becomes a placeholder.

    Nothing is imported: what may be called is listed here. Functions are wrapped anew for each file, so that a pickle
    that sets attributes on one changes nothing outside.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): lambda *items: collections.OrderedDict(*items),
            ("torch._utils", "_rebuild_tensor"): lambda *parts: torch._utils._rebuild_tensor(*parts),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *parts: torch._utils._rebuild_tensor_v2(*parts[:6]),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch.nn.parameter", "Parameter"): lambda data, *_: data,
            ("torch", "Size"): lambda *sizes: torch.Size(*sizes),
            ("torch", "device"): lambda *_: torch.device("cpu"),
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        return self._known.get((module, name), _Inert)


def _load_tensors(file: Any, **kwargs: Any) -> Any:
    return _TensorUnpickler(file, **kwargs).load()


# What torch.load takes in place of the module pickle
_TensorsOnly = types.SimpleNamespace(Unpickler=_TensorUnpickler, load=_load_tensors, __name__="tensors_only")


def _is_torchscript(path: Path) -> bool:
    """Say whether a file is a TorchScript program, which torch.load would hand to another reader."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _why_unreadable(path: Path, error: Exception) -> str:
    """Say why a file could not be read: a TorchScript program, or damaged."""
    if "TorchScript" in str(error) or _is_torchscript(path):
        return "is a TorchScript program, not weights: save model.state_dict() instead"
    return f"is no whole PyTorch file ({type(error).__name__}): fetch or write it again"
