"""What a compiled program moves between devices."""

import re

from pallas_kernels.tools import hlo

_KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_LINE = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(?:-start)?\(")


def collectives(function, *arguments):
    """``{kind: (count, bytes)}`` of the jitted ``function``; what is in a loop counts once."""
    found = {}
    for shape, kind in _LINE.findall(function.lower(*arguments).compile().as_text()):
        count, size = found.get(kind, (0, 0))
        found[kind] = count + 1, size + hlo.Op("", shape, kind, [], "").size
    return found
