"""Split an image tower's backbone into a frozen prefix and a trainable suffix."""

import inspect
from collections.abc import Collection

from torch import fx, nn

from modules import ImageEncoder


def split_trunk(encoder: ImageEncoder) -> None:
    """Set `encoder.trunk_parts` to (frozen prefix, trainable suffix or None) for forward_frozen and forward_trainable.

    Raises ValueError if the backbone cannot be split before its first trainable parameter.
    """
    backbone = encoder.backbone
    encoder.trunk_parts = (backbone, None) if encoder.frozen else split_backbone(backbone, encoder.trainable)


def split_backbone(backbone: nn.Module, trainable: Collection[str]) -> tuple[nn.Module, nn.Module]:
    """Trace the backbone and split its graph before the first parameter named in `trainable`.

    Applied in sequence, the two modules compute the same as the backbone, and they share its weights. Raises ValueError
    if the suffix needs more than one tensor of the prefix. (`torch.fx.passes.split_module` is not used, because it
    renames the submodules, and so the parameters, and accepts any number of tensors.)
    """
    try:
        traced = (
            backbone
            if isinstance(backbone, fx.GraphModule)
            else fx.symbolic_trace(backbone, _default_arguments(backbone))
        )
    except Exception as error:  # a forward can raise anything for a proxy instead of a tensor
        raise ValueError(f"it cannot be split into stages ({' '.join(str(error).split())[:100]})") from None
    suffix = set()
    for node in traced.graph.nodes:
        has_parameters = node.op in ("call_module", "get_attr")
        trains = has_parameters and any(f"{name}.".startswith(f"{node.target}.") for name in trainable)
        if trains or suffix.intersection(node.all_input_nodes):
            suffix.add(node)
    boundary = _boundary(suffix)
    while computable := {n for n in boundary if n.all_input_nodes and boundary.issuperset(n.all_input_nodes)}:
        suffix |= computable  # computed from a tensor that crosses anyway, as a pooling beside a trainable convolution
        boundary = _boundary(suffix)
    if len(boundary) != 1:
        raise ValueError(f"it cannot be split into stages: {len(boundary)} tensors cross from the frozen part")
    (tensor,) = boundary
    nodes = traced.graph.nodes
    prefix_nodes = [n for n in nodes if n not in suffix and (n is tensor or any(u not in suffix for u in n.users))]
    suffix_nodes = [n for n in nodes if n in suffix or (n.op == "get_attr" and any(u in suffix for u in n.users))]
    return _subgraph(traced, prefix_nodes, output=tensor), _subgraph(traced, suffix_nodes, input=tensor)


def _default_arguments(backbone):
    """Return the defaults of forward's arguments, so that they become constants of the graph instead of inputs."""
    parameters = inspect.signature(backbone.forward).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _boundary(suffix):
    """Return the prefix nodes that the suffix reads, except weights, which both modules can read."""
    sources = {source for node in suffix for source in node.all_input_nodes}
    return {node for node in sources - suffix if node.op != "get_attr"}


def _subgraph(traced, nodes, *, input=None, output=None):
    """Return a module of some of the graph's nodes, from the node `input` to the node `output`.

    None stands for the input or the output of the whole graph.
    """
    graph = fx.Graph()
    new_nodes = {} if input is None else {input: graph.placeholder("activations")}
    for node in nodes:
        new_nodes[node] = graph.node_copy(node, new_nodes.__getitem__)
    if output is not None:
        graph.output(new_nodes[output])
    return fx.GraphModule(traced, graph)
