from collections.abc import Callable

import pytest
from torch import Tensor

from patchscale.models import Adventurer


@pytest.fixture(scope="session")
def hidden_states() -> Callable[[Adventurer, Tensor], dict[str, Tensor]]:
    def record(model: Adventurer, image: Tensor) -> dict[str, Tensor]:
        """What a forward pass makes, by the fixtures' names: each block's input or output, all tokens, logits."""
        states: dict[str, Tensor] = {}
        modules = {f"hidden.{i}": block for i, block in enumerate(model.layers)} | {"out.tokens": model.norm_f}
        hooks = [
            model.layers[0].register_forward_pre_hook(lambda _, inputs: states.update({"hidden.embed": inputs[0]}))
        ]
        hooks += [
            module.register_forward_hook(lambda *args, name=name: states.update({name: args[2]}))
            for name, module in modules.items()
        ]
        states["out.logits"] = model(image)
        for hook in hooks:
            hook.remove()
        return states

    return record
