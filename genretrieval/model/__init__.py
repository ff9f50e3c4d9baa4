"""The generator: a Transformer that writes an item's semantic ID code by code."""

from genretrieval.model.configuration import GeneratorConfig
from genretrieval.model.generator import Generator
from genretrieval.model.search import BeamSearch

__all__ = ["BeamSearch", "Generator", "GeneratorConfig"]
