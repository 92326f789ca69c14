"""The objectives over text: their settings and their classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pretrain.encoders.text import TextConfig, TextEncoder
from pretrain.objectives.hybrid import Hybrid, HybridConfig
from pretrain.objectives.masked_language import MaskedLanguage, MaskedLanguageConfig
from pretrain.objectives.next_token import NextToken, NextTokenConfig
from pretrain.objectives.protocol import Objective
from pretrain.objectives.replaced_token import ReplacedToken, ReplacedTokenConfig

TextObjectiveConfig = HybridConfig | MaskedLanguageConfig | NextTokenConfig | ReplacedTokenConfig
"""Settings of every objective over text."""

TEXTS: dict[type, Callable[[Any, TextConfig, TextEncoder], Objective]] = {
    HybridConfig: lambda config, _, encoder: Hybrid(encoder, config),
    MaskedLanguageConfig: lambda config, _, encoder: MaskedLanguage(encoder, config),
    NextTokenConfig: lambda config, _, encoder: NextToken(encoder, config),
    ReplacedTokenConfig: lambda config, _, encoder: ReplacedToken(encoder, config),
}
"""By the type of the settings: called with them, the recipe's `encoder`, and the encoder built from that."""
