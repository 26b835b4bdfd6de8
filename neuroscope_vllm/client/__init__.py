"""A client of the side process: streams, traces, feature cards, steering, and OpenAI's clients
with features. See `Client`."""

from neuroscope_vllm.client.aio import AsyncClient
from neuroscope_vllm.client.records import Card, Described, Label, Site, Steered, SteeredChoice
from neuroscope_vllm.client.sync import Client
from neuroscope_vllm.client.trace import TopFeature, Trace
from neuroscope_vllm.client.wrap import features_of
from neuroscope_vllm.core.errors import ServerError

__all__ = [
    "AsyncClient",
    "Card",
    "Client",
    "Described",
    "Label",
    "ServerError",
    "Site",
    "Steered",
    "SteeredChoice",
    "TopFeature",
    "Trace",
    "features_of",
]
