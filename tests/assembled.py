"""What Triton's compiler makes of a kernel for a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compiled(
    function: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int, warps: int, stages: int = 3
) -> Any:
    """The compiled kernel.

    Args:
        function: of `triton.jit`.
        types: of its arguments, pointers aligned to 16 bytes; 32-bit whole numbers where none is given.
        constants: what is compiled in; names that it does not have are passed over.
        capability: of the GPU, such as 90.
        warps: of a program.
        stages: of its loops.
    """
    names = function.arg_names
    given = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(
        function,
        given,
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if given[name].startswith("*")},
    )
    return triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages})
