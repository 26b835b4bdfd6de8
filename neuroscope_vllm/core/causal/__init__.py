"""What features of one layer do to those of a later one, as the weights say it.

`pair` checks two SAEs, `edges` finds the strongest virtual weights between them, `firings` holds
what both did on the same tokens, by which edges are weighted, and `graph` is the record of it all.
"""

from neuroscope_vllm.core.causal.edges import BY, INPUTS, OUTPUTS, Edges, strongest
from neuroscope_vllm.core.causal.firings import JointFirings, LayerFirings
from neuroscope_vllm.core.causal.graph import Graph, graph_of
from neuroscope_vllm.core.causal.pair import Block, Pair, blocks, check_pair

__all__ = [
    "BY",
    "INPUTS",
    "OUTPUTS",
    "Block",
    "Edges",
    "Graph",
    "JointFirings",
    "LayerFirings",
    "Pair",
    "blocks",
    "check_pair",
    "graph_of",
    "strongest",
]
