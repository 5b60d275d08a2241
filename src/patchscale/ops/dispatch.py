"""Which implementation of an operator runs, and why."""

import os
from typing import NamedTuple

import torch

from patchscale.errors import UserError

ENVIRONMENT_VARIABLE = "PATCHSCALE_OPS"
IMPLEMENTATIONS = ("torch", "reference")


class Choice(NamedTuple):
    implementation: str
    reason: str


def choose_implementation(implementation: str | None, device: torch.device) -> Choice:
    """Choose the implementation of an operator: explicit argument, else environment variable, else device.

    Args:
        implementation: ``"torch"`` (chunked, plain PyTorch), ``"reference"`` (token by token, for checking), or None.
        device: where the tensors are.

    Raises:
        UserError: the argument or ``PATCHSCALE_OPS`` names no implementation.
    """
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if implementation is not None:
        choice = Choice(implementation, "asked for by the caller")
    elif from_environment:
        choice = Choice(from_environment, f"set by {ENVIRONMENT_VARIABLE}")
    else:
        choice = Choice("torch", f"the default on {device.type}")
    if choice.implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"unknown operator implementation {choice.implementation!r} ({choice.reason}); "
            f"choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    return choice
