"""The plugin, loaded by Axolotl's own manager of plugins. Skipped where Axolotl is not installed: it pins a torch of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration_support import dora_sites, peft_model, rewritten_sites
from test_trainer_callback import logged, trainer

from dorafx import TrainerCallback

base = pytest.importorskip("axolotl.integrations.base")
from axolotl.utils.dict import DictDefault  # noqa: E402

NAME = "dorafx.integrations.axolotl.DorafxPlugin"


def test_trains_alike(tmp_path: Path) -> None:
    manager = base.PluginManager.get_instance()
    manager.register(NAME)
    assert isinstance(manager.plugins[NAME], base.BasePlugin)
    assert manager.get_input_args() == ["dorafx.integrations.axolotl.DorafxArgs"]
    stock = trainer(peft_model(), tmp_path / "stock")
    stock.train()
    model = peft_model()
    callbacks = manager.add_callbacks_pre_trainer(DictDefault({"dorafx": {"codegen": "eager"}}), model)
    assert [type(callback) for callback in callbacks] == [TrainerCallback]
    ours = trainer(model, tmp_path / "ours", *callbacks)
    ours.train()
    assert logged(ours) == pytest.approx(logged(stock), abs=1e-5) and len(logged(ours)) == 4
    assert set(rewritten_sites()) == set(dora_sites(model))


def test_options() -> None:
    base.PluginManager.get_instance().register(NAME)
    plugin = base.PluginManager.get_instance().plugins[NAME]
    assert plugin.add_callbacks_pre_trainer(DictDefault({}), None)[0].options["codegen"] == "inductor"
    with pytest.raises(ValueError, match="layers"):
        plugin.add_callbacks_pre_trainer(DictDefault({"dorafx": {"scope": "layers"}}), None)
    with pytest.raises(TypeError, match="speed"):
        plugin.add_callbacks_pre_trainer(DictDefault({"dorafx": {"speed": 1}}), None)
