"""A plugin of Axolotl: ``plugins: [dorafx.integrations.axolotl.DorafxPlugin]`` in its configuration file."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from dorafx.integrations.trainer import TrainerCallback


class DorafxArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration.

    Attributes:
        dorafx: options of :class:`dorafx.TrainerCallback` by name, as in ``dorafx: {scope: modules}``.
    """

    dorafx: dict[str, Any] | None = None


class DorafxPlugin(BasePlugin):
    """Trains with :class:`dorafx.TrainerCallback`."""

    def get_input_args(self) -> str:
        """The class that validates the plugin's part of the configuration."""
        return f"{DorafxArgs.__module__}.{DorafxArgs.__qualname__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """The callback that optimizes the model.

        Raises:
            TypeError: an unknown option.
            ValueError: a wrong value.
        """
        return [TrainerCallback(**dict(cfg.get("dorafx") or {}))]
