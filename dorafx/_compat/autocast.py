"""Private API of autocast: the functions by which a graph enters and leaves a region."""

from __future__ import annotations

import torch

enter_autocast = torch.amp._enter_autocast  # type: ignore[attr-defined,unused-ignore]
exit_autocast = torch.amp._exit_autocast  # type: ignore[attr-defined,unused-ignore]
