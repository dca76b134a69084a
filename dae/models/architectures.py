"""The networks of the package: functions `(image_shape, width) -> keras.Model`, from noisy to denoised images.

Each takes images of any size, also of sides that its strides do not divide.
"""

from collections.abc import Callable

import keras
from keras import layers

# (H, W, C) of an image.
Shape = tuple[int, int, int]


def conv(image_shape: Shape, width: int = 1) -> keras.Model:
    """Sides 28 -> 14 -> 7 -> 4 (`encoder`) -> 8 -> 16 -> 14 -> 28, with 16, 8, 8, 8, 8, 16 channels times `width`.

    The third convolution of the decoder is 'valid', which takes 16 to 14 and so restores 28, and any other side that is
    4 more than a multiple of 8. For other sides it is 'same', which gives the next multiple of 8, and the result is
    cropped.

    Source: the *plain* convolutional autoencoder of Chollet, Building Autoencoders in Keras
    (https://blog.keras.io/building-autoencoders-in-keras.html), which the tutorial applies to the denoising task of the
    same page; that page's own denoising network is `blog`.
    """
    height, width_of_image, channels = image_shape
    few, many, relu = 8 * width, 16 * width, {"padding": "same", "activation": "relu"}
    noisy = keras.Input(image_shape, name="noisy")
    x = layers.Conv2D(many, 3, **relu, name="encoder_conv_1")(noisy)
    x = layers.MaxPooling2D(2, padding="same", name="encoder_pool_1")(x)
    x = layers.Conv2D(few, 3, **relu, name="encoder_conv_2")(x)
    x = layers.MaxPooling2D(2, padding="same", name="encoder_pool_2")(x)
    x = layers.Conv2D(few, 3, **relu, name="encoder_conv_3")(x)
    latents = layers.MaxPooling2D(2, padding="same", name="encoder")(x)

    x = layers.Conv2D(few, 3, **relu, name="decoder_conv_1")(latents)
    x = layers.UpSampling2D(2, name="decoder_up_1")(x)
    x = layers.Conv2D(few, 3, **relu, name="decoder_conv_2")(x)
    x = layers.UpSampling2D(2, name="decoder_up_2")(x)
    padding = "valid" if height % 8 == width_of_image % 8 == 4 else "same"
    x = layers.Conv2D(many, 3, padding=padding, activation="relu", name="decoder_conv_3")(x)
    x = layers.UpSampling2D(2, name="decoder_up_3")(x)
    denoised = layers.Conv2D(channels, 3, padding="same", activation="sigmoid", name="denoised")(x)
    if padding == "same" and (height % 8 or width_of_image % 8):
        denoised = layers.Cropping2D(((0, -height % 8), (0, -width_of_image % 8)), name="cropped")(denoised)
    return keras.Model(noisy, denoised, name="conv")


def blog(image_shape: Shape, width: int = 1) -> keras.Model:
    """Sides 28 -> 14 -> 7 (`encoder`) -> 14 -> 28, with 32 channels times `width`; 28,353 parameters for digits.

    Other sides than multiples of 4 give the next multiple, and the result is cropped.

    Source: the denoising autoencoder of Chollet, Building Autoencoders in Keras
    (https://blog.keras.io/building-autoencoders-in-keras.html).
    """
    height, width_of_image, channels = image_shape
    settings = {"filters": 32 * width, "kernel_size": 3, "padding": "same", "activation": "relu"}
    noisy = keras.Input(image_shape, name="noisy")
    x = layers.Conv2D(**settings)(noisy)
    x = layers.MaxPooling2D(2, padding="same")(x)
    x = layers.Conv2D(**settings)(x)
    x = layers.MaxPooling2D(2, padding="same", name="encoder")(x)

    x = layers.Conv2D(**settings)(x)
    x = layers.UpSampling2D(2)(x)
    x = layers.Conv2D(**settings)(x)
    x = layers.UpSampling2D(2)(x)
    denoised = layers.Conv2D(channels, 3, padding="same", activation="sigmoid")(x)
    if height % 4 or width_of_image % 4:
        denoised = layers.Cropping2D(((0, -height % 4), (0, -width_of_image % 4)))(denoised)
    return keras.Model(noisy, denoised, name="blog")


def patches(image_shape: Shape, width: int = 1) -> keras.Model:
    """Sides 28 -> 14 -> 28: two residual blocks of 32 channels times `width`; 38,689 parameters for digits.

    Each patch becomes one pixel of 32 channels, so that all layers but the first and the last are at half the
    resolution, where a convolution takes a quarter of the time. Odd sides are padded with a row or column of zeros,
    which is cropped at the end.

    Source: working at a lower resolution, with the pixels of a patch as channels, is the idea of Shi et al., Real-Time
    Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network (2016), and for
    denoising of Zhang, Zuo and Zhang, FFDNet (2018).
    """
    noisy, x, crop = _padded_input(image_shape, 2)
    x = layers.Conv2D(32 * width, 4, strides=2, padding="same", activation="relu")(x)
    x = _residual_blocks(x, 2, relu=True)
    denoised = layers.Conv2DTranspose(image_shape[-1], 6, strides=2, padding="same", activation="sigmoid")(x)
    return keras.Model(noisy, crop(denoised), name="patches")


