"""The number format of training's matrix products."""

from __future__ import annotations

import torch

_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # the last is ARM's


def fast_bfloat16() -> bool:
    """Whether this machine multiplies matrices faster in bfloat16 than in float32.

    True of a GPU that has the format and of a CPU with instructions for it (AMD EPYC with AVX-512: a step of a dense
    generator of width 64, 128 and 256 takes 0.8, 0.6 and 0.55 of the time). Where PyTorch has to emulate them, training
    takes 5 to 7 times as long as in float32 (AMD EPYC with AVX2 alone).
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _BFLOAT16_INSTRUCTIONS)
