"""What our changes to programs of torch.compile have in common."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch._inductor.config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import dynconv.ops
from experiments.models import joined

# The code of operators that a compiled program calls: their gradients and the layouts of their outputs are in it.
OPERATORS = (joined.__file__, *(str(path) for path in sorted(Path(str(dynconv.ops.__file__)).parent.glob("*.py"))))


class Pass(CustomGraphPass):
    """A change to the graph of a program."""

    place: str  # the option of torch.compile that takes it

    def uuid(self) -> Any:
        """Identifies this pass, and our operators, in torch's cache of compiled programs.

        The cache keeps forward and backward pass by the operators' names: after a change of an operator's gradient it
        would give the program with the old one.
        """
        return get_hash_for_files((str(sys.modules[type(self).__module__].__file__), *OPERATORS))


def compile_options(passes: Iterable[Pass]) -> dict[str, Any]:
    """The `options` with which torch.compile makes these changes to a program.

    As settings of the process they would be missing in the backward pass: from torch 2.13 on a setting is one of a
    thread, and autograd compiles backward passes for a GPU in threads of its own. Where the process has set a pass of
    somebody else in a place, ours is left out: numbers are the same without it.
    """
    return {each.place: each for each in passes if getattr(inductor_config, each.place) is None}