def unet(image_shape: Shape, width: int = 1) -> keras.Model:
    """Sides 28 -> 14 -> 7 -> 14 -> 28: 32 channels at half the resolution and 64 at a quarter, times `width`.

    It is `patches` with a coarser level, whose output is added to that of the finer one; 323,969 parameters for digits.
    Other sides than multiples of 4 are padded with zeros, which are cropped at the end.

    Source: Ronneberger, Fischer and Brox, U-Net (2015); with residual blocks, strides instead of pooling, and sums
    instead of concatenations, as in Zhang et al., Plug-and-Play Image Restoration with Deep Denoiser Prior (2021).
    """
    noisy, x, crop = _padded_input(image_shape, 4)
    x = _two_levels(x, width, blocks=(2, 3, 2), relu=True)
    denoised = layers.Conv2DTranspose(image_shape[-1], 6, strides=2, padding="same", activation="sigmoid")(x)
    return keras.Model(noisy, crop(denoised), name="unet")


def residual_unet(image_shape: Shape, width: int = 1) -> keras.Model:
    """The sum of the noisy image and of the output of a deeper U-Net like `unet`, so that it can leave [0, 1].

    The last kernel starts with zeros: at first, the network returns the noisy image. Sides are padded as by `unet`;
    360,961 parameters for digits.

    Source: Zhang et al., Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image Denoising (2017).
    """
    noisy, x, crop = _padded_input(image_shape, 4)
    x = _two_levels(x, width, blocks=(3, 3, 3), relu=False)
    x = layers.Conv2DTranspose(image_shape[-1], 6, strides=2, padding="same", kernel_initializer="zeros")(x)
    return keras.Model(noisy, layers.Add()([noisy, crop(x)]), name="residual_unet")


def dncnn(image_shape: Shape, width: int = 1) -> keras.Model:
    """Eight 3 x 3 convolutions of 32 channels times `width`, batch-normalized inside; their output is added to `noisy`.

    Nothing is downsampled, so images of any size fit, and a training step takes several times that of the other
    networks. A sigmoid of the sum keeps the output in [0, 1].

    Source: Zhang et al., Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image Denoising (2017), which
    has 17 or 20 convolutions of 64 channels, and no sigmoid.
    """
    channels = 32 * width
    noisy = keras.Input(image_shape, name="noisy")
    x = layers.Conv2D(channels, 3, padding="same", activation="relu")(noisy)
    for _ in range(6):
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    residual = layers.Conv2D(image_shape[-1], 3, padding="same")(x)
    denoised = layers.Activation("sigmoid")(layers.Add()([noisy, residual]))
    return keras.Model(noisy, denoised, name="dncnn")


def _padded_input(
    image_shape: Shape, multiple: int
) -> tuple[keras.KerasTensor, keras.KerasTensor, Callable[[keras.KerasTensor], keras.KerasTensor]]:
    """Return the input, the same padded with zeros to sides that `multiple` divides, and the function that crops it."""
    padding = tuple((0, -side % multiple) for side in image_shape[:2])
    noisy = keras.Input(image_shape, name="noisy")
    if padding == ((0, 0), (0, 0)):
        return noisy, noisy, lambda x: x
    return noisy, layers.ZeroPadding2D(padding)(noisy), lambda x: layers.Cropping2D(padding)(x)


def _two_levels(x: keras.KerasTensor, width: int, blocks: tuple[int, int, int], relu: bool) -> keras.KerasTensor:
    """Apply residual blocks at half the resolution, at a quarter, whose upsampled output is added, and at half again.

    `blocks` are their numbers.
    """
    before, coarse, after = blocks
    x = layers.Conv2D(32 * width, 4, strides=2, padding="same", activation="relu")(x)
    fine = _residual_blocks(x, before, relu)
    x = layers.Conv2D(64 * width, 3, strides=2, padding="same", activation="relu")(fine)
    x = _residual_blocks(x, coarse, relu)
    x = layers.Conv2DTranspose(32 * width, 2, strides=2, padding="same")(x)
    x = layers.Add()([x, fine])
    return _residual_blocks(layers.ReLU()(x) if relu else x, after, relu)


def _residual_blocks(x: keras.KerasTensor, count: int, relu: bool) -> keras.KerasTensor:
    """Apply `count` blocks of two 3 x 3 convolutions, each block added to its input; `relu` rectifies the sums.

    Each block starts as the identity: its last kernel starts with zeros. Source: He et al., Deep Residual Learning for
    Image Recognition (2016), without batch normalization; without `relu`, Identity Mappings in Deep Residual Networks
    (2016); Zhang, Dauphin and Ma, Fixup Initialization (2019), for the zeros.
    """
    channels = x.shape[-1]
    for _ in range(count):
        y = layers.Conv2D(channels, 3, padding="same", activation="relu")(x)
        y = layers.Conv2D(channels, 3, padding="same", kernel_initializer="zeros")(y)
        x = layers.Add()([x, y])
        x = layers.ReLU()(x) if relu else x
    return x
