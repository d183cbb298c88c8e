"""Which part of a tower trains: its last stages or layers, or low-rank adapters in place of its weights."""

import inspect
from collections.abc import Callable, Collection

from torch import fx, nn


def last_parameters(backbone: nn.Module, last: int) -> set[str]:
    """Names of the parameters in the last stages of a timm model, or the last layers of a transformers model.

    What stands behind them (a final norm, a projection) is among them, what stands before (embeddings) is not. Raises
    ValueError where the model has no stages or layers, or fewer.
    """
    numbers = _timm_stages(backbone) or _layers(backbone)
    # A norm alone is no stage: it belongs to the one before it.
    matrices = {name for name, parameter in backbone.named_parameters() if parameter.ndim > 1}
    stages = sorted({number for name, number in numbers.items() if number >= 0 and name in matrices})
    if not stages:
        raise ValueError("it has no stages or layers to choose from: train all of it, or none")
    if last > len(stages):
        raise ValueError(f"it has {len(stages)} stages or layers, so its last {last} cannot be chosen")
    return {name for name, number in numbers.items() if number >= stages[-last]}


def cut(backbone: nn.Module, trained: Collection[str]) -> tuple[nn.Module, nn.Module]:
    """Two modules that are the backbone one after another: what comes before the first parameter named in `trained`,
    and the rest. They share its weights. Raises ValueError where one tensor is not all that the rest needs.
    """
    try:
        whole = backbone if isinstance(backbone, fx.GraphModule) else fx.symbolic_trace(backbone, _defaults(backbone))
    except Exception as error:  # whatever its forward does with what is no tensor yet
        raise ValueError(f"it cannot be cut into stages ({' '.join(str(error).split())[:100]})") from None
    behind = set()
    for node in whole.graph.nodes:
        holds = node.op in ("call_module", "get_attr")
        trains = holds and any(f"{name}.".startswith(f"{node.target}.") for name in trained)
        if trains or behind.intersection(node.all_input_nodes):
            behind.add(node)
    seams = _seams(behind)
    while inner := {node for node in seams if node.all_input_nodes and seams.issuperset(node.all_input_nodes)}:
        behind |= inner  # computed from what crosses anyway: a pooling beside a convolution that trains
        seams = _seams(behind)
    if len(seams) != 1:
        raise ValueError(f"it cannot be cut into stages: {len(seams)} tensors go from the frozen part to the rest")
    (seam,) = seams
    graph = whole.graph.nodes
    frozen = [n for n in graph if n not in behind and (n is seam or any(user not in behind for user in n.users))]
    rest = [n for n in graph if n in behind or (n.op == "get_attr" and any(user in behind for user in n.users))]
    return _part(whole, frozen, result=seam), _part(whole, rest, start=seam)


def _defaults(backbone):
    """The arguments of its forward that have a default, so that they are no inputs of the graph."""
    parameters = inspect.signature(backbone.forward).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def _seams(behind):
    """The nodes that others behind them need; a weight that is frozen can be had everywhere."""
    sources = {source for node in behind for source in node.all_input_nodes}
    return {node for node in sources - behind if node.op != "get_attr"}


def _part(whole, nodes, *, start=None, result=None):
    """Some nodes of a graph as a module: they begin from `start`, and give `result` or what the graph gives."""
    graph = fx.Graph()
    copies = {} if start is None else {start: graph.placeholder("found")}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    if result is not None:
        graph.output(copies[result])
    return fx.GraphModule(whole, graph)


def stage_matcher(backbone: nn.Module) -> dict | None:
    """The patterns by which a timm model groups its parameters into stages."""
    if hasattr(backbone, "stages") and isinstance(backbone.stages, dict):
        return backbone.stages
    return (
        backbone.group_matcher(coarse=True) if isinstance(getattr(backbone, "group_matcher", None), Callable) else None
    )


def add_lora(backbone: nn.Module, rank: int) -> nn.Module:
    """The backbone with a low-rank adapter (LoRA, arXiv 2106.09685) beside every matrix and convolution.

    It says the same as before until it is trained. Raises ValueError without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise ValueError("--lora needs peft: pip install peft") from None
    whole, backbone = backbone, backbone.model if hasattr(backbone, "model") else backbone  # of a pair's half
    inside = {name for name, module in backbone.named_modules() if isinstance(module, nn.MultiheadAttention)}
    targets = [
        name
        for name, module in backbone.named_modules()
        if (isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and name.rpartition(".")[0] not in inside  # its weights are read directly, past an adapter
    ]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), backbone)
    return whole


def adapters(backbone: nn.Module) -> set[str]:
    """Names of the adapters' parameters."""
    return {name for name, _ in backbone.named_parameters() if ".lora_" in name}


def lora_rank(backbone: nn.Module) -> int:
    """The rank of the backbone's adapters, 0 without any."""
    return next((tensor.shape[0] for name, tensor in backbone.named_parameters() if ".lora_A." in name), 0)


def _timm_stages(backbone):
    """Parameter name → number of its stage, -1 for the stem; empty for a model that is not timm's."""
    matcher = stage_matcher(backbone)
    if matcher is None:
        return {}
    from timm.models._manipulate import group_with_matcher

    numbers = group_with_matcher(backbone.named_parameters(), matcher, return_values=False, reverse=True)
    return {name: number - 1 for name, number in numbers.items()}


def _layers(backbone):
    """Parameter name → number of its layer in the longest list of layers; those before it -1, those behind it last.

    Embeddings are -1 wherever they stand: MPNet keeps what all its layers need to know of positions behind them, and
    with that in training, the gradient would have to go down to the first.
    """
    lists = {name: module for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        return {}
    prefix = max(lists, key=lambda name: len(lists[name])) + "."
    embeddings = {f"{name}.weight" for name, module in backbone.named_modules() if isinstance(module, nn.Embedding)}
    numbers, reached = {}, -1
    for name, _ in backbone.named_parameters():
        if name.startswith(prefix):
            reached = int(name.removeprefix(prefix).partition(".")[0])
        numbers[name] = -1 if name in embeddings else reached
    return numbers
