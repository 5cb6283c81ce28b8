"""What is imported when: modules at their first use, our networks into timm's registry once timm is there.

torch and timm take seconds to import. So this package imports neither before they are needed, and a command that needs
no network says its help at once.

timm imports our networks as its last step. So what networks are made of must not begin by importing timm, or it would
be half imported then: such modules import it where they use it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NETWORKS = ("repmlp.models.build", "repmlp.models.face")  # these import all that register networks


def submodule(package: str, name: str) -> ModuleType:
    """Import a module of a package, for the package's `__getattr__`; AttributeError where there is none."""
    full = f"{package}.{name}"
    if not name.startswith("_"):
        try:
            return importlib.import_module(full)
        except ModuleNotFoundError as error:
            if error.name != full:
                raise
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def need(extra: str, *packages: str) -> None:
    """Raise ModuleNotFoundError with the remedy where a package cannot be imported; extra: of ours, which brings it."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ModuleNotFoundError(f"{name} cannot be imported ({error}): pip install 'repmlp[{extra}]'") from error


def register_with_timm() -> None:
    """Register our networks with timm: now where timm is imported, else as the last step of importing it."""
    if "timm" in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())


def _register() -> None:
    for module in NETWORKS:
        importlib.import_module(module)


class _AfterTimm(MetaPathFinder):
    """Find timm as the other finders do, and have its loader register our networks when it is done."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm":
            return None
        others = (finder for finder in tuple(sys.meta_path) if not isinstance(finder, _AfterTimm))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]  (of this loader alone)
        return spec
