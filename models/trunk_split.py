"""Split an image tower's backbone into a frozen prefix and a trainable suffix."""

import inspect
from collections.abc import Collection

from torch import fx, nn

from modules import ImageEncoder


def split_trunk(encoder: ImageEncoder) -> None:
    """Set `encoder.trunk_parts`, which forward_frozen and forward_trainable run: (prefix, suffix or None).

    Raises ValueError where the backbone cannot be split where its training begins.
    """
    backbone = encoder.backbone
    encoder.trunk_parts = (backbone, None) if encoder.frozen else split_backbone(backbone, encoder.trainable)


def split_backbone(backbone: nn.Module, trainable: Collection[str]) -> tuple[nn.Module, nn.Module]:
    """Trace the backbone and cut its graph before the first parameter named in `trainable`.

    The two modules, run one after the other, compute what the backbone does, and share its weights. Raises ValueError
    where the suffix needs more than one tensor of the prefix. (`torch.fx.passes.split_module` copies the submodules'
    names, so that a parameter would be called differently before and after, and accepts any number of tensors.)
    """
    try:
        traced = (
            backbone
            if isinstance(backbone, fx.GraphModule)
            else fx.symbolic_trace(backbone, _default_arguments(backbone))
        )
    except Exception as error:  # whatever a forward raises for a proxy instead of a tensor
        raise ValueError(f"it cannot be split into stages ({' '.join(str(error).split())[:100]})") from None
    suffix = set()
    for node in traced.graph.nodes:
        has_parameters = node.op in ("call_module", "get_attr")
        trains = has_parameters and any(f"{name}.".startswith(f"{node.target}.") for name in trainable)
        if trains or suffix.intersection(node.all_input_nodes):
            suffix.add(node)
    boundary = _boundary(suffix)
    while computable := {n for n in boundary if n.all_input_nodes and boundary.issuperset(n.all_input_nodes)}:
        suffix |= computable  # computed from what crosses anyway: a pooling beside a convolution that trains
        boundary = _boundary(suffix)
    if len(boundary) != 1:
        raise ValueError(f"it cannot be split into stages: {len(boundary)} tensors go from the frozen part to the rest")
    (tensor,) = boundary
    nodes = traced.graph.nodes
    frozen = [n for n in nodes if n not in suffix and (n is tensor or any(user not in suffix for user in n.users))]
    rest = [n for n in nodes if n in suffix or (n.op == "get_attr" and any(user in suffix for user in n.users))]
    return _subgraph(traced, frozen, output=tensor), _subgraph(traced, rest, input=tensor)


def _default_arguments(backbone):
    """Arguments of its forward that have a default, so that they are constants of the graph and no inputs."""
    parameters = inspect.signature(backbone.forward).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _boundary(suffix):
    """Nodes of the prefix that the suffix needs; weights can be read from both sides."""
    sources = {source for node in suffix for source in node.all_input_nodes}
    return {node for node in sources - suffix if node.op != "get_attr"}


def _subgraph(traced, nodes, *, input=None, output=None):
    """Some nodes of a graph as a module, from the tensor `input` to the tensor `output`, or to the graph's own."""
    graph = fx.Graph()
    copies = {} if input is None else {input: graph.placeholder("activations")}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    if output is not None:
        graph.output(copies[output])
    return fx.GraphModule(traced, graph)
