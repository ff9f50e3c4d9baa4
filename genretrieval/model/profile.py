"""Profile features of a user as one vector: the sum of the hashed embeddings of what is known of them.

Plain torch is the default and what is exported. TorchRec's `EmbeddingBagCollection` does the same behind the same
interface, for tables so large that they are sharded over accelerators: `TorchRecProfile`, which needs `make torchrec`.
Both name their weights alike, so that a checkpoint of one is read by the other.

Shape suffixes are explained in `genretrieval.model.layers`; F is the number of profile features.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from genretrieval.errors import RecipeError

_TABLE = "profile"


class Profile(nn.Module):
    """Sum of the embeddings of hashed features: int64 ``[B, F]``, rows of the table, to float ``[B, D]``."""

    def __init__(self, n_buckets: int, d_model: int) -> None:
        super().__init__()
        self.collection = nn.Module()
        self.collection.embedding_bags = nn.ModuleDict({_TABLE: nn.Embedding(n_buckets, d_model)})

    @property
    def table(self) -> nn.Embedding:
        """The embeddings of all buckets."""
        bags = cast(nn.ModuleDict, self.collection.embedding_bags)
        return cast(nn.Embedding, bags[_TABLE])

    def forward(self, profile_BF: Tensor) -> Tensor:
        """Add up the features' embeddings."""
        return cast(Tensor, self.table(profile_BF)).sum(-2)


class TorchRecProfile(nn.Module):
    """The same by TorchRec, whose `DistributedModelParallel` can shard the table.

    Args:
        profile: whose weights it starts from.

    Raises:
        RecipeError: TorchRec is not installed.
    """

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        try:
            from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
        except (ImportError, OSError) as error:  # its kernels are loaded on import, and fit one release of torch
            raise RecipeError(
                f"generator.profile_tables is torchrec, and TorchRec does not load here ({error}); `make torchrec` "
                "installs the releases that fit, or set it to torch, which gives the same numbers"
            ) from error
        self.jagged = KeyedJaggedTensor
        size, width = profile.table.weight.shape
        table = EmbeddingBagConfig(name=_TABLE, embedding_dim=width, num_embeddings=size, feature_names=[_TABLE])
        self.collection = EmbeddingBagCollection(tables=[table])
        self.load_state_dict(profile.state_dict())

    def forward(self, profile_BF: Tensor) -> Tensor:
        """Add up the features' embeddings."""
        lengths_B = profile_BF.new_full((len(profile_BF),), profile_BF.shape[1])
        features = self.jagged(keys=[_TABLE], values=profile_BF.flatten(), lengths=lengths_B)
        return cast(Tensor, self.collection(features).to_dict()[_TABLE])
