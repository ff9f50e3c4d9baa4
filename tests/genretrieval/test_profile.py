"""Profile tables by torch and by TorchRec; the latter is installed by `make torchrec`."""

from __future__ import annotations

import sys

import pytest
import torch

from genretrieval.errors import RecipeError
from genretrieval.model.profile import Profile, TorchRecProfile

PROFILE = torch.tensor([[3, 5], [5, 5], [0, 9]])


def test_a_profile_is_the_sum_of_its_features() -> None:
    profile = Profile(10, 4)
    w = profile.table.weight.detach()
    torch.testing.assert_close(profile(PROFILE), torch.stack([w[3] + w[5], 2 * w[5], w[0] + w[9]]))


def test_without_torchrec_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchrec", None)
    with pytest.raises(RecipeError, match="make torchrec"):
        TorchRecProfile(Profile(10, 4))


def test_torchrec_gives_the_same_numbers() -> None:
    pytest.importorskip("torchrec", reason="`make torchrec` installs it")
    plain = Profile(10, 4)
    sharded = TorchRecProfile(plain)
    torch.testing.assert_close(sharded(PROFILE), plain(PROFILE))
    optimizers = [torch.optim.AdamW(profile.parameters(), lr=0.1) for profile in (plain, sharded)]
    for _ in range(3):
        for profile, optimizer in zip((plain, sharded), optimizers, strict=True):
            optimizer.zero_grad()
            profile(PROFILE).square().sum().backward()
            optimizer.step()
    assert list(plain.state_dict()) == list(sharded.state_dict())
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(sharded.state_dict()[name], weight)
