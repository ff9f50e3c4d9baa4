"""The ranking model: how likely an item is shown at all, and once shown is clicked, put into the cart, purchased.

It is small, and reads what a generator reads, so that it can score whatever a generator writes: an item is its
semantic ID's codes and, where given, a frozen content vector; there is no embedding of item rows, so an item that
nobody has met has a score like any other. What a user would do is kept apart from where on the page an item stood.

Tensor names carry the shapes of `genretrieval.model.layers`, and here K are candidates of a request, M behaviours,
N all items, C numbers of a content vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genretrieval.errors import RecipeError

NO_PLACE = -1
"""Place of an item of which it is not known where it was shown."""


@dataclass(frozen=True, slots=True)
class RankingConfig:
    """Sizes of a `RankingModel`.

    Attributes:
        d_model: width of a representation.
        n_heads: heads of the attention over the history; must divide `d_model`.
        d_hidden: width of the network that scores.
        max_history: newest interactions that are read.
        n_places: places of a page with a position bias of their own; those further down share the last one.
        position_bias: whether there is one. Without, what comes of an item's place is credited to the item; that is
            what the correction is measured against.
        query_vocab_size: entries of the query tokenizer, at most; 0 makes a model without queries.
        max_query_tokens: longer queries are cut.
        dropout: on the input of the network that scores.

    Raises:
        RecipeError: a size is out of range.
    """

    d_model: int = 64
    n_heads: int = 4
    d_hidden: int = 128
    max_history: int = 50
    n_places: int = 20
    position_bias: bool = True
    query_vocab_size: int = 4096
    max_query_tokens: int = 16
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "d_hidden", "max_history", "n_places", "max_query_tokens"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} of the ranking model is {getattr(self, name)}; it must be 1 or more")
        if self.d_model % self.n_heads:
            raise RecipeError(f"d_model={self.d_model} of the ranking model must be a multiple of {self.n_heads} heads")
        if self.query_vocab_size < 0 or not 0 <= self.dropout < 1:
            raise RecipeError(
                f"query_vocab_size={self.query_vocab_size}, dropout={self.dropout} of the ranking model: give 0 or "
                "more, and a share in [0, 1)"
            )


class RankingRequests(NamedTuple):
    """What is known of B requests before anything is shown.

    Attributes:
        items_BS: int64, item rows of the history, the newest first.
        events_BS: int64, their behaviours.
        mask_BS: bool, which of them are real; S may be 0.
        query_BQ: int64, query tokens, 0 where there is none; Q may be 0.
    """

    items_BS: Tensor
    events_BS: Tensor
    mask_BS: Tensor
    query_BQ: Tensor


class Catalogue(NamedTuple):
    """What items are made of.

    Attributes:
        codes_NL: int64, semantic IDs.
        content_NC: float32, frozen vectors, scaled to one length here; None for a model without.
    """

    codes_NL: Tensor
    content_NC: Tensor | None = None


class RankingScores(NamedTuple):
    """What candidates of B requests are worth.

    Attributes:
        relevance_BK: float, logarithm of how much more often such an item is shown for such a request than drawn from
            the catalogue, up to a constant; 0 for a model that knows nothing of exposures.
        probabilities_BKM: float, calibrated probability of each outcome, were the item shown on the first place.
    """

    relevance_BK: Tensor
    probabilities_BKM: Tensor


class TargetAttention(nn.Module):
    """What of a history bears on each candidate: every candidate attends to the history (DIN, arXiv 1706.06978).

    Beside the products of representations, each head has a learned bias for how many interactions ago something was.
    A softmax forgets how much there was to attend to, so a place with logit and value 0 is part of it, which is all
    there is for an empty history.
    """

    def __init__(self, d_model: int, n_heads: int, max_history: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key, self.value, self.output = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.recency = nn.Parameter(torch.zeros(n_heads, max_history))

    def forward(self, candidates_BKD: Tensor, history_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        """Float ``[B, K, D]``; the history is newest first."""
        q_BHKE = self.split(self.query(candidates_BKD))
        k_BHSE, v_BHSE = self.split(self.key(history_BSD)), self.split(self.value(history_BSD))
        logits_BHKS = q_BHKE @ k_BHSE.transpose(-1, -2) * q_BHKE.shape[-1] ** -0.5
        logits_BHKS = logits_BHKS + self.recency[:, None, : history_BSD.shape[1]]
        logits_BHKS = logits_BHKS.masked_fill(~mask_BS[:, None, None, :], -torch.inf)
        weights_BHKS = nn.functional.pad(logits_BHKS, (1, 0)).softmax(-1)[..., 1:]
        return self.output((weights_BHKS @ v_BHSE).transpose(1, 2).flatten(2))

    def split(self, x_BSD: Tensor) -> Tensor:
        """``[B, S, D]`` to ``[B, H, S, E]``."""
        return x_BSD.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)


class RankingModel(nn.Module):
    """One logit a behaviour, in a chain: of a click given an exposure, of a cart given a click, of a purchase after it.

    ``p(purchase) = p(click) p(cart | click) p(purchase | cart)``, as ESMM (arXiv 1804.07931) has it, so that the
    probability of no behaviour exceeds that of one it presupposes. Where the chain begins with exposure, that logit
    tells what is shown for a request from items drawn at random: what a user does with an item that is beside the point
    cannot be learnt from items that were shown, of which none is. The other probabilities are given an exposure.

    Whether a place of the page is looked at has to do with the click alone. Its bias is added to the click's logit
    where the place is known, and is 0 on the first place and where nothing is known. Scores leave it out, and so all
    speak of the first place (the additive form of PAL, RecSys 2019, and of Wang et al., WSDM 2018).

    The catalogue is no part of the state: more items than in training can be given with equal weights.
    """

    codes: Tensor
    content: Tensor | None
    slope: Tensor
    intercept: Tensor

    def __init__(
        self,
        catalogue: Catalogue,
        codebook_sizes: Sequence[int],
        behaviours: Sequence[str],
        n_given: int,
        n_events: int,
        query_vocab_size: int,
        config: RankingConfig,
    ) -> None:
        """Draw weights.

        Args:
            catalogue: the items, in row order.
            codebook_sizes: codes of each level.
            behaviours: names of the chain, each presupposing the one before it.
            n_given: behaviours at its beginning that are no outcome: 1 where it begins with exposure, else 0.
            n_events: behaviours of a history, entry 0 being every other one.
            query_vocab_size: entries of the query tokenizer; 0 for a model without queries.
            config: sizes.
        """
        super().__init__()
        assert catalogue.codes_NL.shape[1] == len(codebook_sizes)
        d = config.d_model
        self.config = config
        self.behaviours = tuple(behaviours)
        self.n_given = n_given
        assert n_given in (0, 1)
        assert self.outcomes
        starts = torch.tensor([0, *codebook_sizes[:-1]]).cumsum(0)
        self.register_buffer("codes", catalogue.codes_NL + starts, persistent=False)
        content = catalogue.content_NC
        self.content_map: nn.Linear | None = None
        if content is not None:
            # Rows of length sqrt(C), so that the projection begins at the scale of the codes' embeddings.
            content = nn.functional.normalize(content.float(), dim=1) * content.shape[1] ** 0.5
            self.content_map = nn.Linear(content.shape[1], d, bias=False)
        self.register_buffer("content", content, persistent=False)
        self.code_embedding = nn.Embedding(sum(codebook_sizes), d)
        self.event_embedding = nn.Embedding(n_events, d)
        self.query_embedding = nn.Embedding(query_vocab_size, d) if query_vocab_size else None
        for table in (self.code_embedding, self.event_embedding, self.query_embedding):
            if table is not None:
                nn.init.normal_(table.weight, std=d**-0.5)
        self.attention = TargetAttention(d, config.n_heads, config.max_history)
        self.network = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(5 * d, config.d_hidden),
            nn.ReLU(),
            nn.Linear(config.d_hidden, config.d_hidden // 2),
            nn.ReLU(),
            nn.Linear(config.d_hidden // 2, len(behaviours)),
        )
        self.place_bias = nn.Parameter(torch.zeros(config.n_places - 1)) if config.position_bias else None
        self.register_buffer("slope", torch.ones(len(behaviours)))
        self.register_buffer("intercept", torch.zeros(len(behaviours)))

    @property
    def outcomes(self) -> tuple[str, ...]:
        """The behaviours that have a probability: all but exposure."""
        return self.behaviours[self.n_given :]

    def items(self, rows: Tensor) -> Tensor:
        """Representations of item rows: int64 ``[...]`` to float ``[..., D]``."""
        # A batch meets the same items over and over; each is represented once.
        distinct_X, where = torch.unique(rows, return_inverse=True)
        x_XD = self.code_embedding(self.codes[distinct_X]).sum(-2)
        if self.content_map is not None and self.content is not None:
            x_XD = x_XD + self.content_map(self.content[distinct_X])
        return nn.functional.embedding(where, x_XD)

    def query(self, query_BQ: Tensor) -> Tensor:
        """Mean of the tokens' embeddings, float ``[B, D]``; 0 without a query."""
        if self.query_embedding is None:
            return self.code_embedding.weight.new_zeros(len(query_BQ), self.config.d_model)
        real_BQ1 = (query_BQ != 0)[..., None]
        return (self.query_embedding(query_BQ) * real_BQ1).sum(1) / real_BQ1.sum(1).clamp(min=1)

    def forward(self, requests: RankingRequests, items_BK: Tensor) -> Tensor:
        """Logits of the chain on the first place, before calibration.

        Args:
            requests: B of them.
            items_BK: int64, item rows of K candidates for each.

        Returns:
            Float ``[B, K, M]``: entry m is the logit of behaviour m, given the one before it.
        """
        n_history = requests.items_BS.shape[1]
        x_BXD = self.items(torch.cat([requests.items_BS, items_BK], 1))
        history_BSD = x_BXD[:, :n_history] + self.event_embedding(requests.events_BS)
        candidates_BKD = x_BXD[:, n_history:]
        user_BKD = self.attention(candidates_BKD, history_BSD, requests.mask_BS)
        query_BKD = self.query(requests.query_BQ)[:, None].expand_as(candidates_BKD)
        joined = [candidates_BKD, user_BKD, query_BKD, candidates_BKD * user_BKD, candidates_BKD * query_BKD]
        return self.network(torch.cat(joined, -1))

    def at_places(self, logits_BKM: Tensor, places_BK: Tensor) -> Tensor:
        """Logits of the chain at the places where the items were shown.

        Args:
            logits_BKM: of `forward`.
            places_BK: int64, places from 0, `NO_PLACE` where unknown.

        Returns:
            Float ``[B, K, M]``; only the first outcome's differ.
        """
        bias_BK = self.place_biases()[places_BK.clamp(0, self.config.n_places - 1)]
        biased_M = torch.arange(len(self.behaviours), device=logits_BKM.device) == self.n_given
        return logits_BKM + bias_BK[..., None] * biased_M

    def place_biases(self) -> Tensor:
        """What each place adds to the logit of a click, float ``[n_places]``; the first is 0."""
        if self.place_bias is None:
            return self.slope.new_zeros(self.config.n_places)
        return nn.functional.pad(self.place_bias, (1, 0))

    def calibrate(self, slope_M: Tensor, intercept_M: Tensor) -> None:
        """Set the calibration of each logit of the chain: ``slope * logit + intercept``; part of the state."""
        self.slope.copy_(slope_M)
        self.intercept.copy_(intercept_M)

    def log_probabilities(self, logits_BKM: Tensor) -> Tensor:
        """Logarithms of the calibrated probabilities of `outcomes`, float ``[B, K, n_outcomes]``.

        Args:
            logits_BKM: of `forward`, or of `at_places`.
        """
        calibrated_BKM = self.slope * logits_BKM + self.intercept
        return nn.functional.logsigmoid(calibrated_BKM[..., self.n_given :]).cumsum(-1)

    def score(self, requests: RankingRequests, items_BK: Tensor) -> RankingScores:
        """What each candidate is worth, were it shown on the first place; arguments as of `forward`."""
        logits_BKM = self(requests, items_BK)
        relevance_BK = logits_BKM[..., 0] if self.n_given else torch.zeros_like(logits_BKM[..., 0])
        return RankingScores(relevance_BK, self.log_probabilities(logits_BKM).exp())
