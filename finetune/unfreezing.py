"""Gradual unfreezing from the top (Howard and Ruder 2018, section 3.3), as a function of progress."""

from __future__ import annotations

from collections.abc import Callable

from finetune.encoder import Encoder


def layers_in_training(progress: float, layers: int, by: float) -> int:
    """How many of the encoder's `layers`, counted from the top, train at `progress` in [0, 1].

    The head is alone at first; then one layer more at even distances, all of them from `by` on.
    """
    return layers if progress >= by else int((layers + 1) * progress / by)


def unfreezing(by: float) -> Callable[[Encoder, float], None]:
    """What to call before each step with the encoder and the progress: sets what trains.

    Layers are those of `Encoder.layers`, as for layer-wise rates; what lies as high as the head (a last norm) trains
    with it from the start.
    """

    def before_step(encoder: Encoder, progress: float) -> None:
        depths, top = encoder.layers()
        below = sorted({depth for depth in depths.values() if depth < top}, reverse=True)
        training = {*below[: layers_in_training(progress, len(below), by)], top}
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(min(depths.get(name, top), top) in training)

    return before_step
