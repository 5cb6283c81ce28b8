"""Compile a network for training unit by unit: equal units share a graph, so that it takes a fraction of the time."""

from __future__ import annotations

from torch import nn

LISTS = (nn.Sequential, nn.ModuleList)
MOST_KINDS = 8  # torch keeps no more graphs of one function; what comes after them would run uncompiled


def repeated_units(net: nn.Module) -> list[nn.Module]:
    """Return the units that a network is made of: modules in a list of at least two of one class, the outermost ones.

    RepMLPNet has its units and down-samplings, timm's mixers have their blocks. [] for a network that is not made so.
    """
    found: list[nn.Module] = []
    for child in net.children():
        members = list(child.children()) if type(child) in LISTS else []
        classes = {type(member) for member in members}
        if len(members) > 1 and len(classes) == 1 and not classes & set(LISTS):
            found += members
        else:
            found += repeated_units(child)
    return found


def compile_for_training(net: nn.Module) -> None:
    """Compile each of a network's units in place, and run what stands between them (stem, classifier) as it is.

    A network without units, or of more than MOST_KINDS different ones (stochastic depth with a rate of its own for each
    makes all different), is compiled as a whole. State dicts and names stay as they are.
    """
    units = repeated_units(net)
    kinds = {(repr(unit), *(parameter.shape for parameter in unit.parameters())) for unit in units}
    for part in units if 0 < len(kinds) <= MOST_KINDS else [net]:
        part.compile()
