"""Attention row by row: the oracle of every form of it."""

from __future__ import annotations

import torch


def row_by_row(q_HTD, k_KTD, v_KTD, segments, *, scale, window=None, softcap=None):
    """Each row of each segment by itself: its prefix's keys, then those of its segment up to itself."""
    k_HTD, v_HTD = (x.repeat_interleave(len(q_HTD) // len(k_KTD), dim=0) for x in (k_KTD, v_KTD))
    out = [torch.zeros(len(q_HTD), q_HTD.shape[2], dtype=q_HTD.dtype) for _ in range(q_HTD.shape[1])]
    for segment in segments:
        before = list(range(segment.prefix_start, segment.prefix_start + segment.prefix_length))
        for row in range(segment.start, segment.start + segment.length):
            seen = [*before, *range(segment.start, row + 1)][-(window or 1 << 30) :]
            scores = torch.einsum("hd,hmd->hm", q_HTD[:, row], k_HTD[:, seen]) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[row] = torch.einsum("hm,hmd->hd", torch.softmax(scores, -1), v_HTD[:, seen])
    return torch.stack(out)
