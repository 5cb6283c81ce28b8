"""Networks: RepMLPNet, mixers of timm's, UperNet around a backbone, and how a configuration becomes one of them."""

from types import ModuleType

import timm  # noqa: F401  (before any network: it imports them all when it is there, see repmlp.imports)

from repmlp.imports import submodule


def __getattr__(name: str) -> ModuleType:
    return submodule("repmlp.models", name)
