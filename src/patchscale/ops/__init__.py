"""Operators on token sequences, (batch, tokens, channels), that know no model."""

from patchscale.ops.conv import causal_conv1d
from patchscale.ops.mixer import mix_tokens
from patchscale.ops.norm import gated_rms_norm
from patchscale.ops.scan import ssd_scan

__all__ = ["causal_conv1d", "gated_rms_norm", "mix_tokens", "ssd_scan"]

# The operators with more than one implementation; see dispatch.py.
DISPATCHED = ("causal_conv1d", "mix_tokens", "ssd_scan")
