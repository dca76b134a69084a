"""Small networks in the forms in which people publish them, two optimizers and a schedule, for rows of runs.py."""

import keras
from keras import Input, Model, layers, ops


def end(image_shape, noisy, x):
    return Model(noisy, layers.Conv2D(image_shape[-1], 3, padding="same", activation="sigmoid")(x))


class DnCNN(keras.Model):
    """Subtracts the noise, as published: a class with a linear output."""

    def __init__(self, channels):
        super().__init__()
        self.first = layers.Conv2D(8, 3, padding="same", activation="relu")
        normalized = [layers.Conv2D(8, 3, padding="same", use_bias=False), layers.BatchNormalization(), layers.ReLU()]
        self.block = keras.Sequential(normalized)
        self.last = layers.Conv2D(channels, 3, padding="same", kernel_initializer="zeros")

    def call(self, noisy):
        return noisy - self.last(self.block(self.first(noisy)))


def dncnn(image_shape):
    return DnCNN(image_shape[-1])


def nafnet(image_shape):
    """Operations on tensors: sums, products and a split."""
    noisy = Input(image_shape)
    x = layers.Conv2D(4, 3, padding="same")(noisy)
    y = layers.Conv2D(8, 1)(layers.LayerNormalization()(x))
    a, b = ops.split(layers.DepthwiseConv2D(3, padding="same")(y), 2, axis=-1)
    y = a * b
    y = y * layers.Conv2D(4, 1)(layers.GlobalAveragePooling2D(keepdims=True)(y))
    return Model(noisy, noisy + layers.Conv2D(image_shape[-1], 3, padding="same")(x + y))


class Scale(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        return x * self.scale


@keras.saving.register_keras_serializable()
class Gain(Scale):
    pass


class Times(layers.Layer):
    """Its configuration does not say by what it multiplies."""

    def __init__(self, factor=1.0, **settings):
        super().__init__(**settings)
        self.factor = factor

    def call(self, x):
        return self.factor * x

    def get_config(self):
        return layers.Layer.get_config(self)


def times(image_shape):
    noisy = Input(image_shape)
    return end(image_shape, noisy, Times(0.25)(layers.Conv2D(4, 3, padding="same")(noisy)))


def attention(image_shape):
    """Squeeze and excitation as a nested `Sequential`, an attention gate of two inputs, and custom layers."""
    noisy, a, b = Input(image_shape), Input((*image_shape[:2], 4)), Input((*image_shape[:2], 4))
    gate = Model([a, b], layers.Multiply()([a, layers.Conv2D(4, 1, activation="sigmoid")(b)]))
    squeeze = keras.Sequential([Input((4,)), layers.Dense(4, activation="sigmoid"), layers.Reshape((1, 1, 4))])
    x = Scale()(layers.Conv2D(4, 3, padding="same", activation="relu", name="encoder")(noisy))
    y = Gain()(layers.Conv2D(4, 3, padding="same", activation="relu")(x))
    y = layers.Multiply()([y, squeeze(layers.GlobalAveragePooling2D()(y))])
    return end(image_shape, noisy, gate([x, y]))


def spectral(image_shape):
    """A class within a functional model, after a layer that changes its own weights in training."""
    noisy = Input(image_shape)
    x = layers.SpectralNormalization(layers.Conv2D(4, 3, padding="same", activation="gelu"))(noisy)
    return end(image_shape, noisy, DnCNN(4)(x))


class Sampling(layers.Layer):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.seeds = keras.random.SeedGenerator(1)

    def call(self, inputs):
        mean, log_variance = inputs
        self.add_loss(-0.0005 * ops.mean(1 + log_variance - ops.square(mean) - ops.exp(log_variance)))
        return mean + ops.exp(0.5 * log_variance) * keras.random.normal(ops.shape(mean), seed=self.seeds)


def variational(image_shape):
    """A variational autoencoder, which draws random numbers in inference too."""
    height, width, channels = image_shape
    noisy = Input(image_shape)
    x = layers.Flatten()(layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(noisy))
    x = Sampling(name="encoder")([layers.Dense(8)(x), layers.Dense(8)(x)])
    x = layers.Reshape((height // 2, width // 2, 4))(layers.Dense(height // 2 * (width // 2) * 4, "relu")(x))
    return Model(noisy, layers.Conv2DTranspose(channels, 3, strides=2, padding="same", activation="sigmoid")(x))


def momentum(learning_rate):
    return keras.optimizers.SGD(learning_rate, momentum=0.9)


def accumulating(learning_rate):
    return keras.optimizers.AdamW(learning_rate, weight_decay=1e-3, gradient_accumulation_steps=3)


def halving(learning_rate, total_steps):
    return keras.optimizers.schedules.ExponentialDecay(learning_rate, total_steps // 5, 0.5, staircase=True)
