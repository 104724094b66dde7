"""The order in which a forward pass uses the parameters, from the graph that it leaves."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def forward_order(loss: Tensor, names: Mapping[Tensor, str]) -> dict[str, int]:
    """When each parameter was first used, as a rank: 0 for the first.

    autograd numbers the nodes of its graph as the forward pass makes them. Parameters that it cannot tell apart (all
    of a compiled graph) come in the order of `names`; those that it does not know are left out.

    Example:
        >>> import torch
        >>> a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> forward_order(((a * 2) * b).sum(), {b: "b", a: "a"})
        {'a': 0, 'b': 1}
    """
    used: dict[str, int] = {}
    seen = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            parameter = getattr(following, "variable", None)
            if parameter is not None and parameter in names:
                name = names[parameter]
                used[name] = min(used.get(name, node._sequence_nr()), node._sequence_nr())
            else:
                stack.append(following)
    places = {name: place for place, name in enumerate(names.values())}
    return {name: rank for rank, name in enumerate(sorted(used, key=lambda n: (used[n], places[n])))}
