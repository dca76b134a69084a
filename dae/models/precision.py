"""Networks computed in 16 bits, with their weights in 32."""

from typing import Any

import keras
import tensorflow as tf

from dae.errors import UsageError
from dae.models.fused_layers import ENCODER, Network, Outputs


def in_precision(model: keras.Model, precision: str) -> Network:
    """Return the function from noisy images to the outputs of `model`, whose layers compute in `precision`.

    That is bfloat16 or float16, but for the last layer, which computes in float32. Weights and the gradients with
    respect to them are float32. Source: Micikevicius et al., Mixed Precision Training (2018), as in Keras's policy
    `mixed_float16`.

    Raises UsageError if the model has losses of activities, which would be those of another call.
    """
    if any(getattr(layer, "activity_regularizer", None) is not None for layer in model._flatten_layers()):
        raise UsageError("--precision: only float32 for networks with regularizers of activities")

    last = model.outputs[0]._keras_history.operation

    def converted(layer: keras.Layer) -> keras.Layer:
        config: dict[str, Any] = layer.get_config()
        if layer is not last:
            config["dtype"] = f"mixed_{precision}"
        return type(layer).from_config(config)

    with keras.StatelessScope(initialize_variables=False):  # the values are those of `model`
        clone = keras.models.clone_model(model, clone_function=converted)
        encoder = next((layer for layer in clone.layers if layer.name == ENCODER), None)
        both = keras.Model(clone.inputs[0], [clone.outputs[0], encoder.output if encoder else clone.outputs[0]])

    def network(noisy: tf.Tensor) -> Outputs:
        (denoised, latents), changed = both.stateless_call(
            [variable.value for variable in model.trainable_variables],
            [variable.value for variable in model.non_trainable_variables],
            noisy,
            training=True,
        )
        for variable, value in zip(model.non_trainable_variables, changed, strict=True):
            variable.assign(value)
        return Outputs(denoised, tf.cast(latents, tf.float32) if encoder else None)

    return network
