"""Attention to words by the name of an attention implementation, in the outputs of the model.

```python
import ospo_fast.integrations.attention

model.set_attn_implementation("ospo_columns")
maps = model(ids, columns=columns, rows=(start, count), output_attentions=True).attentions
```

The import registers the name with transformers. Without `columns`, it is the same as "sdpa".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ospo_fast.errors import OpError, OspoError
from ospo_fast.models._column_probabilities import (
    AttentionCall,
    LseRecorder,
    PlainRequests,
    check_options,
    from_indicators,
    take_rows,
)
from ospo_fast.models.capture import pad_columns
from ospo_fast.ops.attention_columns import Bounds, ColumnRequest
from ospo_fast.packages import required_by

with required_by("ospo_fast.integrations.attention", "transformers"):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "ospo_columns"


def ospo_columns_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    columns: Tensor | Sequence[Sequence[Sequence[int]]] | None = None,
    rows: Bounds | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute SDPA, and the mean attention of rows to the columns of each object over the heads of this layer.

    `AttentionCapture` does the same for models as they are, and inspects a mask once per pass instead of once per
    layer.

    Args:
        module: the attention layer.
        query: (B, H, S, D).
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv).
        attention_mask: that of "sdpa".
        columns: (B, O, C) integers or ragged lists, as in `AttentionCapture`; None: no maps.
        rows: (start, count), as in `AttentionCapture`.
        options: those of transformers' sdpa.

    Returns:
        The attention (B, S, H, Dv), and the map (B, O, count) fp32 (float64 for float64), which
        `output_attentions=True` returns for each layer; None without columns.

    Raises:
        OspoError: a soft cap or sinks, which SDPA ignores; columns with a cache that holds earlier keys.
        OpError: columns without rows or outside the sequence.

    """
    options.pop("output_attentions", None)  # sdpa warns that it has none
    call = AttentionCall(sdpa_attention_forward, module, query, key, value, attention_mask, options)
    if columns is None:
        return call.run()[0], None
    check_options(call)
    if rows is None:
        raise OpError(f"{NAME}: columns were given without rows; give rows=(start, count)")
    if query.shape[2] != key.shape[2]:
        raise OspoError(
            f"{NAME}: got {query.shape[2]} queries for {key.shape[2]} keys, expected a whole sequence; use "
            "AttentionCapture for the steps of a cache"
        )
    table = columns if isinstance(columns, Tensor) else pad_columns(columns)
    request = ColumnRequest.from_args(table, query.shape[0], query.shape[2], rows=rows)
    plain = PlainRequests(request, query.device, 1).get(call)
    if plain is not None:
        with LseRecorder() as recorder:
            result = call.run()[0]
        dtype = recorder.dtype or query.dtype
        maps = plain[0].run(
            query.detach().to(dtype), key.detach().to(dtype), scale=options.get("scaling"),
            lse=recorder.lse_of(query), causal=plain[1],
        )  # fmt: skip
        return result, maps
    request = request.to(query.device)
    maps, inside = take_rows(from_indicators(call, request.columns, 0).mean(1), request, 0)
    return call.run()[0], maps * inside[:, None]


AttentionInterface.register(NAME, ospo_columns_attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
